"""The files of corpus/: dense ids, Parquet tables and WebDataset shards, the same bytes for the same input.

Users are numbered in the order of their blocks, which is that of a keyed hash, so a run of numbers is a random sample
of them: shard s holds the s-th run. The task of a shard writes all there is of its users.
"""

import functools
import io
import itertools
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyspark.sql import DataFrame, SparkSession, Window
from pyspark.sql import functions as F

from contract import schema
from contract.settings import Etl
from etl.blocks import Block, Source, item_key, read_block, write_quarantine
from etl.split import Settled, check_no_leak, mixed
from etl.tasks import remove_folder, run_tasks, unique_name

BUCKET_BITS = 10  # a billion ids: a million in a bucket, which one task sorts
ROWS_PER_FILE = 1 << 20
ROWS_PER_GROUP = 1 << 16  # of a Parquet file
PAIRS_PER_FILE = 1 << 21  # of an item and a user: what a task sorts at a time
MS_PER_DAY = 86_400_000
# interactions/ with the place of the event among its user's, which decides between equal times
INTERACTIONS = schema.INTERACTIONS.append(pa.field("position", pa.int32()))
CATALOG = pa.schema(
    [("number", pa.int32()), ("item_key", pa.int64()), ("item_id", pa.string()), ("listed", pa.bool_())]
)
_PAIRS = pa.schema([("item_idx", pa.int32()), ("drawn", pa.int64()), ("user_idx", pa.int64())])
# Of an item with many users so many times max_users_per_item are drawn, so that hardly ever too few are.
OVERDRAW = 1.25


# --- items ---


def texts(catalog: DataFrame) -> DataFrame:
    """Good item rows -> item_id, text: of several rows of an item the last one in the input order."""
    last = F.max_by("text", "order").alias("text")
    return catalog.where(F.col("reason").isNull()).groupBy("item_id").agg(last)


def number_catalog(occurring: DataFrame, texts: DataFrame, seed: int, folder: Path) -> DataFrame:
    """Writes CATALOG: every item_id that occurs in the log or has a text, numbered 0.. in the order of its keyed hash.

    Raises:
        ValueError: two ids have the same hash.
    """
    ids = occurring.select("item_id", F.lit(False).alias("listed")).unionByName(
        texts.select("item_id", F.lit(True).alias("listed"))
    )
    ids = ids.groupBy("item_id").agg(F.max("listed").alias("listed")).withColumn("item_key", item_key(seed))
    numbered, num_items = with_dense_index(ids, "item_id", seed, "number")
    numbered = numbered.withColumn("number", (F.col("number") - 1).cast("int"))
    catalog = write_parquet(numbered, CATALOG, num_items, num_items, folder)
    if catalog.select(F.count_distinct("item_key")).first()[0] != num_items:
        raise ValueError(f"two item ids have the same 64-bit hash under seed = {seed}; choose another seed")
    return catalog


def dense_items(catalog: DataFrame, statistics: DataFrame, whole: bool, seed: int) -> tuple[DataFrame, int]:
    """Numbers 1..I the items with an event left, if `whole` also those that only have a text.

    Returns (number, item_idx, item_id, num (events), num_train, num_train_users, first_ts; I).

    Args:
        catalog: of `number_catalog`.
        statistics: of `split.read_statistics`.
    """
    left = catalog.join(statistics.withColumnRenamed("item", "number"), "number", "left")
    left = left.where(F.col("num").isNotNull() | (F.col("listed") if whole else F.lit(False)))
    left = left.fillna({"num": 0, "num_train": 0, "num_train_users": 0, "first_ts": schema.NO_TIME})
    return with_dense_index(left.drop("listed", "item_key"), "item_id", seed, "item_idx")


def with_dense_index(ids: DataFrame, key: str, seed: int, index: str) -> tuple[DataFrame, int]:
    """Numbers the rows, whose keys differ, 1..N in the order of (xxhash64(seed, key), key): a keyed permutation.

    Returns (ids with `index` long added, N). Neither the order of the input nor its partitions have any influence.
    The hash, unsigned, is sorted bucket by bucket, and a bucket's offset follows from the counts of the ones before,
    so no task sees all ids.
    """
    hash_ = F.xxhash64(F.lit(seed).cast("long"), F.col(key))
    bucket = F.shiftrightunsigned("_hash", 64 - BUCKET_BITS).cast("int")
    hashed = ids.withColumn("_hash", hash_).withColumn("_bucket", bucket)
    sizes = np.zeros(1 << BUCKET_BITS, np.int64)
    for row in hashed.groupBy("_bucket").agg(F.count(F.lit(1)).alias("num")).collect():
        sizes[row["_bucket"]] = row.num
    offsets = F.lit([int(offset) for offset in np.cumsum(sizes) - sizes])
    rank = F.row_number().over(Window.partitionBy("_bucket").orderBy("_hash", key))
    numbered = hashed.withColumn("_rank", rank)
    dense = F.element_at(offsets, F.col("_bucket") + 1) + F.col("_rank")
    return numbered.withColumn(index, dense.cast("long")).select(*ids.columns, index), int(sizes.sum())


