"""Ragged columns and the readers of corpus/ and gid/ tables."""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from contract import schema

ROWS = [[1, 2], [], [3], [4, 5, 6], [7]]


def rows(ragged: schema.Ragged) -> list[list[int]]:
    return [ragged.row(i).tolist() for i in range(len(ragged))]


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pa.array(ROWS, pa.list_(pa.int32())), ROWS),
        (pa.array(ROWS, pa.list_(pa.int32())).slice(1, 3), ROWS[1:4]),
        (pa.chunked_array([pa.array(ROWS[:2]), pa.array(ROWS[2:])]), ROWS),
        (pa.chunked_array([pa.array(ROWS[:2]), pa.array(ROWS[2:])]).slice(1, 3), ROWS[1:4]),
        (pa.chunked_array([pa.array(ROWS).slice(2, 2), pa.array(ROWS).slice(0, 1)]), [[3], [4, 5, 6], [1, 2]]),
        (pa.array([[True], [False, True]]), [[True], [False, True]]),
        (pa.array([], pa.list_(pa.int32())), []),
        (pa.chunked_array([], pa.list_(pa.int32())), []),
        (pa.array([[], []], pa.list_(pa.int32())), [[], []]),
    ],
    ids=["whole", "slice", "chunks", "sliced chunks", "chunks of slices", "bool", "empty", "no chunks", "empty rows"],
)
def test_ragged(column, expected):
    ragged = schema.ragged(column)
    assert rows(ragged) == expected
    assert ragged.lengths.tolist() == [len(row) for row in expected]


def test_a_padding_row_makes_the_dense_id_the_row_number():
    padded = schema.with_padding_row(schema.ragged(pa.array(ROWS)))
    assert rows(padded) == [[], *ROWS]


def test_tables_are_read_in_the_order_of_the_dense_id(tmp_path):
    table = pa.table([[2, 1], ["b", "a"], ["", ""], [[5], [3, 4]], [7, 8], [0, 0]], schema=schema.ITEMS)
    pq.write_table(table, tmp_path / "items.parquet")
    items = schema.read_items(tmp_path)
    assert items.item_ids == ["", "a", "b"]
    assert rows(items.tokens) == [[], [3, 4], [5]]
    assert items.num_train.tolist() == [0, 8, 7]
    assert items.num_items == 2


def test_item_idx_with_a_gap_is_refused(tmp_path):
    pq.write_table(pa.table([[1, 3], [[0, 1], [1, 0]]], schema=schema.GIDS), tmp_path / "gids.parquet")
    with pytest.raises(ValueError, match=r"item_idx is not 1\.\.2"):
        schema.read_gids(tmp_path)


def test_gids_of_different_lengths_are_refused(tmp_path):
    pq.write_table(pa.table([[1, 2], [[0, 1], [1]]], schema=schema.GIDS), tmp_path / "gids.parquet")
    with pytest.raises(ValueError, match="different lengths"):
        schema.read_gids(tmp_path)


def test_gids_are_read_as_one_array(tmp_path):
    pq.write_table(pa.table([[2, 1], [[2, 3], [0, 1]]], schema=schema.GIDS), tmp_path / "gids.parquet")
    assert schema.read_gids(tmp_path).tolist() == [[0, 0], [0, 1], [2, 3]]


def test_a_missing_column_is_named(tmp_path):
    pq.write_table(pa.table({"item_idx": [1]}), tmp_path / "gids.parquet")
    with pytest.raises(ValueError, match="lacks the columns gid"):
        schema.read_gids(tmp_path)


def test_mapped_item_users_have_an_empty_row_where_there_are_none(tmp_path):
    table = pa.table([[3, 1], [[9], [7, 8]]], schema=schema.ITEM_USERS)
    pq.write_table(table, tmp_path / "item_users.parquet")
    users = schema.map_item_users(tmp_path, 4)
    assert rows(users) == [[], [7, 8], [], [9], []]
    assert users.values.dtype == np.int64


def test_mapped_tokens_equal_those_in_memory(tmp_path):
    """The table as Spark writes it, a folder of several files, the rows in any order."""
    rng = np.random.default_rng(0)
    tokens = [rng.integers(3, 99, rng.integers(0, 9)).tolist() for _ in range(3000)]
    item_idx = 1 + rng.permutation(3000)
    (tmp_path / "items.parquet").mkdir()
    for number, part in enumerate(np.array_split(np.arange(3000), 3)):
        idx, texts = item_idx[part].tolist(), [""] * len(part)
        columns = [idx, texts, texts, [tokens[i - 1] for i in idx], [0] * len(part), [0] * len(part)]
        pq.write_table(pa.table(columns, schema=schema.ITEMS), tmp_path / f"items.parquet/part-{number}.parquet")
    mapped = schema.map_tokens(tmp_path, 3000)
    assert rows(mapped) == [[], *tokens] == rows(schema.read_items(tmp_path).tokens)
    assert mapped.values.dtype == np.int32
    assert not mapped.values.flags.writeable  # the file's pages, not a copy
    assert mapped.lengths_at(np.array([[2, 0]])).tolist() == [[len(tokens[1]), 0]]
    # The second reader takes what the first one wrote.
    shutil.rmtree(tmp_path / "items.parquet")
    assert rows(schema.map_tokens(tmp_path, 3000)) == [[], *tokens]


