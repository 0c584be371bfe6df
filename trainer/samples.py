"""Samples from shards: blocks of user sequences, what is visible of a user at a target, and negatives."""

import functools
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import webdataset as wds

from contract import schema
from contract.schema import Ragged
from contract.settings import Config
from trainer.inputs import Catalog, History, gap_bucket, ragged_arange

# What a stream of the loader holds at a time: about 40 bytes an event with all lookups, so 80 MB, whatever the size of
# the shard.
MAX_BLOCK_EVENTS = 1 << 21


@dataclass(frozen=True)
class Block:
    """Sequences of some users, events in time order; rows of one Ragged index are events."""

    user_idx: np.ndarray  # int64 (N,)
    item_idx: Ragged  # int32
    ts: np.ndarray  # int64, ms
    event: np.ndarray  # int8
    is_target: np.ndarray  # bool
    shard: str  # for messages

    @functools.cached_property
    def row(self) -> np.ndarray:
        """int64: the user row of every event."""
        return np.repeat(np.arange(len(self.user_idx)), self.item_idx.lengths)

    @functools.cached_property
    def owned(self) -> np.ndarray:
        """int64, sorted: `pair_key` of every event, to look up whether a user has an item."""
        return np.sort(pair_key(self.row, self.item_idx.values))


def pair_key(row: np.ndarray, item_idx: np.ndarray) -> np.ndarray:
    """int64: one number for a (user row, item)."""
    return (row.astype(np.int64) << 32) | item_idx


def read_shard(shard: str | Path) -> Block:
    """All users of a shard at once. Raises as `read_blocks` does."""
    return next(read_blocks(shard, sys.maxsize))


def read_blocks(shard: str | Path, max_events: int = MAX_BLOCK_EVENTS) -> Iterator[Block]:
    """The users of a shard, in its order, in blocks of at most so many events (or of one tar member).

    Args:
        shard: a path, or any URL that fsspec opens; it is read forwards, once, and never held whole.

    Raises:
        FileNotFoundError: there is no such shard.
        ValueError: it cannot be read as one.
    """
    tables, num_events = [], 0
    for table in _members(shard):
        more = pc.sum(pc.list_value_length(table["item_idx"])).as_py() or 0
        if tables and num_events + more > max_events:
            yield _block(shard, tables)
            tables, num_events = [], 0
        tables.append(table)
        num_events += more
    yield _block(shard, tables)


def _members(shard: str | Path) -> Iterator[pa.Table]:
    remedy = "build the corpus again with spark-submit etl/build.py, or copy its shards to data.shards_url again"
    found = False
    try:
        with fsspec.open(str(shard), "rb") as stream:
            files = wds.tariterators.tar_file_expander([{"url": str(shard), "stream": stream}])
            for member in wds.tariterators.group_by_keys(files):
                found = True
                yield pa.ipc.open_stream(member["arrow"]).read_all().cast(schema.SEQUENCES)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"shard {shard} is missing; {remedy}") from error
    except ImportError as error:
        raise ValueError(f"shard {shard} cannot be read: {error}") from None  # it names the package to install
    except Exception as error:  # tar, Arrow, network: every file system has exceptions of its own
        raise ValueError(f"shard {shard} cannot be read: {error}; {remedy}") from error
    if not found:
        raise ValueError(f"shard {shard} is empty; {remedy}")


def _block(shard: str | Path, tables: list[pa.Table]) -> Block:
    table = pa.concat_tables(tables).combine_chunks()
    return Block(
        table["user_idx"].to_numpy(),
        schema.ragged(table["item_idx"]),
        schema.ragged(table["ts"]).values,
        schema.ragged(table["event"]).values,
        schema.ragged(table["is_target"]).values,
        str(shard).rpartition("/")[2],
    )


