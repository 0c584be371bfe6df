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


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 2
    file.write_bytes(content)


def test_parts_that_are_damaged_count_as_not_there(tmp_path):
    parts = Parts(tmp_path / "recs.parquet")
    parts.begin({"k": 3}, np.arange(4))
    for part in range(3):
        parts.write(part, pa.table({"row": [part]}))
    flip(parts.file(0))
    flip(parts.file(1).with_suffix(".json"))
    assert [parts.is_whole(part) for part in range(4)] == [False, False, True, False]
    with pytest.raises(ValueError, match=r"part-00000.parquet is damaged; the same command makes it again"):
        parts.finish(3)
    for part in range(2):
        parts.write(part, pa.table({"row": [part]}))
    assert parts.finish(3) == 3
    assert pq.read_table(tmp_path / "recs.parquet")["row"].to_pylist() == [0, 1, 2]


def test_parts_whose_origin_or_keys_are_damaged_stay_and_are_refused(tmp_path):
    parts = Parts(tmp_path / "recs.parquet")
    parts.begin({"k": 3}, np.arange(100))
    parts.write(0, pa.table({"row": [1]}))
    flip(parts.folder / "keys.npy")
    with pytest.raises(
        ValueError, match=r"keys.npy differs from its checksum; delete the folder .*parts to start over"
    ):
        parts.keys()
    flip(parts.folder / "manifest.json")
    with pytest.raises(ValueError, match=r"manifest.json is damaged .*; delete the folder .*parts to start over"):
        parts.begin({"k": 3}, np.arange(100))
    (parts.folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"parts holds parts and no manifest.json, which says of what; delete"):
        parts.begin({"k": 3}, np.arange(100))
    assert parts.is_whole(0)


def test_without_room_parts_stay_and_nothing_is_half_written(tmp_path, largest_file):
    parts, table = Parts(tmp_path / "recs.parquet"), pa.table({"row": np.random.default_rng(0).random(3000)})
    largest_file(20_000)
    with pytest.raises(ValueError, match=r"keys.npy cannot be written \(80,000 bytes\): File too large; make room, or"):
        parts.begin({"k": 3}, np.arange(10_000))
    assert not list(tmp_path.iterdir())
    parts.begin({"k": 3}, np.arange(4))
    parts.write(0, table[:2000])
    with pytest.raises(
        ValueError, match=r"part-00001.parquet cannot be written \(24,000 bytes\): .* goes on from the parts"
    ):
        parts.write(1, table)
    parts.write(1, table[2000:])
    with pytest.raises(ValueError, match=r"recs.parquet cannot be written \(.* bytes\): File too large; make room, or"):
        parts.finish(2)
    assert [file.name for file in tmp_path.iterdir()] == ["recs.parquet.parts"]
    names = ["keys.npy", "manifest.json", *(f"part-0000{n}.{kind}" for n in range(2) for kind in ("json", "parquet"))]
    assert sorted(file.name for file in parts.folder.iterdir()) == names
    largest_file(-1)
    assert parts.finish(2) == 3000


def test_a_table_that_others_wrote_is_replaced(tmp_path):
    pq.write_table(pa.table({"row": [1]}), tmp_path / "recs.parquet")
    assert Parts(tmp_path / "recs.parquet").begin({"k": 3}, np.arange(4))
    (tmp_path / "recs.parquet").write_text("no table at all")
    assert Parts(tmp_path / "recs.parquet").begin({"k": 3}, np.arange(4))
