"""The log, once shuffled: blocks of whole users with their events in time order, as arrays on the shared file system.

This is the one shuffle of the log. Spark reads, checks, hashes and sorts it; from then on a user's events are
neighbours in a block, and what is done to a user (duplicates, repeats, k-core, split, shards) is array code on a block.
"""

import functools
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from contract import schema
from contract.settings import Etl
from etl.readers import file_names, input_bytes
from etl.tasks import read_arrow, unique_name, write_arrow

# A block has so many rows of the log, and those of one more user: what a task holds at a time.
ROWS_PER_BLOCK = 1 << 21
# Of the input as plain text (`readers.input_bytes`), for a task of the shuffle: about as many rows as a block.
BYTES_PER_PART = 256 << 20
MIN_PARTS = 4

_GATHERED = "part int, number int, block string, quarantine string, counts string, first_ts long, last_ts long"


@dataclass(frozen=True)
class Block:
    """U users, in the order of (user_key, user_id), and their N events, in time order within a user."""

    user_id: pa.Array  # string (U,)
    user_key: np.ndarray  # int64 (U,): keyed hash of user_id
    num_events: np.ndarray  # int64 (U,), none is 0
    item: np.ndarray  # int32, ascending: the catalog numbers of the items of the block
    code: np.ndarray  # int32 (N,): position in `item`
    ts: np.ndarray  # int64 (N,)
    event: np.ndarray  # int8 (N,)
    split: np.ndarray  # int8 (N,)

    @functools.cached_property
    def starts(self) -> np.ndarray:
        """int64 (U,): the first event of every user."""
        return np.cumsum(self.num_events) - self.num_events

    @functools.cached_property
    def row(self) -> np.ndarray:
        """int32 (N,): the user of every event."""
        return np.repeat(np.arange(len(self.num_events), dtype=np.int32), self.num_events)

    def per_user(self, mask: np.ndarray) -> np.ndarray:
        """int64 (U,): how many of a user's events are in the mask."""
        before = np.concatenate([[0], np.cumsum(mask)])
        return before[self.starts + self.num_events] - before[self.starts]

    def select(self, keep: np.ndarray) -> "Block":
        """The block of these events, bool (N,), without users and items that have none of them."""
        if keep.all():
            return self
        num_events = self.per_user(keep)
        users, code = num_events > 0, self.code[keep]
        used = np.bincount(code, minlength=len(self.item)) > 0
        return Block(
            self.user_id.filter(pa.array(users)),
            self.user_key[users],
            num_events[users],
            self.item[used],
            (np.cumsum(used) - 1).astype(np.int32)[code],
            self.ts[keep],
            self.event[keep],
            self.split[keep],
        )

    def slice(self, first: int, last: int) -> "Block":
        """The users first..last - 1; its items stay."""
        events = slice(*(int(self.num_events[:user].sum()) for user in (first, last)))
        return Block(
            self.user_id.slice(first, last - first),
            self.user_key[first:last],
            self.num_events[first:last],
            self.item,
            *(values[events] for values in (self.code, self.ts, self.event, self.split)),
        )


def write_block(block: Block, folder: Path) -> str:
    """Writes the block under a new name and returns the name."""
    name = unique_name()
    write_arrow(folder / f"{name}.users", user_id=block.user_id, user_key=block.user_key, num_events=block.num_events)
    write_arrow(folder / f"{name}.items", item=block.item)
    write_arrow(folder / f"{name}.events", code=block.code, ts=block.ts, event=block.event, split=block.split)
    return name


def read_block(folder: Path, name: str) -> Block:
    columns = {}
    for part in ("users", "items", "events"):
        columns |= read_arrow(folder / f"{name}.{part}")
    user_id = columns.pop("user_id")
    return Block(user_id, **{key: values.to_numpy() for key, values in columns.items()})


@dataclass(frozen=True)
class Gathered:
    """What `gather` wrote and counted."""

    blocks: list[str]  # names, in the order of their users
    quarantine: list[str]  # names of the files of bad rows
    counts: Counter
    span: tuple[int, int]  # ts of the first and last event that counts


