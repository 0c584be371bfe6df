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

from py4j.protocol import Py4JError, Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import SparkSession

# What Python and Java say, in the midst of a failed task's stack, of a disk that cannot be written.
_DISK_TROUBLE = re.compile(
    r"[\w.]+(?:Error|Exception): (?:(?!Error: |Exception: ).)*(?:No space left on device|Disk quota exceeded"
    r"|Permission denied|Read-only file system|Mkdirs failed to create).*"
)

# What Spark says of an input file that it began to read and could not.
_UNREADABLE = re.compile(r"FAILED_READ_FILE\S*\].*?file:/*(/[^\s]*[^\s.])")
_MISMATCH = re.compile(r"Data type mismatches when reading Parquet column.*?(?=\.? SQLSTATE|\n|$)")


@contextlib.contextmanager
def spark_session(name: str, *packages: str, work: Path | None = None) -> Iterator[SparkSession]:
    """A session that is stopped at the end, whatever happens. The executors can import these packages of ours.

    Args:
        work: the folder that tasks write into, for messages.

    Raises:
        ValueError: a task could not read an input file, found a disk full, or a folder that it must not write.
        RuntimeError: the JVM is gone.
    """
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
            if packages:
                spark.sparkContext.addPyFile(_zip_code(Path(folder), packages))
            yield spark
    except ConnectionError as error:
        raise RuntimeError("Spark's JVM is gone; was it killed, or short of memory (--driver-memory)?") from error
    except (Py4JJavaError, PySparkException) as error:
        if message := _what_to_mend(str(error), work):
            raise ValueError(message) from error
        raise
    finally:
        with contextlib.suppress(ConnectionError, Py4JError):  # nothing is left to stop
            spark.stop()


def _what_to_mend(failure: str, work: Path | None) -> str | None:
    """The message for a failed task's stack, None if it is not the user's to mend."""
    if unreadable := _UNREADABLE.search(failure):
        file = urllib.parse.unquote(unreadable[1])
        if mismatch := _MISMATCH.search(failure):
            return f"{file} cannot be read: {mismatch[0]}; write the column with one type in all files"
        if "FILE_NOT_EXIST" in unreadable[0]:
            return f"{file} is gone, or was replaced while it was read; leave the input as it is, and run again"
        if "(Permission denied)" in failure:
            return f"{file} cannot be read: permission denied; make it readable, for the executors' user too"
        return f"{file} cannot be read: it is damaged or cut off; mend it, or leave it out"
    if trouble := _DISK_TROUBLE.search(failure):
        folder = f"the work folder {work}" if work else "the work folder"
        return (
            f"a task could not write: {trouble[0]}; {folder} needs room, and to be shared with the executors "
            "and writable for them; shuffles and spills need room in spark.local.dir"
        )
    return None


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
    # Paths are of the file system that all machines mount, as pyarrow sees them too, whatever the default of a Hadoop
    # cluster is. Only for our reads and writes: YARN's own staging stays where the cluster has it.
    spark.conf.set("fs.defaultFS", "file:///")


def _zip_code(folder: Path, packages: tuple[str, ...]) -> str:
    """A zip of the packages; executors do not see a wheel."""
    root = Path(__file__).parents[1]
    for package in packages:
        shutil.copytree(root / package, folder / "code" / package, ignore=shutil.ignore_patterns("__pycache__"))
    return shutil.make_archive(str(folder / "colarec"), "zip", folder / "code")
