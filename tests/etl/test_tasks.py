import itertools
import operator
import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from etl import tasks


def test_results_come_in_the_order_of_the_tasks(spark):
    assert tasks.run_tasks(spark, operator.neg, list(range(20))) == [-n for n in range(20)]
    assert tasks.run_tasks(spark, operator.neg, []) == []


@pytest.mark.parametrize("num", [0, 1, 1000])
def test_arrow_files_hold_one_chunk_or_none(tmp_path, num):
    text = pa.chunked_array([[f"ü{n}" for n in range(num // 2)], [None] * (num - num // 2)], pa.string())
    tasks.write_arrow(tmp_path / "x", number=np.arange(num, dtype=np.int8), text=text)
    found = tasks.read_arrow(tmp_path / "x")
    assert list(found) == ["number", "text"]
    assert found["number"].equals(pa.array(np.arange(num, dtype=np.int8)))
    assert found["text"].equals(text.combine_chunks())


def test_names_are_new_each_time():
    assert len({tasks.unique_name() for _ in range(100)}) == 100


def test_items_of_several_folders(spark, tmp_path):
    for name, items in (("a", [3, 1]), ("b", []), ("c", [2])):
        table = spark.createDataFrame([(item,) for item in items], "item int")
        table.write.parquet(str(tmp_path / name))
    assert sorted(tasks.read_items(tmp_path, ["a", "b", "c"]).tolist()) == [1, 2, 3]
    nothing = tasks.read_items(tmp_path, [])
    assert (nothing.tolist(), nothing.dtype) == ([], np.int32)
    pq.read_table(tmp_path / "b")  # a folder without a row is a table nevertheless
    assert tasks.read_items(tmp_path, ["b"]).dtype == np.int32


def test_a_folder_that_is_still_written_into_is_removed(tmp_path):
    """As by a speculative copy of a task, which ends after the job."""
    folder, done = tmp_path / "stage", threading.Event()
    folder.mkdir()

    def straggler():
        for number in itertools.count():
            try:
                (folder / str(number)).touch()
            except OSError:
                return
            if done.is_set():
                return

    thread = threading.Thread(target=straggler)
    thread.start()
    threading.Timer(0.3, done.set).start()
    tasks.remove_folder(folder)
    thread.join()
    assert not folder.exists()


def test_a_folder_that_executors_have_not_got(tmp_path, spark):
    tasks.check_shared(spark, tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"does not share the work folder: .*No such file or directory.*--work"):
        tasks.check_shared(spark, tmp_path / "elsewhere")
