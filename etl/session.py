"""The Spark session: our defaults where spark-submit --conf says nothing, our code on the executors."""

import contextlib
import logging
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

from py4j.protocol import Py4JError
from pyspark.errors import PySparkException
from pyspark.sql import SparkSession


@contextlib.contextmanager
def spark_session(name: str) -> Iterator[SparkSession]:
    """A session that is stopped at the end, whatever happens."""
    # Executors run the driver's interpreter; by its bare name they would find the system's.
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    builder = SparkSession.builder.appName(name).config("spark.log.level", "ERROR")
    spark = builder.config("spark.ui.showConsoleProgress", "false").getOrCreate()
    # What goes wrong between Python and the JVM is raised; py4j would print its stack as well, some by the root logger.
    logging.getLogger("py4j").setLevel(logging.CRITICAL)
    logging.getLogger().addFilter(lambda record: "while sending command" not in record.getMessage())
    # pyspark's handler of Ctrl-C asks the JVM to cancel its jobs; under spark-submit the JVM got the same Ctrl-C and is
    # gone. Stopping the session cancels them as well.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with tempfile.TemporaryDirectory() as folder:
            _set_defaults(spark)
            spark.sparkContext.addPyFile(_zip_code(Path(folder)))
            yield spark
    except ConnectionError as error:
        raise RuntimeError("Spark's JVM is gone; was it killed, or short of memory (--driver-memory)?") from error
    except (Py4JError, PySparkException) as error:
        if unreadable := re.search(r"FAILED_READ_FILE\S*\].*?file:/*(/[^\s]*[^\s.])", str(error)):
            file = urllib.parse.unquote(unreadable[1])
            raise ValueError(f"{file} cannot be read: it is damaged or cut off; mend it, or leave it out") from error
        raise
    finally:
        with contextlib.suppress(ConnectionError, Py4JError):  # nothing is left to stop
            spark.stop()


def _set_defaults(spark: SparkSession) -> None:
    given = spark.sparkContext.getConf()
    defaults = {
        # Adaptive execution merges partitions that turn out small; on a large cluster this is the number to raise.
        "spark.sql.shuffle.partitions": 2 * spark.sparkContext.defaultParallelism,
        "spark.sql.session.timeZone": "UTC",
        # Rows that pass from Java to Python at once.
        "spark.sql.execution.arrow.maxRecordsPerBatch": 1 << 16,
        "spark.sql.autoBroadcastJoinThreshold": "64m",
    }
    for key, value in defaults.items():
        if not given.contains(key):
            spark.conf.set(key, value)


def _zip_code(folder: Path) -> str:
    """A zip of the packages that executors import; they do not see a wheel."""
    root = Path(__file__).parents[1]
    for package in ("contract", "etl"):
        shutil.copytree(root / package, folder / "code" / package, ignore=shutil.ignore_patterns("__pycache__"))
    return shutil.make_archive(str(folder / "colarec_etl"), "zip", folder / "code")
