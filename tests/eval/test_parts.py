"""Parts of a table: kept when a run stops, refused when they are of something else, one table in the end."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eval import parts as parts_module
from eval.parts import Parts


def test_parts_become_one_table_with_their_origin(tmp_path, monkeypatch):
    monkeypatch.setattr(parts_module, "ROWS_PER_GROUP", 5)
    parts = Parts(tmp_path / "recs.parquet")
    assert parts.begin({"k": 3}, np.arange(10))
    assert parts.keys().tolist() == list(range(10))
    for part in (2, 0, 1, 3):
        parts.write(part, pa.table({"row": [part * 3 + i for i in range(3)]}))
    assert parts.finish(4) == 12
    assert [file.name for file in tmp_path.iterdir()] == ["recs.parquet"]
    file = pq.ParquetFile(tmp_path / "recs.parquet")
    assert file.read()["row"].to_pylist() == list(range(12))
    assert file.num_row_groups == 2  # not one for each part

    assert not parts.begin({"k": 3}, np.arange(10))  # there is nothing left to do
    assert parts.begin({"k": 4}, np.arange(10))  # another table takes its place when it is complete
    assert pq.read_table(tmp_path / "recs.parquet").num_rows == 12


def test_parts_of_another_origin_are_refused(tmp_path):
    parts = Parts(tmp_path / "recs.parquet")
    parts.begin({"model": "a", "k": 3}, np.arange(4))
    parts.write(0, pa.table({"row": [1]}))
    assert parts.begin({"model": "a", "k": 3}, np.arange(4))
    with pytest.raises(ValueError, match=r"recs.parquet.parts holds parts with model = 'a', now it is 'b'; go on"):
        parts.begin({"model": "b", "k": 3}, np.arange(4))
    assert pq.read_table(parts.file(0))["row"].to_pylist() == [1]


def test_a_table_that_others_wrote_is_replaced(tmp_path):
    pq.write_table(pa.table({"row": [1]}), tmp_path / "recs.parquet")
    assert Parts(tmp_path / "recs.parquet").begin({"k": 3}, np.arange(4))
    (tmp_path / "recs.parquet").write_text("no table at all")
    assert Parts(tmp_path / "recs.parquet").begin({"k": 3}, np.arange(4))
