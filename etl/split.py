"""Which event of a user is train, valid or test; and the check, on what was written, that nothing leaks.

A split function takes a block and returns (split int8 (N,), keep bool (N,)): events that are not kept are no part of
the corpus. CONTEXT marks what is known at evaluation but is no training data: the first part of a held-out session.
"""

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from contract.schema import CONTEXT, NO_TIME, SPLITS, TEST, TRAIN, VALID, ragged
from contract.settings import Etl
from etl.blocks import Block, read_block, write_block
from etl.kcore import survivors
from etl.tasks import read_items, run_tasks, unique_name

MIN_EVENTS = 3  # to hold two out, a history needs one
MIN_SESSION = 2
MS_PER_DAY = 86_400_000


@dataclass(frozen=True)
class Bounds:
    """ms. Events after `test` are test, after `valid` valid, in the splits that go by the clock."""

    valid: int
    test: int


def bounds(etl: Etl, last_ts: int) -> Bounds:
    """Counted back from the log's last event that counts."""
    test = last_ts - round(etl.test_days * MS_PER_DAY)
    return Bounds(test - round(etl.valid_days * MS_PER_DAY), test)


def assign(block: Block, etl: Etl, seed: int, at: Bounds) -> tuple[np.ndarray, np.ndarray]:
    """(split int8 (N,), keep bool (N,)) by etl.split."""
    everything = np.ones(len(block.code), bool)
    match etl.split:
        case "given":
            return block.split, everything
        case "leave_one_out":
            return leave_one_out(block), everything
        case "temporal":
            return by_time(block, at), everything
        case "random":
            return by_share(block, etl.split_shares, seed), everything
        case "otto":
            return sessions(block, at)
    raise AssertionError(etl.split)


def leave_one_out(block: Block) -> np.ndarray:
    """A user's last event is test, the one before valid; users with fewer than 3 events are train only."""
    split = np.full(len(block.code), TRAIN, np.int8)
    last = (block.starts + block.num_events - 1)[block.num_events >= MIN_EVENTS]
    split[last], split[last - 1] = TEST, VALID
    return split


def by_time(block: Block, at: Bounds) -> np.ndarray:
    """By the clock, the same moment for all users."""
    return np.select([block.ts > at.test, block.ts > at.valid], [TEST, VALID], TRAIN).astype(np.int8)


def by_share(block: Block, shares: tuple[float, ...], seed: int) -> np.ndarray:
    """At random: of a user's n events round(n * share), but at least one, are test, and as many valid by their share.

    Users with fewer than 3 events are train only. The draw depends on the seed, the user and the item alone.
    """
    drawn = mixed(seed, block.user_key[block.row], block.item[block.code])
    order = np.lexsort((drawn, block.row))
    rank = np.arange(len(order)) - np.repeat(block.starts, block.num_events)
    num_valid, num_test = (np.maximum(1, np.rint(block.num_events * share)).astype(np.int64) for share in shares[1:])
    enough = block.num_events >= MIN_EVENTS
    num_valid, num_test = num_valid * enough, num_test * enough
    of_event = [np.repeat(values, block.num_events) for values in (num_test, num_test + num_valid)]
    split = np.empty(len(order), np.int8)
    split[order] = np.select([rank < of_event[0], rank < of_event[1]], [TEST, VALID], TRAIN)
    return split


def sessions(block: Block, at: Bounds) -> tuple[np.ndarray, np.ndarray]:
    """OTTO's: a session, here a user, that begins after the bound is held out whole; of the others what is later is
    cut off. Sessions of one event are left out. `cut_sessions` goes on when the items of the train split are known.
    """
    begin = block.ts[block.starts]
    held_out = np.select([begin > at.test, begin > at.valid], [TEST, VALID], TRAIN).astype(np.int8)
    end = np.select([held_out == TEST, held_out == VALID], [np.iinfo(np.int64).max, at.test], at.valid)
    keep = block.ts < np.repeat(end, block.num_events)
    keep &= np.repeat(block.per_user(keep) >= MIN_SESSION, block.num_events)
    return np.repeat(held_out, block.num_events), keep


