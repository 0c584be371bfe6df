"""Tables of corpus/ and gid/, and the readers that the later rooms share.

Dense ids start at 1; index 0 of every table of embeddings is padding. Dense ids are assigned in the order of
a keyed hash of the raw id, so that neither popularity nor the order of the input can be read from them.
"""

import fcntl
import functools
import glob
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads

from contract import disk
from contract.disk import follow_umask

# Content token ids: the special tokens of T5; the pieces follow.
PAD, EOS, UNK = 0, 1, 2

TRAIN, VALID, TEST = 0, 1, 2
SPLITS = ("train", "valid", "test")
# Of interactions/ only: what is known of a held-out session at evaluation, and is no training data.
CONTEXT = 3

# Time of an event that the input gives none for (given splits often name valid and test pairs only).
NO_TIME = -1
FIRST_MS = 788_918_400_000  # 1995-01-01: no shop's log is older
MS_PER_DAY = 86_400_000

ITEMS = pa.schema(
    [
        ("item_idx", pa.int32()),  # 1..I
        ("item_id", pa.string()),
        ("text", pa.string()),
        ("token_ids", pa.list_(pa.int32())),  # content tokens, without eos, at most etl.max_item_tokens
        ("num_train", pa.int64()),  # train interactions
        ("first_ts", pa.int64()),  # ms; NO_TIME when unknown
    ]
)
USERS = pa.schema([("user_idx", pa.int64()), ("user_id", pa.string())])  # 1..U
INTERACTIONS = pa.schema(
    [
        ("user_idx", pa.int64()),
        ("item_idx", pa.int32()),
        ("ts", pa.int64()),  # ms, or the position when data.time_unit = 'order'
        ("event", pa.int8()),  # 0 unknown, else 1 + position in the manifest's "events"
        ("split", pa.int8()),  # TRAIN, VALID, TEST, CONTEXT
    ]
)
ITEM_USERS = pa.schema([("item_idx", pa.int32()), ("user_idxs", pa.list_(pa.int64()))])  # train split only
# One user in a shard's Arrow batch, events in time order. `is_target` marks what is to be predicted: in train
# shards every event, in valid and test shards those of that split, which come last. What is not a target in a valid
# or test shard is the history there.
SEQUENCES = pa.schema(
    [
        ("user_idx", pa.int64()),
        ("item_idx", pa.list_(pa.int32())),
        ("ts", pa.list_(pa.int64())),
        ("event", pa.list_(pa.int8())),
        ("is_target", pa.list_(pa.bool_())),
    ]
)
GIDS = pa.schema([("item_idx", pa.int32()), ("gid", pa.list_(pa.int16()))])  # l codes in 0..K-1
# The element types of the list columns that are memory-mapped.
MAPPED = {"token_ids": np.int32, "user_idxs": np.int64}
# The files of such a column, and of what they were when they were written.
_PARTS, _FINGERPRINTS = ("values", "offsets"), "checksums.json"
# With the raw ids as well: a later corpus numbers its items anew.
GIDS_OF_ITEMS = GIDS.append(pa.field("item_id", pa.string()))

# A tar member of a shard: an Arrow IPC stream of at most so many users.
USERS_PER_MEMBER = 1024


@dataclass(frozen=True)
class Ragged:
    """Rows of different lengths: row i is values[offsets[i]:offsets[i + 1]]."""

    values: np.ndarray
    offsets: np.ndarray

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def lengths_at(self, index: np.ndarray) -> np.ndarray:
        """The lengths of the rows `index`, of any shape; unlike `lengths` it reads no others of a mapped table."""
        return self.offsets[index + 1] - self.offsets[index]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def row(self, i: int) -> np.ndarray:
        return self.values[self.offsets[i] : self.offsets[i + 1]]

    def take(self, index: np.ndarray) -> "Ragged":
        """The rows `index` (M,), in that order."""
        lengths = self.lengths_at(index)
        begin = np.concatenate([[0], np.cumsum(lengths)])
        source = np.repeat(self.offsets[index] - begin[:-1], lengths) + np.arange(begin[-1])
        return Ragged(self.values[source], begin)