def write_item_users(spark: SparkSession, pairs: list[Path], num_items: int, max_users: int, folder: Path) -> None:
    """Writes schema.ITEM_USERS from the files that shards left: of an item the max_users that were drawn first."""
    rows = spark.read.schema("item_idx int, drawn long, user_idx long").parquet(*map(str, pairs))
    num_files = 1 + num_items * max_users // PAIRS_PER_FILE
    part = F.floor((F.col("item_idx") - 1) * num_files / num_items).cast("int")
    write = functools.partial(_user_lists, max_users=max_users)
    folder.mkdir()
    rows = rows.select(part.alias("part"), *_PAIRS.names)
    _write_files(rows, [], _PAIRS, num_files, write, folder, "part-{:05d}.parquet")


def _user_lists(batches: Iterator[pa.RecordBatch], columns: pa.Schema, path: Path, max_users: int) -> None:
    """Pairs of a part, in any order -> a Parquet file of one row per item. Sorted here: a part is small."""
    table = pa.Table.from_batches(batches).combine_chunks()
    item, drawn, user = (table[name].to_numpy() for name in columns.names)
    order = np.lexsort((user, drawn, item))
    item, user = item[order], user[order]
    starts = np.flatnonzero(np.concatenate([[True], item[1:] != item[:-1]]))
    sizes = np.diff(starts, append=len(item))
    first = np.arange(len(item)) - np.repeat(starts, sizes) < max_users
    sizes, user = np.minimum(sizes, max_users), user[first]
    row = np.repeat(np.arange(len(sizes)), sizes)
    lists = pa.ListArray.from_arrays(_offsets(sizes), pa.array(user[np.lexsort((user, row))]))
    pq.write_table(
        pa.table([pa.array(item[starts]), lists], schema=schema.ITEM_USERS), path, row_group_size=ROWS_PER_GROUP
    )


# --- users, and what they did ---


@dataclass(frozen=True)
class Shard:
    """The task that writes users first_user .. last_user - 1 (1 is the first of all)."""

    number: int
    first_user: int
    pieces: list[tuple[str, int, int]]  # (block, its users first..last - 1)


class File(NamedTuple):
    """A file of a shard: the name it was written under, what it is to be called."""

    written: str
    name: str
    num_rows: int
    num_values: int  # of a shard the events of its users


@dataclass(frozen=True)
class Written:
    """What the task of a shard wrote and counted."""

    files: dict[str, File]  # by split, "users" and "interactions"
    pairs: str  # Parquet file of _PAIRS
    num_by_split: list[int]  # events, by split code
    num_cold_users: int  # with held-out events and no train event
    num_learned_users: int  # with two train events or more: one is predicted from the others
    num_by_length: np.ndarray  # int64 (64,): users with 2^b .. 2^(b+1) - 1 events
    num_by_type: np.ndarray  # int64 (128,): events, by code
    activity: dict[int, list[int]]  # day since 1970 -> events, by split
    spans: dict[int, tuple[int, int]]  # split code -> (the first ts, the last ts) of its events


def plan_shards(blocks: list[Settled], num_shards: int) -> list[Shard]:
    """Deals all users to shards in runs, so that shards differ by one user at most; fewer users make fewer shards."""
    offsets = np.cumsum([0, *(block.num_users for block in blocks)])
    num_users = int(offsets[-1])
    num_shards = min(num_shards, num_users)
    shards = []
    for number in range(num_shards):
        first, last = number * num_users // num_shards, (number + 1) * num_users // num_shards
        pieces = []
        for index in range(np.searchsorted(offsets, first, "right") - 1, np.searchsorted(offsets, last, "left")):
            begin = int(offsets[index])
            pieces.append((blocks[index].name, max(first - begin, 0), min(last - begin, blocks[index].num_users)))
        shards.append(Shard(number, first + 1, pieces))
    return shards