def cut_sessions(block: Block, known_items: np.ndarray, seed: int) -> Block:
    """Held-out sessions -> CONTEXT up to a random point, then the targets: the next event of the first type (a click),
    and every later one of the other types (carts, orders), of an item once.

    Events on items that train does not know (bool by position in block.item) are left out first, then sessions of one
    event. The same as src/testset.py and src/labels.py of OTTO's repository, but for the random draw.
    """
    block = block.select((block.split == TRAIN) | known_items[block.code])
    block = block.select(np.repeat(block.per_user(np.ones(len(block.code), bool)) >= MIN_SESSION, block.num_events))
    in_train = block.split[block.starts] == TRAIN
    drawn = mixed(seed, block.user_key, np.zeros(len(block.user_key), np.int64))
    num_context = 1 + (drawn % np.maximum(block.num_events - 1, 1).astype(np.uint64)).astype(np.int64)
    place = np.arange(len(block.code)) - np.repeat(block.starts, block.num_events)
    context = place < np.repeat(num_context, block.num_events)
    later_click = ~context & (block.event == 1)
    first_click = later_click & (_count_before(block, later_click) == 0)
    target = first_click | (~context & (block.event != 1) & _first_of_kind(block, ~context))
    train = np.repeat(in_train, block.num_events)
    split = np.where(context & ~train, CONTEXT, block.split).astype(np.int8)
    block = Block(block.user_id, block.user_key, block.num_events, block.item, block.code, block.ts, block.event, split)
    return block.select(train | context | target)


def _count_before(block: Block, mask: np.ndarray) -> np.ndarray:
    """int64 (N,): how many of the user's earlier events are in the mask."""
    before = np.cumsum(mask) - mask
    return before - np.repeat(before[block.starts], block.num_events)


def _first_of_kind(block: Block, mask: np.ndarray) -> np.ndarray:
    """bool (N,): in the mask, and no earlier one in it has the same user, item and type."""
    rows = np.flatnonzero(mask)
    key = (block.row[rows].astype(np.int64) * len(block.item) + block.code[rows]) * 128 + block.event[rows]
    first = np.zeros(len(mask), bool)
    first[rows[np.unique(key, return_index=True)[1]]] = True
    return first


