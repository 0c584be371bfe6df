"""The k-core: users and items that have k events with each other, by rounds to the fixed point.

The users of a round follow from its items, because sets only shrink: those with min_user events on them. So the items
that a round leaves out are all that has to be made known, and what blocks answer is by how much their counts changed.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from etl.blocks import Block, read_block
from etl.tasks import read_items, run_tasks, unique_name


@dataclass(frozen=True)
class Round:
    """What a round left, and where the catalog numbers of the items lie that are out by now."""

    num_users: int
    num_items: int
    num_events: int
    out: list[str]  # folders of Parquet files, one per round


def k_core(spark: SparkSession, blocks: list[str], min_user: int, min_item: int, stage: Path) -> Iterator[Round]:
    """Yields each round; the last one left the k-core.

    A round keeps the users with min_user events on the items left, then the items with min_item events of those users.
    """
    counts, out = stage / f"counts-{unique_name()}", []
    before = []
    while True:
        task = functools.partial(_count_changes, min_user=min_user, out=list(out), stage=stage)
        answers = run_tasks(spark, task, blocks)
        changes = [str(stage / name) for name, _, _ in answers if name]
        if not changes:  # in the first round alone: no user has min_user events
            yield Round(0, 0, 0, out)
            return
        # Sums of int64: the order of the files does not matter.
        summed = spark.read.parquet(*changes, *before).groupBy("item").agg(F.sum("num").alias("num"))
        summed.where(F.col("num") > 0).write.parquet(str(counts))
        few = F.col("num") < min_item
        found = spark.read.parquet(str(counts))
        num_items, num_out = found.agg(F.count_if(~few), F.count_if(few)).first()
        out.append(f"out-{unique_name()}")
        found.where(few).select("item").write.parquet(str(stage / out[-1]))
        yield Round(sum(n for _, n, _ in answers), num_items, sum(n for _, _, n in answers), list(out))
        if not num_out:
            return
        before, counts = [str(counts)], stage / f"counts-{unique_name()}"


def survivors(block: Block, out: np.ndarray, min_user: int) -> np.ndarray:
    """bool (N,): events on items that are not `out` (int32 catalog numbers), of users with min_user of them."""
    kept_item = ~np.isin(block.item, out)
    on_kept = kept_item[block.code]
    users = block.per_user(on_kept) >= min_user
    return on_kept & np.repeat(users, block.num_events)


def _count_changes(name: str, min_user: int, out: list[str], stage: Path) -> tuple[str | None, int, int]:
    """(a Parquet file of item, num: changes of a block's counts by the last round; users left, events left)."""
    block = read_block(stage, name)
    left = survivors(block, read_items(stage, out), min_user)
    num = np.bincount(block.code[left], minlength=len(block.item))
    if out:
        before = survivors(block, read_items(stage, out[:-1]), min_user)
        num -= np.bincount(block.code[before], minlength=len(block.item))
    num_users = int(np.count_nonzero(block.per_user(left)))
    changed = np.flatnonzero(num)
    file = None
    if len(changed):
        file = f"{unique_name()}.changes"
        table = pa.table({"item": block.item[changed], "num": num[changed].astype(np.int64)})
        pq.write_table(table, stage / file)
    return file, num_users, int(left.sum())
