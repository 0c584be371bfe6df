import gzip

import pytest

from etl.session import spark_session


def test_a_damaged_input_file_is_named(spark, tmp_path):
    """`spark` only sets the JVM up; the session under test stops it, as any stage does."""
    file = tmp_path / "a log.txt.gz"
    file.write_bytes(gzip.compress(b"a line\n" * 10_000)[:-30])
    with pytest.raises(ValueError, match="cannot be read: it is damaged") as error, spark_session("test") as session:
        session.read.text(str(file)).count()
    assert str(file) in str(error.value)


def test_other_failures_are_not_hidden(spark):
    with pytest.raises(Exception, match="nowhere"), spark_session("test") as session:
        session.sql("SELECT nowhere")
