import os
import sys

import pytest
from pyspark.sql import DataFrame, SparkSession

from etl import readers

EVENTS_SCHEMA = (
    "user_id string, item_id string, ts long, event string, split byte, "
    "order struct<file: string, block: long, row: long>, reason string, raw string"
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
    """Rows (user, item, ts[, event[, split]]) as a table of etl.readers, in this input order."""

    def table(*rows: tuple) -> DataFrame:
        full = [(*row, *[None] * (5 - len(row)), ("file", 0, number), None, None) for number, row in enumerate(rows)]
        return spark.createDataFrame(full, EVENTS_SCHEMA).select(*readers.EVENTS)

    return table