@dataclass(frozen=True)
class Source:
    """The files of a log, in the order of their rows; `granule` is the unit of their `order`, see etl.readers."""

    files: list[Path]
    granule: int

    @property
    def num_parts(self) -> int:
        """Tasks of the shuffle, by the size of the input alone: the same log gives the same blocks on any cluster."""
        return max(MIN_PARTS, -(-input_bytes(self.files) // BYTES_PER_PART))

    @property
    def names(self) -> Callable[[int], str]:
        """From a row's order to the name of its file."""
        return file_names(self.files, self.granule)


def gather(
    log: DataFrame, source: Source, types: list[str], etl: Etl, seed: int, catalog: Path, stage: Path
) -> Gathered:
    """Shuffles the log by user and writes blocks of what counts of it, and the bad rows, into `stage`.

    Args:
        log: the table of `etl.readers`.
        types: event types to be kept, weakest first; types that are not listed stay only if etl.events is empty.
        catalog: Parquet folder with the item_key of every item; in unsigned order their places are the numbers.

    Raises:
        ValueError: no event counts.
    """
    code = F.coalesce(F.array_position(F.array(*map(F.lit, types)), F.col("event")), F.lit(0)) if types else F.lit(0)
    good = F.col("reason").isNull()
    # Users are spread by a keyed hash, so that neither the input's order nor the ids decide who is with whom.
    hashed = F.shiftrightunsigned(F.xxhash64(F.lit(seed).cast("long"), F.col("user_id")), 1)
    key, parts = F.when(good, hashed), source.num_parts
    part = F.when(good, F.shiftright(F.shiftright(hashed, 32) * parts, 31)).otherwise(F.shiftright("order", 33) % parts)
    rows = log.select(
        part.cast("int").alias("part"),
        key.alias("user_key"),
        F.when(good, F.col("user_id")).alias("user_id"),
        item_key(seed).alias("item_key"),
        F.when(good, F.coalesce("ts", F.lit(schema.NO_TIME))).alias("ts"),
        code.cast("byte").alias("event"),
        F.coalesce("split", F.lit(schema.TRAIN).cast("byte")).alias("split"),
        "order",
        "reason",
        "raw",
    )
    if etl.events:
        rows = rows.where(~good | (F.col("event") > 0))
    # Latest first, so that a limit per user is the head of a stream. A split that the input gives goes before the
    # time: its parts may have none.
    place = F.when(good, -F.col("order")).otherwise(F.col("order"))
    latest_first = [F.col("split").desc(), F.col("ts").desc(), place]
    task = functools.partial(_gather_part, etl=etl, catalog=catalog, names=source.names, stage=stage)
    written = (
        rows.repartitionById(parts, "part")
        .sortWithinPartitions(F.col("user_key").asc_nulls_first(), "user_id", *latest_first)
        .mapInArrow(task, _GATHERED)
        .collect()
    )
    written.sort(key=lambda row: (row.part, row.number))
    blocks = [row for row in written if row.block]
    if not blocks:
        raise ValueError("no event is left of the log: all rows are bad, of other types than etl.events, or of bots")
    return Gathered(
        [row.block for row in blocks],
        [row.quarantine for row in written if row.quarantine],
        sum((Counter(json.loads(row.counts)) for row in written), Counter()),
        (min(row.first_ts for row in blocks), max(row.last_ts for row in blocks)),
    )


def item_key(seed: int):
    """The keyed hash that stands for item_id in the shuffle: int64, equal for equal ids."""
    return F.xxhash64(F.lit(seed).cast("long"), F.col("item_id"))


def _gather_part(
    batches: Iterator[pa.RecordBatch], etl: Etl, catalog: Path, names: Callable[[int], str], stage: Path
) -> Iterator[pa.RecordBatch]:
    """The task of a part: its blocks, and a file of its bad rows, which come first."""
    stream = _Stream(batches)
    quarantine = write_quarantine(stream.bad_rows(), names, stage)
    keys = np.sort(pq.read_table(catalog, columns=["item_key"])["item_key"].to_numpy().view(np.uint64))
    number = 0
    for table, counts in whole_users(stream.good_rows(), etl.max_user_events, ROWS_PER_BLOCK):
        block, kept = clean_users(table, keys, etl.repeats)
        name = write_block(block, stage)
        counts = json.dumps(counts | kept)
        yield _result(stream.part, number, name, None, counts, int(block.ts.min()), int(block.ts.max()))
        number += 1
    if quarantine:
        yield _result(stream.part, number, None, quarantine, "{}", None, None)


def _result(*values) -> pa.RecordBatch:
    types = [pa.int32(), pa.int32(), pa.string(), pa.string(), pa.string(), pa.int64(), pa.int64()]
    names = [field.split()[0] for field in _GATHERED.split(", ")]
    return pa.RecordBatch.from_arrays([pa.array([v], t) for v, t in zip(values, types, strict=True)], names)


@dataclass
class _Stream:
    """The batches of a part: first the bad rows, then the good ones."""

    batches: Iterator[pa.RecordBatch]
    part: int = -1
    _waiting: list[pa.RecordBatch] = field(default_factory=list)

    def bad_rows(self) -> Iterator[pa.RecordBatch]:
        for batch in self.batches:
            self.part = batch["part"][0].as_py()
            num_bad = batch.num_rows - batch["reason"].null_count
            if num_bad:
                yield batch.slice(0, num_bad)
            if num_bad < batch.num_rows:
                self._waiting.append(batch.slice(num_bad))
                return

    def good_rows(self) -> Iterator[pa.RecordBatch]:
        yield from self._waiting
        yield from self.batches


def write_quarantine(batches: Iterator[pa.RecordBatch], names: Callable[[int], str], stage: Path) -> str | None:
    """Rows of order, reason, raw -> JSON lines {reason, raw, file}; returns the name of the file, None without rows.

    `names` gives the file of the input that a row of this order comes from.
    """
    first = next(batches, None)
    if first is None:
        return None
    name = unique_name()
    with (stage / name).open("w") as file:
        for batch in itertools.chain([first], batches):
            for row in batch.select(["order", "reason", "raw"]).to_pylist():
                order = row.pop("order")
                file.write(json.dumps({**row, "file": names(order)}, ensure_ascii=False) + "\n")
    return name


def whole_users(
    batches: Iterator[pa.RecordBatch], max_rows: int, rows_per_table: int
) -> Iterator[tuple[pa.Table, dict[str, int]]]:
    """Cuts rows sorted by user into tables of whole users; of a user the first max_rows rows.

    Yields (table, {"num_rows", "num_over_limit"}). No more is held than a table and a user's max_rows, however many
    rows a user has.
    """
    waiting: list[pa.RecordBatch] = []
    num_waiting = num_rows = num_over = seen = 0
    last_user = None
    for batch in batches:
        users = batch["user_id"]
        starts = np.flatnonzero(_differs(users))
        rank = np.arange(len(users)) - np.repeat(starts, np.diff(starts, append=len(users)))
        same = users[0].as_py() == last_user
        if same:
            rank[: starts[1] if len(starts) > 1 else None] += seen
        keep = rank < max_rows
        last_user, seen = users[len(users) - 1].as_py(), int(rank[-1]) + 1
        # A user begins in this batch: what came before is whole.
        if num_waiting and not (same and len(starts) == 1):
            cut = int(starts[-1]) if (same or len(starts) > 1) else 0
            if num_waiting + cut >= rows_per_table:
                head = _filtered(batch.slice(0, cut), keep[:cut])
                num_rows, num_over = num_rows + cut, num_over + int((~keep[:cut]).sum())
                yield pa.Table.from_batches([*waiting, head]), {"num_rows": num_rows, "num_over_limit": num_over}
                waiting, num_waiting, num_rows, num_over = [], 0, 0, 0
                batch, keep = batch.slice(cut), keep[cut:]
        num_rows, num_over = num_rows + batch.num_rows, num_over + int((~keep).sum())
        batch = _filtered(batch, keep)
        waiting.append(batch)
        num_waiting += batch.num_rows
    if num_waiting:
        yield pa.Table.from_batches(waiting), {"num_rows": num_rows, "num_over_limit": num_over}


def _filtered(batch: pa.RecordBatch, keep: np.ndarray) -> pa.RecordBatch:
    return batch if keep.all() else batch.filter(pa.array(keep))


def _differs(values: pa.Array) -> np.ndarray:
    """bool (n,): differs from the value before; True at the first."""
    later = pc.not_equal(values[1:], values[:-1]).to_numpy(zero_copy_only=False)
    return np.concatenate([[True], later])


def clean_users(table: pa.Table, keys: np.ndarray, repeats: str) -> tuple[Block, dict[str, int]]:
    """Whole users, sorted by user and each user latest first -> a block without duplicates and repeats.

    Args:
        table: user_id, user_key, item_key, ts, event, split.
        keys: uint64, ascending: the item_key of every item of the catalog.
        repeats: 'first': one event per user and item, the first (of the earliest split); 'collapse': the first of a run
            of events on the same item; 'keep': all.

    Returns:
        (block, {"num_duplicates", "num_in_earlier_split", "num_repeats", "num_events", "num_users"}): exact duplicates
        of (user, item, time, type), events on items of the user's earlier splits, other repeats, what is left.
    """
    table = table.combine_chunks()
    starts = np.flatnonzero(_differs(table["user_id"].chunk(0)))
    num_rows, sizes = table.num_rows, np.diff(starts, append=table.num_rows)
    row = np.repeat(np.arange(len(starts)), sizes)
    turned = np.repeat(2 * starts + sizes - 1, sizes) - np.arange(num_rows)  # earliest first
    ts, event, split = (table[name].to_numpy()[turned] for name in ("ts", "event", "split"))
    item, code = _numbered(table["item_key"], keys)
    code = code[turned]

    # By user and item, each in time order: duplicates and repeats are neighbours.
    order = np.argsort(row * len(item) + code, kind="stable")
    pair = (row * len(item) + code)[order]
    same_pair = np.concatenate([[False], pair[1:] == pair[:-1]])
    duplicate = _duplicates(same_pair, ts[order], event[order], split[order])
    dropped = duplicate.copy()
    num_earlier = 0
    if repeats == "first":
        dropped |= same_pair
        first_split = split[order][~same_pair]
        later_split = split[order] != np.repeat(first_split, np.diff(np.flatnonzero(~same_pair), append=num_rows))
        num_earlier = int((same_pair & ~duplicate & later_split).sum())
    keep = np.ones(num_rows, bool)
    keep[order] = ~dropped
    if repeats == "collapse":
        left = np.flatnonzero(keep)
        again = (row[left][1:] == row[left][:-1]) & (code[left][1:] == code[left][:-1])
        keep[left[1:][again]] = False
    users = table.select(["user_id", "user_key"]).take(pa.array(starts)).combine_chunks()
    block = Block(users["user_id"].chunk(0), users["user_key"].to_numpy(), sizes, item, code, ts, event, split)
    block = block.select(keep)
    num_duplicates, num_events = int(duplicate.sum()), len(block.code)
    return block, {
        "num_duplicates": num_duplicates,
        "num_in_earlier_split": num_earlier,
        "num_repeats": num_rows - num_duplicates - num_earlier - num_events,
        "num_events": num_events,
        "num_users": len(block.num_events),
    }


def _numbered(item_key: pa.ChunkedArray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(item int32, the catalog numbers that occur, ascending; code int32, a position in it per row)."""
    encoded = item_key.chunk(0).dictionary_encode()
    occurring = encoded.dictionary.to_numpy().view(np.uint64)
    number = np.searchsorted(keys, occurring).astype(np.int32)
    assert (keys[number] == occurring).all(), "an item of the log is not in the catalog"
    by_number = np.argsort(number)
    place = np.empty(len(number), np.int32)
    place[by_number] = np.arange(len(number), dtype=np.int32)
    return number[by_number], place[encoded.indices.to_numpy()]


def _duplicates(same_pair: np.ndarray, ts: np.ndarray, event: np.ndarray, split: np.ndarray) -> np.ndarray:
    """bool (n,): rows sorted by (user, item, split, time) that repeat an earlier row of equal time and type."""
    same_time = np.concatenate([[False], (ts[1:] == ts[:-1]) & (split[1:] == split[:-1])]) & same_pair
    duplicate = np.zeros(len(ts), bool)
    # Few rows share the time of the one before; only these runs are sorted by type.
    in_run = same_time | np.concatenate([same_time[1:], [False]])
    rows = np.flatnonzero(in_run)
    if len(rows):
        run = np.cumsum(~same_time)[rows]
        rows = rows[np.lexsort((event[rows], run))]
        run = np.cumsum(~same_time)[rows]
        duplicate[rows[1:]] = (run[1:] == run[:-1]) & (event[rows][1:] == event[rows][:-1])
    return duplicate
