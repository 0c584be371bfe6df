"""The files of corpus/: dense ids, Parquet tables and WebDataset shards, the same bytes for the same input.

Executors write under names that no other attempt of the task can have; the driver renames only what the job
returned. So a lost executor, a retry or a speculative copy leaves files behind that nobody reads, never two of one.
"""

import functools
import io
import itertools
import shutil
import tarfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as F

from contract import schema

BUCKET_BITS = 10  # a billion ids: a million in a bucket, which one task sorts
ROWS_PER_FILE = 1 << 20
ROWS_PER_GROUP = 1 << 16  # of a Parquet file
# interactions/ with the place of the event among its user's, which decides between equal times
INTERACTIONS = schema.INTERACTIONS.append(pa.field("position", pa.int32()))


def with_dense_index(ids: DataFrame, key: str, seed: int, index: str) -> tuple[DataFrame, int]:
    """Numbers the rows, whose keys differ, 1..N in the order of (xxhash64(seed, key), key): a keyed permutation.

    Returns (ids with `index` long added, N). Neither the order of the input nor its partitions have any influence.
    The hash is sorted bucket by bucket, and a bucket's offset follows from the counts of the ones before, so no task
    sees all ids.
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


def dense_interactions(events: DataFrame, users: DataFrame, items: DataFrame) -> DataFrame:
    """Split events with raw ids -> user_idx long, item_idx int, ts long, event byte, split byte, position int."""
    return (
        events.join(users, "user_id", "inner")
        .join(items.select("item_id", "item_idx"), "item_id", "inner")
        .select(
            "user_idx",
            "item_idx",
            F.coalesce("ts", F.lit(schema.NO_TIME)).cast("long").alias("ts"),
            F.col("event").cast("byte"),
            F.col("split").cast("byte"),
            "position",
        )
    )


def texts(catalog: DataFrame) -> DataFrame:
    """Good item rows -> item_id, text: of several rows of an item the last one in the input order."""
    last = F.max(F.struct("order", "text")).alias("last")
    return catalog.where(F.col("reason").isNull()).groupBy("item_id").agg(last).select("item_id", "last.text")


def item_ids(events: DataFrame, texts: DataFrame, whole_catalog: bool) -> DataFrame:
    """The item_id of every item: those of the events, and with whole_catalog also those that only have a text."""
    occurring = events.select("item_id")
    return (occurring.unionByName(texts.select("item_id")) if whole_catalog else occurring).distinct()


def count_splits(interactions: DataFrame) -> dict[str, int]:
    """num_train, num_valid, num_test (events), num_train_users and num_train_items (with any train event)."""
    in_train = F.col("split") == schema.TRAIN
    counts = interactions.agg(
        *(F.count_if(F.col("split") == code).alias(f"num_{name}") for code, name in enumerate(schema.SPLITS)),
        F.count_distinct(F.when(in_train, F.col("user_idx"))).alias("num_train_users"),
        F.count_distinct(F.when(in_train, F.col("item_idx"))).alias("num_train_items"),
    )
    return counts.first().asDict()


def with_statistics(items: DataFrame, interactions: DataFrame) -> DataFrame:
    """Adds num_train and first_ts (NO_TIME when unknown) of the train split, later events would leak."""
    first_ts = F.min(F.when(F.col("ts") != schema.NO_TIME, F.col("ts"))).alias("first_ts")
    train = interactions.where(F.col("split") == schema.TRAIN)
    statistics = train.groupBy("item_idx").agg(F.count(F.lit(1)).alias("num_train"), first_ts)
    joined = items.join(statistics, "item_idx", "left")
    return joined.fillna({"num_train": 0, "first_ts": schema.NO_TIME})


def item_users(interactions: DataFrame, max_users: int, seed: int) -> DataFrame:
    """item_idx, user_idxs array<long> sorted: a sample, by hash, of at most max_users train users of the item."""
    pairs = interactions.where(F.col("split") == schema.TRAIN).select("item_idx", "user_idx").distinct()
    drawn = F.xxhash64(F.lit(seed).cast("long"), F.col("item_idx"), F.col("user_idx"))
    rank = F.row_number().over(Window.partitionBy("item_idx").orderBy(drawn, "user_idx"))
    sample = pairs.withColumn("rank", rank).where(F.col("rank") <= max_users)
    return sample.groupBy("item_idx").agg(F.sort_array(F.collect_list("user_idx")).alias("user_idxs"))


def write_parquet(table: DataFrame, columns: pa.Schema, num_rows: int, num_keys: int, folder: Path) -> DataFrame:
    """Writes part-00000.parquet .. with these columns into the folder; returns the table read back from them.

    The first column is a dense index, 1..num_keys; files and rows are sorted by it and by position, if there is one.
    About num_rows rows are expected. pyarrow writes, because Spark's own files differ from one JVM to the next.
    """
    key, num_files = columns.names[0], 1 + num_rows // ROWS_PER_FILE
    part = F.floor((F.col(key) - 1) * num_files / num_keys).cast("int")
    order = [key, "position"] if "position" in columns.names else [key]
    folder.mkdir()
    rows = table.select(part.alias("part"), *columns.names)
    _write_files(rows, order, columns, num_files, _parquet, folder, "part-{:05d}.parquet")
    return table.sparkSession.read.parquet(str(folder))


def write_quarantine(rows: DataFrame, folder: Path) -> None:
    """Writes the rows that have a reason as JSON lines {reason, raw, file}, in the order of the input."""
    bad = rows.where(F.col("reason").isNotNull()).orderBy("order")
    file = F.substring_index("order.file", "/", -1).alias("file")
    # One file: etl.max_bad_share has seen to it that they are few.
    bad.select("reason", "raw", file).coalesce(1).write.json(str(folder))
    _rename_parts(folder)


def _rename_parts(folder: Path) -> None:
    """part-00000.<suffix> ..: the random id in Spark's names would change the manifest at every run."""
    for number, part in enumerate(sorted(folder.glob("part-*"))):
        part.rename(folder / f"part-{number:05d}{part.suffix}")
    for other in [*folder.glob(".*.crc"), *folder.glob("_*")]:
        other.unlink()