def take_users(block: Block, rows: np.ndarray) -> Block:
    """The users of these rows, int64 ascending."""
    events = Ragged(np.arange(len(block.ts)), block.item_idx.offsets).take(rows).values
    columns = (block.ts[events], block.event[events], block.is_target[events])
    return Block(block.user_idx[rows], block.item_idx.take(rows), *columns, block.shard)


def in_random_order(block: Block, rng: np.random.Generator) -> Block:
    """The events of each user shuffled, one of each item: what a causal encoder reads of order 'set'."""
    event = np.lexsort((rng.random(len(block.ts)), block.row))
    first = np.unique(pair_key(block.row, block.item_idx.values[event]), return_index=True)[1]
    event = event[np.sort(first)]
    offsets = np.concatenate([[0], np.cumsum(np.bincount(block.row[event], minlength=len(block.user_idx)))])
    columns = (block.ts[event], block.event[event], block.is_target[event])
    return Block(block.user_idx, Ragged(block.item_idx.values[event], offsets), *columns, block.shard)


def train_targets(config: Config, block: Block, rng: np.random.Generator) -> np.ndarray:
    """int64 (T,): events that can be predicted from at least one other item of their user.

    In order 'time' these are all but a user's first; in order 'set' all, for users with two events and more. With
    causal attention, for which a set is `in_random_order`, they are the last events of windows, whose other events are
    targets as well: one window of each user, and of a user with more events than a window holds so many that they could
    hold all, drawn one from each part of the history.
    """
    lengths = block.item_idx.lengths
    if config.history.attention == "causal":
        begin, end = block.item_idx.offsets[:-1][lengths > 1], block.item_idx.offsets[1:][lengths > 1]
        lowest = np.minimum(begin + config.history.train_items, end - 1)
        num_windows = -(-(end - begin - 1) // config.history.train_items)
        row, number = np.repeat(np.arange(len(begin)), num_windows), ragged_arange(num_windows)
        share = (number + rng.random(len(row))) / num_windows[row]
        return np.minimum(lowest[row] + (share * (end - lowest)[row]).astype(np.int64), end[row] - 1)
    if config.history.order == "time":
        eligible = np.arange(len(block.item_idx.values)) > np.repeat(block.item_idx.offsets[:-1], lengths)
    else:
        eligible = np.repeat(lengths > 1, lengths)
    return np.nonzero(eligible)[0]


def train_histories(
    config: Config, catalog: Catalog, block: Block, targets: np.ndarray, rng: np.random.Generator
) -> History:
    """What is visible of the user at each target event (T,): never the target; in order 'time' only earlier events."""
    row = block.row[targets]
    begin, end = block.item_idx.offsets[row], block.item_idx.offsets[row + 1]
    if config.history.order == "time" or config.history.attention == "causal":
        return _window(config, catalog, block, begin, targets, config.history.train_items)
    return _sample(catalog, block, begin, end, targets, config.history.train_items, rng)


def eval_histories(config: Config, catalog: Catalog, block: Block, rng: np.random.Generator) -> History:
    """What is visible of every user (N,) of a valid or test block: the events before its targets."""
    begin = block.item_idx.offsets[:-1]
    num_targets = np.bincount(block.row, weights=block.is_target, minlength=len(block.user_idx)).astype(np.int64)
    end = block.item_idx.offsets[1:] - num_targets
    if config.history.order == "time":
        return _window(config, catalog, block, begin, end, config.history.eval_items)
    nothing = np.full(len(begin), -1)
    return _sample(catalog, block, begin, end, nothing, config.history.eval_items, rng)


def _window(
    config: Config, catalog: Catalog, block: Block, begin: np.ndarray, end: np.ndarray, num_items: int
) -> History:
    """The latest `num_items` events of [begin, end), with their time features: seen from the latest event, or with
    causal attention, where each event is the latest once, from the event before."""
    length = np.minimum(end - begin, num_items)[:, None]
    column = np.arange(num_items)
    filled = column < length
    event = np.where(filled, end[:, None] - length + column, 0)
    history = _lookup(block, event, filled)
    if config.history.order == "set":
        return replace(history, event=np.zeros_like(history.event))
    causal = config.history.attention == "causal"
    if not catalog.has_time:
        gap = np.zeros_like(history.gap)
    else:
        first = np.broadcast_to(begin[:, None], event.shape)
        since, until = (np.maximum(event - 1, first), event) if causal else (event, np.maximum(end - 1, 0)[:, None])
        start, stop = block.ts[since], block.ts[until]
        known = filled & (start != schema.NO_TIME) & (stop != schema.NO_TIME)
        gap = np.where(known, gap_bucket(stop - start), 0)
    return replace(history, recency=np.where(filled & (not causal), length - column, 0), gap=gap)


def _sample(
    catalog: Catalog,
    block: Block,
    begin: np.ndarray,
    end: np.ndarray,
    left_out: np.ndarray,
    num_items: int,
    rng: np.random.Generator,
) -> History:
    """`num_items` events of [begin, end) without `left_out`, without order (the paper's histories)."""
    counts = end - begin
    row = np.repeat(np.arange(len(begin)), counts)
    event = np.repeat(begin, counts) + ragged_arange(counts)
    # Equal items of a user are one item: none may tell what the target is.
    item, target_item = block.item_idx.values, block.item_idx.values[np.maximum(left_out, 0)]
    allowed = (left_out[row] < 0) | (item[event] != target_item[row])
    row, event = row[allowed], event[allowed]
    # Rows keep their places, and within one the events come in random order; its first ones are the sample.
    event = event[np.lexsort((rng.random(len(row)), row))]
    column = ragged_arange(np.bincount(row, minlength=len(begin)))
    taken = column < num_items
    sample, filled = np.zeros((len(begin), num_items), np.int64), np.zeros((len(begin), num_items), bool)
    sample[row[taken], column[taken]], filled[row[taken], column[taken]] = event[taken], True
    history = _lookup(block, sample, filled)
    return replace(history, event=np.zeros_like(history.event))


def _lookup(block: Block, event: np.ndarray, filled: np.ndarray) -> History:
    zeros = np.zeros(event.shape, np.int64)
    return History(
        np.where(filled, block.item_idx.values[event], 0).astype(np.int64),
        np.where(filled, block.event[event], 0).astype(np.int64),
        zeros,
        zeros,
    )


def draw_negatives(catalog: Catalog, block: Block, targets: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """int64 (T,): for each target event a uniform item that its user has not in this block and whose l-1 prefix is
    another one. Where a user leaves no such item within 50 draws, the last draw stands."""
    stride, owned, row = catalog.num_items + 1, block.owned, block.row[targets]
    group = catalog.group[block.item_idx.values[targets]]
    negatives = rng.integers(1, stride, len(targets))
    redraw = np.arange(len(targets))
    for _ in range(50):
        key = pair_key(row[redraw], negatives[redraw])
        found = owned[np.minimum(np.searchsorted(owned, key), len(owned) - 1)] == key
        redraw = redraw[found | (catalog.group[negatives[redraw]] == group[redraw])]
        if not len(redraw):
            break
        negatives[redraw] = rng.integers(1, stride, len(redraw))
    return negatives


def draw_siblings(catalog: Catalog, item_idx: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """int64: for each item another one of the same l-1 prefix, i+ of the contrastive loss; 0 where there is none."""
    group = catalog.group[item_idx]
    begin, size = catalog.siblings.offsets[group], catalog.siblings.lengths_at(group)
    choice = (rng.random(len(item_idx)) * np.maximum(size - 1, 1)).astype(np.int64)
    sibling = catalog.siblings.values[begin + choice]
    # Drawn from all but the last; where the draw is the item itself, the last stands in for it: uniform over the rest.
    sibling = np.where(sibling == item_idx, catalog.siblings.values[begin + size - 1], sibling)
    return np.where(size > 1, sibling, 0).astype(np.int64)