def test_mapped_tokens_of_items_without_text(tmp_path):
    pq.write_table(pa.table([[1], [""], [""], [[]], [0], [0]], schema=schema.ITEMS), tmp_path / "items.parquet")
    assert rows(schema.map_tokens(tmp_path, 1)) == [[], []]


@pytest.mark.parametrize(
    ("item_idx", "error"), [([1, 1], "is there twice"), ([0, 1], r"not within 1\.\.2"), ([1, 3], r"not within 1\.\.2")]
)
def test_mapped_rows_out_of_place_are_refused(tmp_path, item_idx, error):
    pq.write_table(pa.table([item_idx, [[5], [6]]], schema=schema.ITEM_USERS), tmp_path / "item_users.parquet")
    with pytest.raises(ValueError, match=error):
        schema.map_item_users(tmp_path, 2)
    assert not (tmp_path / ".item_users.user_idxs").exists()


def test_processes_that_map_at_once_get_the_same_table(tmp_path):
    pq.write_table(pa.table([[2, 1], [[9], [7, 8]]], schema=schema.ITEM_USERS), tmp_path / "item_users.parquet")
    with ThreadPoolExecutor(8) as threads:
        tables = list(threads.map(lambda _: rows(schema.map_item_users(tmp_path, 2)), range(8)))
    assert tables == [[[], [7, 8], [9]]] * 8
    written = sorted(file.name for file in (tmp_path / ".item_users.user_idxs").iterdir())
    assert written == ["checksums.json", "offsets.npy", "values.npy"]


def cut(file):
    file.write_bytes(file.read_bytes()[:-3])


def flip(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 4
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("values.npy", flip),
        ("values.npy", cut),
        ("offsets.npy", flip),
        ("checksums.json", flip),
        ("checksums.json", lambda file: file.unlink()),  # as of a version that wrote none
        ("values.npy", lambda file: file.unlink()),
    ],
)
def test_mapped_tables_that_are_damaged_are_derived_anew(tmp_path, name, damage):
    pq.write_table(pa.table([[2, 1], [[9], [7, 8]]], schema=schema.ITEM_USERS), tmp_path / "item_users.parquet")
    schema.map_item_users(tmp_path, 2)
    killed = tmp_path / f".item_users.user_idxs.{os.uname().nodename}.abcd"  # while it wrote
    killed.mkdir()
    (killed / "values.npy").write_bytes(b"half")
    damage(tmp_path / ".item_users.user_idxs" / name)
    assert rows(schema.map_item_users(tmp_path, 2)) == [[], [7, 8], [9]]
    names = {".item_users.user_idxs", ".item_users.user_idxs.lock", "item_users.parquet"}
    assert {file.name for file in tmp_path.iterdir()} == names


def test_a_mapped_table_without_room_is_one_message(tmp_path, largest_file):
    table = pa.table([[1], [list(range(20_000))]], schema=schema.ITEM_USERS)
    pq.write_table(table, tmp_path / "item_users.parquet")
    largest_file(100_000)
    with pytest.raises(ValueError, match=r"user_idxs\..*/values.npy cannot be written: File too large; make room, or"):
        schema.map_item_users(tmp_path, 1)
    assert {file.name for file in tmp_path.iterdir()} == {".item_users.user_idxs.lock", "item_users.parquet"}


def test_a_mapped_table_on_a_full_disk_does_not_end_the_process(small_disk):
    """What is written to a mapped file that has no room is a SIGBUS, not an error."""
    table = pa.table([[1], [[7] * 20_000]], schema=schema.ITEM_USERS)
    pq.write_table(table, small_disk / "item_users.parquet")
    code = f"from pathlib import Path; from contract import schema; schema.map_item_users(Path({str(small_disk)!r}), 1)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1, done
    assert re.search(
        r"ValueError: .*/values.npy cannot be written: No space left on device; [\d,]+ bytes are free in", done.stderr
    )
    assert {file.name for file in small_disk.iterdir()} == {".item_users.user_idxs.lock", "item_users.parquet"}


def test_interactions_are_those_of_the_split_without_repeats(tmp_path):
    (tmp_path / "interactions").mkdir()
    columns = [[2, 1, 2, 1, 1], [5, 9, 5, 4, 7], [0, 1, 2, 3, 4], [1] * 5, [0, 0, 0, 0, 1]]
    pq.write_table(pa.table(columns, schema=schema.INTERACTIONS), tmp_path / "interactions" / "part.parquet")
    user_idx, item_idx = schema.read_interactions(tmp_path, schema.TRAIN)
    assert list(zip(user_idx.tolist(), item_idx.tolist(), strict=True)) == [(1, 4), (1, 9), (2, 5)]
    assert np.concatenate(schema.read_interactions(tmp_path, schema.VALID)).tolist() == [1, 7]