def ragged(column: pa.ListArray | pa.ChunkedArray) -> Ragged:
    """A list column without nulls as a Ragged, without a copy where Arrow allows it."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
        column = column if not isinstance(column, pa.ChunkedArray) else column.chunk(0)
    offsets = column.offsets.to_numpy()
    # flatten() honours a slice; the offsets of a slice do not start at 0
    return Ragged(column.flatten().to_numpy(zero_copy_only=False), offsets - offsets[0])


def read_table(path: Path, schema: pa.Schema, sort_by: str | None = None) -> pa.Table:
    """A Parquet file or folder as a table of exactly this schema. Raises ValueError when it differs."""
    table = pads.dataset(path, format="parquet").to_table()
    missing = [name for name in schema.names if name not in table.column_names]
    if missing:
        raise ValueError(f"{path} lacks the columns {', '.join(missing)}")
    table = table.select(schema.names).cast(schema)
    return table.sort_by(sort_by) if sort_by else table


def with_padding_row(rows: Ragged) -> Ragged:
    """Puts an empty row 0 before rows 1..n, so that a dense id is the row number."""
    return Ragged(rows.values, np.concatenate([[0], rows.offsets]))


@dataclass(frozen=True)
class Items:
    """items.parquet in memory, indexed by item_idx (entry 0 is padding)."""

    item_ids: list[str]
    tokens: Ragged  # int32 content token ids
    num_train: np.ndarray  # int64 (I + 1,)

    @property
    def num_items(self) -> int:
        return len(self.num_train) - 1


def read_items(corpus: Path) -> Items:
    table = read_table(corpus / "items.parquet", ITEMS, sort_by="item_idx")
    _check_dense(table["item_idx"].to_numpy(), corpus / "items.parquet")
    return Items(
        ["", *table["item_id"].to_pylist()],
        with_padding_row(ragged(table["token_ids"])),
        np.concatenate([[0], table["num_train"].to_numpy()]),
    )


def read_num_train(corpus: Path, num_items: int) -> np.ndarray:
    """int64 (I + 1,): train events of an item."""
    table = pads.dataset(corpus / "items.parquet", format="parquet").to_table(["item_idx", "num_train"])
    num_train = np.zeros(num_items + 1, np.int64)
    num_train[table["item_idx"].to_numpy()] = table["num_train"].to_numpy()
    return num_train


def map_tokens(corpus: Path, num_items: int) -> Ragged:
    """Row item_idx: int32 content token ids. Row 0 is empty, and so are those of items without text.

    Memory-mapped: the processes of a node share one copy of it, which the first of them derives from items.parquet,
    piece by piece, into a hidden folder of the corpus. Every process reads it once to compare it with its checksum, one
    to two seconds a GB; one that differs is derived anew.

    Raises:
        ValueError: an item_idx is not in 1..num_items or is there twice, or the corpus folder cannot be written.
    """
    return _mapped(corpus / "items.parquet", "token_ids", num_items)


def map_item_users(corpus: Path, num_items: int) -> Ragged:
    """Row item_idx: int64 user_idx of sampled train users, memory-mapped as in `map_tokens`."""
    return _mapped(corpus / "item_users.parquet", "user_idxs", num_items)


def _mapped(path: Path, column: str, num_items: int) -> Ragged:
    folder = path.with_name(f".{path.stem}.{column}")
    if not _is_whole(folder):
        remedy = "choose a work folder elsewhere with --work=..."
        with disk.writing(folder, remedy), path.with_name(f"{folder.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the other processes wait, then find it written
            if not _is_whole(folder):
                _write_mapped(path, column, num_items, folder)
    # Plain arrays over the mapping: what is looked up in them is not a memmap in its turn.
    return Ragged(*(np.asarray(np.load(folder / f"{part}.npy", mmap_mode="r")) for part in _PARTS))


def _is_whole(folder: Path) -> bool:
    try:
        files = disk.read_record(folder / _FINGERPRINTS, "")
    except (FileNotFoundError, ValueError):
        return False
    return not any(disk.difference(folder / name, expected) for name, expected in files.items())


def _write_mapped(path: Path, column: str, num_items: int, folder: Path) -> None:
    """Two passes over the table, in any order of its rows: lengths give the offsets, then every row has its place."""
    lengths, seen, num_rows = np.zeros(num_items + 1, np.int64), np.zeros(num_items + 1, bool), 0
    for item_idx, rows in _list_batches(path, column):
        if not 1 <= item_idx.min(initial=1) <= item_idx.max(initial=1) <= num_items:
            raise ValueError(f"{path}: item_idx is not within 1..{num_items}; run the stage that wrote it again")
        lengths[item_idx], seen[item_idx] = rows.lengths, True
        num_rows += len(item_idx)
    if num_rows > seen.sum():
        raise ValueError(f"{path}: an item_idx is there twice; run the stage that wrote it again")
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    # Those of this machine that were killed; another one may hold a lock that is not seen here.
    prefix = f"{folder.name}.{os.uname().nodename}."
    for left in path.parent.glob(f"{glob.escape(prefix)}*"):
        disk.remove(left)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=prefix))
    try:
        disk.save_array(temporary / "offsets.npy", offsets)
        values = disk.create_array(temporary / "values.npy", MAPPED[column], (int(offsets[-1]),))
        for item_idx, rows in _list_batches(path, column):
            place = np.repeat(offsets[item_idx] - rows.offsets[:-1], rows.lengths)
            values[place + np.arange(len(rows.values))] = rows.values
        values.flush()
        names = [f"{part}.npy" for part in _PARTS]
        disk.write_record(temporary / _FINGERPRINTS, {name: disk.fingerprint(temporary / name) for name in names})
        follow_umask(temporary)
        disk.remove(folder)  # damaged, or of a version that wrote no checksum
        temporary.rename(folder)
    finally:
        disk.remove(temporary)


def _list_batches(path: Path, column: str) -> Iterator[tuple[np.ndarray, Ragged]]:
    """(item_idx, the rows of a list column), some ten thousand rows at a time."""
    for batch in pads.dataset(path, format="parquet").to_batches(columns=["item_idx", column]):
        yield batch["item_idx"].to_numpy(), ragged(batch[column])


def read_interactions(corpus: Path, split: int, users: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(user_idx int64, item_idx int32) of a split, duplicates removed, sorted by both.

    Args:
        users: user_idx, ascending; only theirs are kept, file by file, so that a large log is never held whole.
    """
    dataset = pads.dataset(corpus / "interactions", format="parquet")
    scanned = dataset.scanner(columns=["user_idx", "item_idx"], filter=pads.field("split") == split)
    if users is None:
        table = scanned.to_table()
    else:
        batches = (batch.filter(pa.array(np.isin(batch["user_idx"], users))) for batch in scanned.to_batches())
        table = pa.Table.from_batches(batches, scanned.projected_schema)
    pairs = (
        table.group_by(["user_idx", "item_idx"])
        .aggregate([])
        .sort_by([("user_idx", "ascending"), ("item_idx", "ascending")])
    )
    return pairs["user_idx"].to_numpy(), pairs["item_idx"].to_numpy()


def read_item_ids(gid: Path) -> list[str]:
    """Raw ids of the items of gids.parquet; entry 0 is padding."""
    table = read_table(gid / "gids.parquet", GIDS_OF_ITEMS, sort_by="item_idx")
    return ["", *table["item_id"].to_pylist()]


def read_gids(gid: Path) -> np.ndarray:
    """int64 (I + 1, l); row 0 is zeros (padding)."""
    table = read_table(gid / "gids.parquet", GIDS, sort_by="item_idx")
    _check_dense(table["item_idx"].to_numpy(), gid / "gids.parquet")
    codes = ragged(table["gid"])
    length = int(codes.lengths[0])
    if (codes.lengths != length).any():
        raise ValueError(f"{gid / 'gids.parquet'} holds GIDs of different lengths; run again: python gid/build.py")
    rows = codes.values.reshape(-1, length).astype(np.int64)
    return np.concatenate([np.zeros((1, length), np.int64), rows])


def _check_dense(idx: np.ndarray, path: Path) -> None:
    if not np.array_equal(idx, np.arange(1, len(idx) + 1)):
        raise ValueError(f"{path}: item_idx is not 1..{len(idx)}, each once; run the stage that wrote it again")
