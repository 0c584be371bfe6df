import gzip
import os
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyspark.sql import DataFrame, SparkSession

from contract import config as config_module
from etl import readers

EVENTS_SCHEMA = (
    "user_id string, item_id string, ts long, event string, split byte, order long, reason string, raw string"
)


# One JVM serves all tests. Their inputs are small: its first compiler alone is faster than waiting for the second.
os.environ["PYSPARK_SUBMIT_ARGS"] = (
    "--master local[2] --driver-java-options -XX:TieredStopAtLevel=1 --conf spark.ui.enabled=false "
    "--conf spark.sql.shuffle.partitions=2 --conf spark.driver.host=127.0.0.1 pyspark-shell"
)
os.environ["SPARK_LOCAL_IP"] = "127.0.0.1"
os.environ["PYSPARK_PYTHON"] = sys.executable


@pytest.fixture(scope="module")
def spark():
    """The session, started again where a test of the whole stage has stopped it."""
    builder = SparkSession.builder.config("spark.log.level", "ERROR")
    return builder.config("spark.sql.session.timeZone", "UTC").getOrCreate()


@pytest.fixture(scope="session", autouse=True)
def _stopped_at_the_end():
    yield
    if session := SparkSession.getActiveSession():
        session.stop()


@pytest.fixture
def log(spark):
    """Rows (user, item, ts[, event[, split]]) as a table of etl.readers, in this input order.

    `bad`: {position: reason} of rows that cannot be used; their raw text is "row <position>".
    """

    def table(*rows: tuple, bad: dict[int, str] | None = None) -> DataFrame:
        bad = bad or {}
        full = [
            (*row, *[None] * (5 - len(row)), number, bad.get(number), f"row {number}" if number in bad else None)
            for number, row in enumerate(rows)
        ]
        return spark.createDataFrame(full, EVENTS_SCHEMA).select(*readers.EVENTS)

    return table


@pytest.fixture
def read(tmp_path, spark):
    """Writes files, reads them with these [data] settings; returns (events, items) as rows in input order.

    A content is text, bytes or a table; what is named .gz or .zst is compressed.
    """

    def run(files: dict, format_: str, split: str = "leave_one_out", **data):
        for name, content in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, pa.Table):
                pq.write_table(content, path)
                continue
            content = content.encode() if isinstance(content, str) else content
            pack = {".gz": gzip.compress, ".zst": lambda text: pa.compress(text, "zstd", asbytes=True)}
            path.write_bytes(pack.get(path.suffix, bytes)(content))
        (tmp_path / "c.toml").write_text("")
        settings = {"data.path": str(tmp_path), "data.format": format_, "etl.split": split}
        settings |= {f"data.{key}": value for key, value in data.items()}
        config = config_module.load(str(tmp_path / "c.toml"), settings)
        found = readers.input_files(config.data)
        events = readers.read_events(spark, config, found)
        items = readers.read_items(spark, config.data, found)
        assert (tuple(events.columns), tuple(items.columns)) == (readers.EVENTS, readers.ITEMS)
        return events.orderBy("order").collect(), items.orderBy("order").collect()

    return run