def mixed(seed: int, *keys: np.ndarray) -> np.ndarray:
    """uint64: a hash of the seed and the keys, by the finaliser of splitmix64 (Steele et al., OOPSLA 2014)."""
    state = np.full(len(keys[0]), seed, np.uint64)
    for key in keys:
        state = (state ^ key.astype(np.int64).view(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state ^= state >> np.uint64(31)
    return state


@dataclass(frozen=True)
class Settled:
    """A block whose events all have their split, and what it says of its items."""

    name: str
    num_users: int
    # Parquet file: item (catalog number), num, num_train, num_train_users, first_ts of train (NO_TIME: unknown)
    statistics: str


def settle(
    spark: SparkSession, blocks: list[str], out: list[str], etl: Etl, seed: int, at: Bounds, stage: Path
) -> list[Settled]:
    """Drops from the blocks what the k-core left `out`, and splits what remains; blocks without events end here."""
    task = functools.partial(_settle, out=out, etl=etl, seed=seed, at=at, stage=stage)
    settled = [block for block in run_tasks(spark, task, blocks) if block]
    if etl.split == "otto" and settled:
        known = f"known-{unique_name()}"
        statistics = read_statistics(spark, settled, stage)
        statistics.where(F.col("num_train") > 0).select("item").write.parquet(str(stage / known))
        task = functools.partial(_cut, known=known, seed=seed, stage=stage)
        settled = [block for block in run_tasks(spark, task, [block.name for block in settled]) if block]
    return settled


def read_statistics(spark: SparkSession, settled: list[Settled], stage: Path) -> DataFrame:
    """item int (catalog number), num, num_train, num_train_users, first_ts: of all blocks together."""
    rows = spark.read.parquet(*(str(stage / block.statistics) for block in settled))
    dated = F.when(F.col("first_ts") != NO_TIME, F.col("first_ts"))
    return rows.groupBy("item").agg(
        F.sum("num").alias("num"),
        F.sum("num_train").alias("num_train"),
        F.sum("num_train_users").alias("num_train_users"),
        F.coalesce(F.min(dated), F.lit(NO_TIME)).alias("first_ts"),
    )


def _settle(name: str, out: list[str], etl: Etl, seed: int, at: Bounds, stage: Path) -> Settled | None:
    block = read_block(stage, name)
    block = block.select(survivors(block, read_items(stage, out), etl.min_user))
    split, keep = assign(block, etl, seed, at)
    return _write_settled(dataclasses.replace(block, split=split).select(keep), stage)


def _cut(name: str, known: str, seed: int, stage: Path) -> Settled | None:
    block = read_block(stage, name)
    return _write_settled(cut_sessions(block, np.isin(block.item, read_items(stage, [known])), seed), stage)


def _write_settled(block: Block, stage: Path) -> Settled | None:
    if not len(block.code):
        return None
    train = block.split == TRAIN
    first_ts = np.full(len(block.item), np.iinfo(np.int64).max)
    dated = train & (block.ts != NO_TIME)
    np.minimum.at(first_ts, block.code[dated], block.ts[dated])
    first_ts[first_ts == np.iinfo(np.int64).max] = NO_TIME
    pairs = np.unique(block.row[train].astype(np.int64) * len(block.item) + block.code[train])
    codes = {"num": block.code, "num_train": block.code[train], "num_train_users": pairs % len(block.item)}
    nums = {name: np.bincount(code, minlength=len(block.item)) for name, code in codes.items()}
    table = pa.table({"item": block.item, **nums, "first_ts": first_ts})
    file = f"{unique_name()}.statistics"
    pq.write_table(table, stage / file)
    return Settled(write_block(block, stage), len(block.num_events), file)


def check_no_leak(sequences: pa.Table, etl: Etl, part: int) -> None:
    """Looks at the rows of a valid or test shard, as they were written, for what gives a target away.

    Args:
        sequences: of schema.SEQUENCES.
        part: VALID or TEST.

    Raises:
        ValueError: a target is not after its history, is in it (repeats = 'first'), or is not the only one of
            leave-one-out; the message names the user.
    """
    items, ts, is_target = (ragged(sequences[name]) for name in ("item_idx", "ts", "is_target"))
    row = np.repeat(np.arange(len(items)), items.lengths)
    target, has_target = is_target.values, np.zeros(len(items), bool)
    has_target[row[target]] = True
    next_is_history = (row[1:] == row[:-1]) & target[:-1] & ~target[1:]
    bad = {"has no target": np.flatnonzero(~has_target), "has history after a target": row[1:][next_is_history]}
    if etl.repeats == "first":
        pair = np.sort((row << 32) | items.values)
        bad["has an item twice"] = (pair[1:] >> 32)[pair[1:] == pair[:-1]]
    if etl.split == "leave_one_out":
        bad["has several targets"] = np.flatnonzero(np.bincount(row[target], minlength=len(items)) > 1)
    dated = ts.values != NO_TIME
    latest, earliest = np.full(len(items), NO_TIME), np.full(len(items), np.iinfo(np.int64).max)
    np.maximum.at(latest, row[dated & ~target], ts.values[dated & ~target])
    np.minimum.at(earliest, row[dated & target], ts.values[dated & target])
    if etl.split in ("leave_one_out", "temporal", "otto"):
        bad["knows of later than its target"] = np.flatnonzero(latest > earliest)
    for what, rows in bad.items():
        if len(rows):
            user = sequences["user_idx"][int(rows[0])].as_py()
            raise ValueError(f"the {SPLITS[part]} split leaks: user_idx {user} {what}, and {len(rows) - 1} more do")


def check_clock(spans: list[dict[int, tuple[int, int]]], method: str) -> None:
    """The splits that go by the clock leave no train event after a valid one, and none of these after a test one.

    Args:
        spans: of the parts of the corpus, split code -> (first ts, last ts) of its events.

    Raises:
        ValueError: an event of an earlier split is later than one of a later split.
    """
    if method not in ("temporal", "otto"):
        return
    for earlier, later in ((TRAIN, VALID), (VALID, TEST), (TRAIN, TEST)):
        last = max((span[earlier][1] for span in spans if earlier in span), default=NO_TIME)
        first = min((span[later][0] for span in spans if later in span), default=last + 1)
        if last >= first:
            raise ValueError(
                f"the {method} split leaks: a {SPLITS[earlier]} event at {last} ms, {SPLITS[later]} at {first}"
            )