def write_shards(
    spark: SparkSession, shards: list[Shard], items: Path, etl: Etl, seed: int, dated: bool, stage: Path, folder: Path
) -> list[Written]:
    """Writes users.parquet, interactions/ and the WebDataset shards into `folder`, and pairs for the item users.

    `items` is a Parquet folder of number (of the catalog), item_idx, num_train_users. `dated`: times are dates.
    """
    task = functools.partial(_write_shard, items=items, etl=etl, seed=seed, dated=dated, stage=stage)
    written = run_tasks(spark, task, shards)
    for table in ("users.parquet", "interactions"):
        (folder / table).mkdir()
    for shard in written:
        for file in shard.files.values():
            (stage / file.written).rename(folder / file.name)
    return written


def _write_shard(shard: Shard, items: Path, etl: Etl, seed: int, dated: bool, stage: Path) -> Written:
    mapping = pq.read_table(items, columns=["number", "item_idx", "num_train_users"]).sort_by("number")
    mapping = [mapping[name].to_numpy() for name in mapping.column_names]
    writers = {
        "users": _ParquetFile(stage, f"users.parquet/part-{shard.number:05d}.parquet", schema.USERS),
        "interactions": _ParquetFile(stage, f"interactions/part-{shard.number:05d}.parquet", INTERACTIONS),
        **{name: _ShardFile(stage, f"{name}-{shard.number:05d}.tar") for name in schema.SPLITS},
    }
    pairs = _ParquetFile(stage, "", _PAIRS)
    num_by_split, num_by_length, num_by_type = np.zeros(4, np.int64), np.zeros(64, np.int64), np.zeros(128, np.int64)
    activity, spans, num_cold_users, num_learned_users = {}, {}, 0, 0
    first_user = shard.first_user
    for name, first, last in shard.pieces:
        block = read_block(stage, name).slice(first, last)
        user_idx = np.arange(first_user, first_user + len(block.num_events))
        first_user += len(user_idx)
        place = np.searchsorted(mapping[0], block.item)
        item_idx, num_train_users = (values[place][block.code] for values in mapping[1:])
        writers["users"].write(user_idx=user_idx, user_id=block.user_id)
        writers["interactions"].write(
            user_idx=user_idx[block.row],
            item_idx=item_idx,
            ts=block.ts,
            event=block.event,
            split=block.split,
            position=np.arange(1, len(block.code) + 1) - np.repeat(block.starts, block.num_events),
        )
        for code, split in enumerate(schema.SPLITS):
            writers[split].write(sequences(block, user_idx, item_idx, code, etl.valid_in_history))
        pairs.write(**_drawn_pairs(block, user_idx, item_idx, num_train_users, etl.max_users_per_item, seed))
        num_by_split += np.bincount(block.split, minlength=4)
        num_by_length += np.bincount(np.log2(block.num_events).astype(int), minlength=64)
        num_by_type += np.bincount(block.event, minlength=128)
        held_out = block.per_user((block.split == schema.VALID) | (block.split == schema.TEST)) > 0
        num_train = block.per_user(block.split == schema.TRAIN)
        num_cold_users += int((held_out & (num_train == 0)).sum())
        num_learned_users += int((num_train > 1).sum())
        known = block.ts != schema.NO_TIME
        for code in np.unique(block.split[known]).tolist():
            ts = block.ts[known & (block.split == code)]
            low, high = spans.get(code, (ts[0], ts[0]))
            spans[code] = (int(min(low, ts.min())), int(max(high, ts.max())))
            if dated:
                for day, num in zip(*np.unique(ts // MS_PER_DAY, return_counts=True), strict=True):
                    activity.setdefault(int(day), [0, 0, 0, 0])[code] += int(num)
    files = {name: file for name, writer in writers.items() if (file := writer.close())}
    for code, split in enumerate(schema.SPLITS):
        if code != schema.TRAIN and split in files:
            check_no_leak(read_sequences(stage / files[split].written), etl, code)
    return Written(
        files,
        pairs.close().written,
        num_by_split.tolist(),
        num_cold_users,
        num_learned_users,
        num_by_length,
        num_by_type,
        activity,
        spans,
    )


def sequences(block: Block, user_idx: np.ndarray, item_idx: np.ndarray, part: int, valid_in_history: bool) -> pa.Table:
    """The rows of schema.SEQUENCES for the shards of a split: one per user that has events of the split.

    Train: the train events, all of them targets. Valid and test: the history in time order, then the targets; the
    history of test has the valid events if valid_in_history.

    Args:
        user_idx: int64 (U,) of the block's users.
        item_idx: int32 (N,) of its events.
    """
    is_target = block.split == part
    shown = is_target.copy()
    if part != schema.TRAIN:
        shown |= (block.split == schema.TRAIN) | (block.split == schema.CONTEXT)
    if part == schema.TEST and valid_in_history:
        shown |= block.split == schema.VALID
    users = block.per_user(is_target) > 0
    events = np.flatnonzero(shown & np.repeat(users, block.num_events))
    targets_last = block.row[events].astype(np.int64) * 2 + is_target[events]
    if (np.diff(targets_last) < 0).any():
        events = events[np.argsort(targets_last, kind="stable")]
    offsets = _offsets(block.per_user(shown)[users])
    columns = (pa.array(values[events]) for values in (item_idx, block.ts, block.event, is_target))
    lists = [pa.ListArray.from_arrays(offsets, column) for column in columns]
    return pa.table([pa.array(user_idx[users]), *lists], schema=schema.SEQUENCES)


def _drawn_pairs(block: Block, user_idx, item_idx, num_users, max_users: int, seed: int) -> dict[str, np.ndarray]:
    """Train events, one of a user and item, with a hash by which an item's users are drawn; most of the hopeless are
    left out where an item has many. `num_users` int64 (N,): train users of the item of every event."""
    rows = np.flatnonzero(block.split == schema.TRAIN)
    pair = block.row[rows].astype(np.int64) * len(block.item) + block.code[rows]
    if len(np.unique(pair)) < len(rows):
        rows = rows[np.unique(pair, return_index=True)[1]]
    user, item = user_idx[block.row[rows]], item_idx[rows]
    drawn = (mixed(seed, item, user) >> np.uint64(1)).astype(np.int64)
    share = np.minimum(OVERDRAW * max_users / num_users[rows], 1)
    lucky = (drawn * 2.0**-63 < share) | (num_users[rows] <= max_users)
    return {"item_idx": item[lucky], "drawn": drawn[lucky], "user_idx": user[lucky]}


def _offsets(sizes: np.ndarray) -> pa.Array:
    return pa.array(np.concatenate([[0], np.cumsum(sizes)]), pa.int32())


class _ParquetFile:
    """A Parquet file that grows by arrays; `close` tells what it is."""

    def __init__(self, stage: Path, name: str, columns: pa.Schema):
        self.written, self.name, self.columns, self.num_rows = unique_name(), name, columns, 0
        self.file = pq.ParquetWriter(stage / self.written, columns)

    def write(self, **arrays) -> None:
        columns = [pa.array(arrays[f.name], f.type) for f in self.columns]
        self.num_rows += len(columns[0])
        self.file.write_table(pa.table(columns, schema=self.columns), ROWS_PER_GROUP)

    def close(self) -> File:
        self.file.close()
        return File(self.written, self.name, self.num_rows, 0)


class _ShardFile:
    """A WebDataset shard: members 000000.arrow .. are Arrow streams of schema.SEQUENCES of at most so many users."""

    def __init__(self, stage: Path, name: str):
        self.written, self.name, self.path = unique_name(), name, stage
        self.tar: tarfile.TarFile | None = None
        self.waiting = schema.SEQUENCES.empty_table()
        self.num_members = self.num_users = self.num_events = 0

    def write(self, sequences: pa.Table) -> None:
        table = pa.concat_tables([self.waiting, sequences])
        whole = table.num_rows - table.num_rows % schema.USERS_PER_MEMBER
        for begin in range(0, whole, schema.USERS_PER_MEMBER):
            self._add(table.slice(begin, schema.USERS_PER_MEMBER))
        self.waiting = table.slice(whole)

    def close(self) -> File | None:
        """None when there are no users."""
        if self.waiting.num_rows:
            self._add(self.waiting)
        if not self.tar:
            return None
        self.tar.close()
        return File(self.written, self.name, self.num_users, self.num_events)

    def _add(self, table: pa.Table) -> None:
        if not self.tar:
            self.tar = tarfile.open(self.path / self.written, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        content = _arrow_stream(table)
        member = tarfile.TarInfo(f"{self.num_members:06d}.arrow")  # its time is 0
        member.size = len(content)
        self.tar.addfile(member, io.BytesIO(content))
        self.num_members += 1
        self.num_users += table.num_rows
        self.num_events += len(table["item_idx"].combine_chunks().flatten())


def _arrow_stream(table: pa.Table) -> bytes:
    stream = io.BytesIO()
    with pa.ipc.new_stream(stream, table.schema) as writer:
        for batch in table.combine_chunks().to_batches():
            writer.write_batch(batch)
    return stream.getvalue()


def read_sequences(shard: Path) -> pa.Table:
    """All rows of a WebDataset shard."""
    with tarfile.open(shard) as tar:
        tables = [pa.ipc.open_stream(tar.extractfile(member)).read_all() for member in tar]
    return pa.concat_tables(tables).combine_chunks()


# --- files ---


def write_parquet(table: DataFrame, columns: pa.Schema, num_rows: int, num_keys: int, folder: Path) -> DataFrame:
    """Writes part-00000.parquet .. with these columns into the folder; returns the table read back from them.

    The first column is an index, of num_keys values at most; files and rows are sorted by it. About num_rows rows are
    expected. pyarrow writes, because Spark's own files differ from one JVM to the next.
    """
    key, num_files = columns.names[0], 1 + num_rows // ROWS_PER_FILE
    part = F.floor(F.greatest(F.col(key) - 1, F.lit(0)) * num_files / num_keys).cast("int")
    folder.mkdir()
    rows = table.select(part.alias("part"), *columns.names)
    _write_files(rows, [key], columns, num_files, _parquet, folder, "part-{:05d}.parquet")
    return table.sparkSession.read.parquet(str(folder))


def quarantine_catalog(catalog: DataFrame, source: Source, folder: Path, stage: Path) -> None:
    """Writes the catalog's rows that have a reason as one file; etl.max_bad_share has seen to it that they are few."""
    bad = catalog.where(F.col("reason").isNotNull()).select("order", "reason", "raw").orderBy("order").coalesce(1)

    names = source.names

    def write(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        yield pa.RecordBatch.from_pydict({"file": [write_quarantine(batches, names, stage)]})

    keep_quarantine([row.file for row in bad.mapInArrow(write, "file string").collect()], folder, stage)


def keep_quarantine(files: list[str], folder: Path, stage: Path) -> None:
    """Gives the files that tasks wrote their names, part-00000.json .."""
    folder.mkdir(parents=True)
    for number, file in enumerate(files):
        (stage / file).rename(folder / f"part-{number:05d}.json")


Writer = Callable[[Iterator[pa.RecordBatch], pa.Schema, Path], None]


def _write_files(
    rows: DataFrame, order: list[str], columns: pa.Schema, num_files: int, write: Writer, folder: Path, name: str
) -> None:
    """Writes the rows of each `part` (int column, 0..num_files - 1), sorted by `order` if any, into a file of its own.

    `write(batches, columns, path)` runs in the task of a part. Files are named by the parts that have rows, 0, 1, ..
    """
    stage = folder / f"_{unique_name()}"
    stage.mkdir()

    def write_part(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        first = next(batches, None)
        if first is None:
            return
        temporary = unique_name()
        write((batch.select(columns.names) for batch in itertools.chain([first], batches)), columns, stage / temporary)
        parts = {"part": pa.array([first["part"][0].as_py()], pa.int32()), "file": [temporary]}
        yield pa.RecordBatch.from_pydict(parts)

    rows = rows.repartitionById(num_files, "part")
    rows = rows.sortWithinPartitions(*order) if order else rows
    parts = rows.mapInArrow(write_part, "part int, file string").collect()
    for number, part in enumerate(sorted(parts, key=lambda row: row.part)):
        (stage / part.file).rename(folder / name.format(number))
    remove_folder(stage)


def _parquet(batches: Iterator[pa.RecordBatch], columns: pa.Schema, path: Path) -> None:
    with pq.ParquetWriter(path, columns) as file:
        for table in _regroup(batches, ROWS_PER_GROUP, columns):
            file.write_table(table)


def _regroup(batches: Iterator[pa.RecordBatch], num_rows: int, columns: pa.Schema) -> Iterator[pa.Table]:
    """The same rows in tables of num_rows, the last one shorter, of exactly these columns and types."""
    waiting: list[pa.RecordBatch] = []
    num_waiting = 0
    for batch in batches:
        waiting.append(batch)
        num_waiting += batch.num_rows
        while num_waiting >= num_rows:
            table = pa.Table.from_batches(waiting)
            yield table.slice(0, num_rows).cast(columns)
            waiting = table.slice(num_rows).to_batches()
            num_waiting -= num_rows
    if num_waiting:
        yield pa.Table.from_batches(waiting).cast(columns)
