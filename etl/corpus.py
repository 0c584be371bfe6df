"""The files of corpus/: dense ids, Parquet tables and WebDataset shards, the same bytes for the same input.

Executors write under names that no other attempt of the task can have; the driver renames only what the job
returned. So a lost executor, a retry or a speculative copy leaves files behind that nobody reads, never two of one.
"""

import io
import shutil
import tarfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as F

from contract import schema

BUCKET_BITS = 10  # a billion ids: a million in a bucket, which one task sorts
ROWS_PER_FILE = 1 << 20


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


def write_parquet(table: DataFrame, columns: list[str], num_rows: int, num_keys: int, folder: Path) -> DataFrame:
    """Writes part-00000.parquet .. into the folder and returns the table read back from them.

    The first column is a dense index, 1..num_keys; files and rows are sorted by it and by position, if there is one.
    About num_rows rows are expected.
    """
    key, *_ = columns
    num_files = 1 + num_rows // ROWS_PER_FILE
    file = F.floor((F.col(key) - 1) * num_files / num_keys).cast("int")
    rows = table.select(*columns).repartitionById(num_files, file)
    rows.sortWithinPartitions(key, *(["position"] if "position" in columns else [])).write.parquet(str(folder))
    _rename_parts(folder)
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
    users = users.withColumn("shard", ((F.col("rank") - 1) % num_shards).cast("int"))
    stage = folder / f".{split}"
    stage.mkdir()
    written = (
        rows.join(users, "user_idx", "inner")
        .repartitionById(num_shards, "shard")
        .sortWithinPartitions("shard", "rank")
        .select("shard", *schema.SEQUENCES.names)
        .mapInArrow(
            _shard_writer(stage, schema.USERS_PER_MEMBER), "shard int, name string, num_users long, num_events long"
        )
        .collect()
    )
    shards = []
    for row in sorted(written, key=lambda row: row.shard):
        file = f"{split}-{row.shard:05d}.tar"
        (stage / row.name).rename(folder / file)
        shards.append({"file": file, "num_users": row.num_users, "num_events": row.num_events})
    shutil.rmtree(stage)
    return shards


def _shard_writer(stage: Path, users_per_member: int):
    def write(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """One partition is one shard; an empty one writes nothing."""
        name = f"{uuid.uuid4().hex}.tar"
        shard = num_users = num_events = 0
        with tarfile.open(stage / name, "w", format=tarfile.USTAR_FORMAT) as tar:
            for number, table in enumerate(_regroup(batches, users_per_member)):
                shard = table["shard"][0].as_py()
                content = _arrow_stream(table.select(schema.SEQUENCES.names).cast(schema.SEQUENCES))
                member = tarfile.TarInfo(f"{number:06d}.arrow")  # its time is 0
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
                num_users += table.num_rows
                num_events += len(table["item_idx"].combine_chunks().flatten())
        if num_users:
            row = {"shard": shard, "name": name, "num_users": num_users, "num_events": num_events}
            types = {"shard": pa.int32(), "name": pa.string(), "num_users": pa.int64(), "num_events": pa.int64()}
            yield pa.RecordBatch.from_pylist([row], pa.schema(types))

    return write


def _regroup(batches: Iterator[pa.RecordBatch], num_rows: int) -> Iterator[pa.Table]:
    """The same rows in tables of num_rows, the last one shorter."""
    waiting: list[pa.RecordBatch] = []
    num_waiting = 0
    for batch in batches:
        waiting.append(batch)
        num_waiting += batch.num_rows
        while num_waiting >= num_rows:
            table = pa.Table.from_batches(waiting)
            yield table.slice(0, num_rows)
            waiting = table.slice(num_rows).to_batches()
            num_waiting -= num_rows
    if num_waiting:
        yield pa.Table.from_batches(waiting)


def _arrow_stream(table: pa.Table) -> bytes:
    stream = io.BytesIO()
    with pa.ipc.new_stream(stream, table.schema) as writer:
        for batch in table.combine_chunks().to_batches():
            writer.write_batch(batch)
    return stream.getvalue()