def histories(interactions: DataFrame) -> DataFrame:
    """user_idx, events array<struct<position, item_idx, ts, event, split>> in the order of the positions."""
    event = F.struct("position", "item_idx", "ts", "event", "split")
    return interactions.groupBy("user_idx").agg(F.sort_array(F.collect_list(event)).alias("events"))


def sequences(histories: DataFrame, split: int, valid_in_history: bool) -> DataFrame:
    """The columns of schema.SEQUENCES for the shards of a split, one row per user that has events of the split.

    Train: the train events, all of them targets. Valid and test: the history, then the targets; the history of test
    has the valid events if valid_in_history.
    """
    hidden = [schema.VALID, schema.TEST] if not valid_in_history else [schema.TEST]
    visible = [split, *(code for code in range(split) if code not in hidden)]
    has_targets = F.exists("events", lambda event: event["split"] == split)
    shown = F.filter("events", lambda event: event["split"].isin(visible))
    users = histories.where(has_targets).select("user_idx", shown.alias("shown"))
    is_target = F.transform("shown.split", lambda code: code == split).alias("is_target")
    return users.select("user_idx", "shown.item_idx", "shown.ts", "shown.event", is_target)


def write_shards(rows: DataFrame, split: str, num_shards: int, seed: int, folder: Path) -> list[dict]:
    """Writes <split>-00000.tar .. with the rows of `sequences`; returns [{file, num_users, num_events}].

    Users are shuffled by the seed and dealt out, so that shards differ by at most one user; fewer users than
    num_shards have a shard each. A tar member is an Arrow IPC stream of schema.SEQUENCES.
    """
    users, num_users = with_dense_index(rows.select("user_idx"), "user_idx", seed, "rank")
    if not num_users:
        return []
    num_shards = min(num_shards, num_users)
    users = users.withColumn("part", ((F.col("rank") - 1) % num_shards).cast("int"))
    rows = rows.join(users, "user_idx", "inner")
    write = functools.partial(_tar, users_per_member=schema.USERS_PER_MEMBER)
    written = _write_files(rows, ["rank"], schema.SEQUENCES, num_shards, write, folder, split + "-{:05d}.tar")
    return [{"file": row.file, "num_users": row.num_rows, "num_events": row.num_values} for row in written]


class Written(NamedTuple):
    file: str
    num_rows: int
    num_values: int  # what the writer counted: of a shard the events, of a table the rows


Writer = Callable[[Iterator[pa.RecordBatch], pa.Schema, Path], int]


def _write_files(
    rows: DataFrame, order: list[str], columns: pa.Schema, num_files: int, write: Writer, folder: Path, name: str
) -> list[Written]:
    """Writes the rows of each `part` (int column, 0..num_files - 1), sorted by `order`, into a file of its own.

    `write(batches, columns, path)` runs in the task of a part. Files are named by the parts that have rows, 0, 1, ..
    """
    stage = folder / f"_{uuid.uuid4().hex}"
    stage.mkdir()

    def write_part(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        first = next(batches, None)
        if first is None:
            return
        temporary, num_rows = uuid.uuid4().hex, 0

        def content() -> Iterator[pa.RecordBatch]:
            nonlocal num_rows
            for batch in itertools.chain([first], batches):
                num_rows += batch.num_rows
                yield batch.select(columns.names)

        num_values = write(content(), columns, stage / temporary)
        yield pa.RecordBatch.from_pylist(
            [{"part": first["part"][0].as_py(), "name": temporary, "num_rows": num_rows, "num_values": num_values}],
            pa.schema({"part": pa.int32(), "name": pa.string(), "num_rows": pa.int64(), "num_values": pa.int64()}),
        )

    parts = (
        rows.repartitionById(num_files, "part")
        .sortWithinPartitions(*order)
        .select("part", *columns.names)
        .mapInArrow(write_part, "part int, name string, num_rows long, num_values long")
        .collect()
    )
    written = []
    for number, part in enumerate(sorted(parts, key=lambda row: row.part)):
        file = name.format(number)
        (stage / part.name).rename(folder / file)
        written.append(Written(file, part.num_rows, part.num_values))
    shutil.rmtree(stage)
    return written


def _parquet(batches: Iterator[pa.RecordBatch], columns: pa.Schema, path: Path) -> int:
    num_rows = 0
    with pq.ParquetWriter(path, columns) as file:
        for table in _regroup(batches, ROWS_PER_GROUP, columns):
            file.write_table(table)
            num_rows += table.num_rows
    return num_rows


def _tar(batches: Iterator[pa.RecordBatch], columns: pa.Schema, path: Path, users_per_member: int) -> int:
    """Members 000000.arrow .. of at most so many users; returns the number of events."""
    num_events = 0
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, table in enumerate(_regroup(batches, users_per_member, columns)):
            content = _arrow_stream(table)
            member = tarfile.TarInfo(f"{number:06d}.arrow")  # its time is 0
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
            num_events += len(table["item_idx"].combine_chunks().flatten())
    return num_events


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


def _arrow_stream(table: pa.Table) -> bytes:
    stream = io.BytesIO()
    with pa.ipc.new_stream(stream, table.schema) as writer:
        for batch in table.combine_chunks().to_batches():
            writer.write_batch(batch)
    return stream.getvalue()
