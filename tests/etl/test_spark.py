import gzip

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from contract.spark import spark_session
from etl.tasks import run_tasks


def test_a_full_disk_is_one_message():
    def write(_: int) -> None:
        with open("/dev/full", "w") as file:
            file.write("x")

    with (
        pytest.raises(ValueError, match=r"^a task could not write: OSError: \[Errno 28\] No space left on device; the"),
        spark_session("test") as spark,
    ):
        run_tasks(spark, write, [1])


def test_other_errors_of_tasks_stay_what_they_are():
    with pytest.raises(Exception, match="ZeroDivisionError"), spark_session("test") as spark:
        run_tasks(spark, lambda task: 1 / task, [0])


def test_a_damaged_input_file_is_named(spark, tmp_path):
    """`spark` only sets the JVM up; the session under test stops it, as any stage does."""
    file = tmp_path / "a log.txt.gz"
    file.write_bytes(gzip.compress(b"a line\n" * 10_000)[:-30])
    with pytest.raises(ValueError, match="cannot be read: it is damaged") as error, spark_session("test") as session:
        session.read.text(str(file)).count()
    assert str(file) in str(error.value)


def test_a_column_of_another_type_than_expected_is_no_damage(spark, tmp_path):
    pq.write_table(pa.table({"x": [1.5]}), tmp_path / "a.parquet")
    message = r"a\.parquet cannot be read: Data type mismatches .*x.* Expected .*; write the column with one type"
    with pytest.raises(ValueError, match=message), spark_session("test") as session:
        session.read.schema("x int").parquet(str(tmp_path)).collect()
