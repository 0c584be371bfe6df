"""The neighbours of gid/neighbours.py by Spark, for logs that no memory holds.

A pair says only that a user took an item, so that its BM25 weight is a product of a part of the item and a part of the
user, and the neighbours of j follow from what its users took:

    w(u, i) = a_i b_u        s(j, i) = a_j a_i sum of b_u^2 over the users u of both

A task is given the users of its items j with all that they took, and multiplies sparse matrices. The pairs of items of
a log, their number and that of the users of the most popular, grow faster than the log; two samples keep them in
bounds, and what is drawn stands for what is not, so that in expectation s is what it is without: of a user's items at
most MAX_ITEMS, of an item's users about MAX_USERS, drawn by hashes. Below both bounds s is that of gid/neighbours.py.
"""

import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import scipy.sparse as sp
from pyspark import StorageLevel
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import from_arrow_schema

from contract.schema import TRAIN
from gid.neighbours import K1, B, Neighbours, create

MAX_ITEMS = 100
MAX_USERS = 1000
BYTES_OF_A_TASK = 1 << 26  # of the lists that it is given, 8 bytes for each item of each
ENTRIES_AT_ONCE = 1 << 22  # of those lists, that are multiplied at once
RESULT = pa.schema({"item_idx": pa.int32(), "neighbours": pa.list_(pa.int32()), "weights": pa.list_(pa.float32())})


def write(
    spark: SparkSession,
    corpus: Path,
    num_items: int,
    count: int,
    folder: Path,
    max_items: int = MAX_ITEMS,
    max_users: int = MAX_USERS,
) -> Neighbours:
    """Finds the `count` most similar items of each and writes them to `folder` as `neighbours.write` does.

    Args:
        spark: a session whose executors can import gid/ and contract/.
        corpus: the folder; the executors read interactions/ themselves, and share `folder`.
    """
    pairs = spark.read.parquet((corpus / "interactions").absolute().as_uri()).where(F.col("split") == TRAIN)
    pairs = pairs.select("user_idx", "item_idx").distinct()
    items = pairs.groupBy("item_idx").agg(F.count("*").alias("users"))
    mean_users = (items.agg(F.sum("users")).first()[0] or 0) / (num_items + 1)
    taken = _taken(pairs, items, num_items, mean_users, max_items).persist(StorageLevel.DISK_ONLY)
    found, scratch = create(folder, num_items, count), folder / "cooccurrence"
    try:
        entries = taken.agg(F.sum(F.size("items").cast("long") ** 2)).first()[0] or 0
        of_items = _of_items(taken, max_users).repartition(max(1, round(8 * entries / BYTES_OF_A_TASK)), "j")
        rows = of_items.mapInArrow(lambda batches: _most_similar(batches, count), from_arrow_schema(RESULT))
        rows.write.parquet(scratch.absolute().as_uri())
        _collect(scratch, found)
    finally:
        taken.unpersist()
        shutil.rmtree(scratch, ignore_errors=True)
    return found


def _taken(pairs: DataFrame, items: DataFrame, num_items: int, mean_users: float, max_items: int) -> DataFrame:
    """Of each user: user_idx; items, at most `max_items`; users, how many each of them has; a of each; and
    weight, b_u^2 times how many pairs of items one that is drawn stands for."""
    draw = F.xxhash64("user_idx", "item_idx").alias("draw")
    item = F.struct(draw, "item_idx", "users")
    users = pairs.join(items, "item_idx").groupBy("user_idx").agg(F.sort_array(F.collect_list(item)).alias("all"))
    size, most = F.size("all").cast("double"), max_items
    stands_for = F.when(size > most, size * (size - 1) / (most * (most - 1))).otherwise(1.0)
    part = F.slice("all", 1, max_items)
    a = F.transform(part.users, lambda n: (K1 + 1) / (K1 * (1 - B + B * n / mean_users) + 1))
    return users.where(size > 1).select(
        "user_idx",
        part.item_idx.alias("items"),
        part.users.alias("users"),
        a.cast("array<float>").alias("a"),
        (F.pow(math.log(num_items + 1) - F.log1p(size), 2) * stands_for).alias("weight"),
    )


def _of_items(taken: DataFrame, max_users: int) -> DataFrame:
    """A row for each item j and user of it that is drawn: j, a_j, user_idx, weight, and items and a of the user."""
    rows = taken.select("user_idx", "items", "a", "weight", F.explode(F.arrays_zip("items", "users", "a")).alias("of"))
    draw = F.pmod(F.xxhash64("user_idx", F.col("of.items"), F.lit(1)), F.lit(1 << 30)) / (1 << 30)
    share = F.least(F.lit(1.0), max_users / F.col("of.users"))
    weight = (F.col("weight") / share).alias("weight")
    return rows.where(draw < share).select(
        F.col("of.items").alias("j"), F.col("of.a").alias("a_j"), "user_idx", weight, "items", "a"
    )


def _most_similar(batches: Iterator[pa.RecordBatch], count: int) -> Iterator[pa.RecordBatch]:
    """The neighbours of the items of one partition, which has all rows of its items."""
    batches = list(batches)
    if not batches:
        return
    table = pa.Table.from_batches(batches)
    # In an order that the cluster has no part in, for the same sums everywhere.
    table = table.sort_by([("j", "ascending"), ("user_idx", "ascending")]).combine_chunks()
    lists = table["items"].chunk(0)
    offsets = lists.offsets.to_numpy() - lists.offsets[0].as_py()
    ids, column = np.unique(lists.flatten().to_numpy(), return_inverse=True)
    a = table["a"].chunk(0).flatten().to_numpy().astype(np.float64)
    taken = sp.csr_matrix((a, column, offsets), (len(table), len(ids)))
    j, begin = np.unique(table["j"].to_numpy(), return_index=True)
    row = np.append(begin, len(table))
    users = sp.csr_matrix((table["weight"].to_numpy(), np.arange(len(table)), row), (len(j), len(table)))
    a_j = table["a_j"].to_numpy().astype(np.float64)[begin]
    parts = np.split(np.arange(len(j)), np.flatnonzero(np.diff(offsets[begin] // ENTRIES_AT_ONCE)) + 1)
    for low, high in ((part[0], part[-1] + 1) for part in parts):
        product = users[low:high] @ taken
        of = np.repeat(np.arange(low, high), np.diff(product.indptr))
        item, weight = ids[product.indices], product.data * a_j[of]
        order = np.lexsort((item, -weight, of))  # heaviest first, ties by item_idx
        order = order[(item[order] != j[of[order]]) & (weight[order] > 0)]
        order = order[np.arange(len(order)) - np.searchsorted(of[order], of[order]) < count]
        bounds = np.searchsorted(of[order], np.arange(low, high + 1)).astype(np.int32)
        columns = item[order].astype(np.int32), weight[order].astype(np.float32)
        lists = (pa.ListArray.from_arrays(bounds, column) for column in columns)
        yield pa.RecordBatch.from_arrays([pa.array(j[low:high], pa.int32()), *lists], schema=RESULT)


def _collect(folder: Path, found: Neighbours) -> None:
    for batch in pyarrow.dataset.dataset(folder, RESULT, format="parquet").to_batches():
        lengths = np.diff(batch["neighbours"].offsets.to_numpy())
        row = np.repeat(batch["item_idx"].to_numpy(), lengths)
        column = np.arange(len(row)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        found.item_IK[row, column] = batch["neighbours"].flatten().to_numpy()
        found.weight_IK[row, column] = batch["weights"].flatten().to_numpy()
