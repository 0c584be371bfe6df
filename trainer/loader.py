"""Batches for training and evaluation.

The order of the data is a function of (seed, epoch, step) and of nothing else. The shards of an epoch are dealt to
`train.streams` streams; a global batch takes an equal part of every stream; a rank builds the parts of its own
streams. So the global batch of a step is the same at any number of ranks and of loader processes, and training goes
on from any step by skipping, without a saved loader state.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from contract.artifacts import Artifact
from contract.config import Config
from trainer import inputs, samples
from trainer.inputs import Catalog, History
from trainer.samples import Block


def shard_paths(corpus: Artifact, split: str) -> list[Path]:
    return [corpus.path / shard["file"] for shard in corpus.manifest["shards"][split]]


def steps_per_epoch(config: Config, corpus: Artifact) -> int:
    """Optimizer steps in which about every training target is seen once."""
    shards = corpus.manifest["shards"]["train"]
    num_targets = sum(shard["num_events"] for shard in shards)
    if config.history.order == "time":  # a user's first event has nothing before it
        num_targets -= sum(shard["num_users"] for shard in shards)
    return max(1, num_targets // config.train.global_batch)


def check_batch_sizes(config: Config, num_shards: int, world_size: int) -> None:
    """Raises ValueError when the global batch cannot be dealt to streams, ranks and micro-batches."""
    train = config.train
    if train.streams > num_shards:
        raise ValueError(
            f"train.streams = {train.streams} but corpus/ has {num_shards} train shards; use so many"
            " or fewer (--train.streams=...), or build the corpus with more etl.num_shards"
        )
    if train.streams % world_size:
        raise ValueError(f"train.streams = {train.streams} is not divisible by {world_size} ranks")
    if train.global_batch % train.streams:
        low = train.global_batch // train.streams * train.streams
        raise ValueError(
            f"train.global_batch = {train.global_batch} is not divisible by train.streams = {train.streams}; "
            f"use {low or train.streams} or {low + train.streams}"
        )
    rank_batch = train.global_batch // world_size
    if train.micro_batch and rank_batch % train.micro_batch:
        raise ValueError(
            f"train.global_batch {train.global_batch} over {world_size} ranks is {rank_batch} per rank, not divisible "
            f"by train.micro_batch {train.micro_batch}"
        )


def micro_batch(config: Config, world_size: int) -> int:
    return config.train.micro_batch or config.train.global_batch // world_size


class TrainBatches(torch.utils.data.IterableDataset):
    """Micro-batches of one rank for the optimizer steps `steps`, in order.

    A batch is a dict of int64 tensors:
        user: X_u, see `inputs._assemble`; gid (B, l) and weight float32 (B,) of the targets
        item: X_i of the distinct items in use, with gid (N, l), when a loss needs it; and into its rows
        positive (B,), negative (B,), sibling (B,); has_sibling bool (B,)
        index_rows (V,): the distinct positive and negative items; index_weight float32 (V,): occurrences / B
        shard: names, for messages
    """

    def __init__(
        self,
        config: Config,
        catalog: Catalog,
        shards: list[Path],
        rank: int,
        world_size: int,
        steps: range,
        epoch_steps: int,
    ):
        self.config, self.catalog, self.shards = config, catalog, shards
        per_rank = config.train.streams // world_size
        self.streams = range(rank * per_rank, (rank + 1) * per_rank)
        self.micro = micro_batch(config, world_size)
        self.per_step = config.train.global_batch // world_size // self.micro
        self.steps, self.epoch_steps = steps, epoch_steps

    def __iter__(self) -> Iterator[dict]:
        worker = torch.utils.data.get_worker_info()
        index, count = (worker.id, worker.num_workers) if worker else (0, 1)
        # Loader processes take micro-batches in turn, as torch's DataLoader collects them in turn.
        turn = 0
        streams = [_stream_steps(self.config, self.shards, s, self.steps, self.epoch_steps) for s in self.streams]
        for step, *parts in zip(self.steps, *streams, strict=True):
            mine = [i for i in range(self.per_step) if (turn + i) % count == index]
            turn += self.per_step
            if mine:
                drawn = [
                    _draw(self.config, self.catalog, step, s, part) for s, part in zip(self.streams, parts, strict=True)
                ]
                drawn = _by_length(_concatenate(drawn))
                for i in mine:
                    yield self._build(step, {k: v[i * self.micro : (i + 1) * self.micro] for k, v in drawn.items()})

    def _build(self, step: int, drawn: dict[str, np.ndarray]) -> dict:
        config, catalog = self.config, self.catalog
        history = History(*(drawn[name] for name in ("item_idx", "event", "recency", "gap")))
        batch = {"user": inputs.user_inputs(config, catalog, history), "gid": catalog.gids[drawn["positive"]]}
        batch["weight"] = drawn["weight"]
        if config.loss.index or config.loss.bpr or config.loss.contrastive:
            names = ["positive", "negative", *(["sibling"] if config.loss.contrastive else [])]
            distinct, rows = np.unique(np.stack([drawn[name] for name in names]), return_inverse=True)
            rows = rows.reshape(len(names), -1)
            if distinct[0] == 0:  # "no sibling"; row 0 stands in, and has_sibling hides it
                distinct, rows = distinct[1:], np.maximum(rows - 1, 0)
            batch["item"] = inputs.item_inputs(config, catalog, distinct, key=config.seed * 1_000_003 + step)
            batch["item"]["gid"] = catalog.gids[distinct]
            batch |= dict(zip(names, rows, strict=True))
            batch["has_sibling"] = drawn["sibling"] > 0
            batch["index_rows"], counts = np.unique(rows[:2], return_counts=True)
            batch["index_weight"] = (counts / rows.shape[1]).astype(np.float32)
        return to_tensors(batch) | {"shard": ", ".join(sorted(set(drawn["shard"])))}


class Stream:
    """The training targets of one stream in the fixed order of an epoch; after the last shard it begins again.

    Streams hold unequal numbers of targets but give equally many to an epoch: the surplus of a long one waits for
    the next epoch, which deals the shards anew.
    """

    def __init__(self, config: Config, shards: list[Path], stream: int, epoch: int):
        self._config, self._shards, self._seed = config, shards, (config.seed, epoch)
        self._order = np.random.default_rng(self._seed).permutation(len(shards))[stream :: config.train.streams]
        self._blocks = self._read()
        self._block: Block | None = None
        self._targets = np.zeros(0, np.int64)

    def take(self, size: int) -> list[tuple[Block, np.ndarray]]:
        """The next `size` targets as (block, int64 event positions in it)."""
        parts = []
        while size:
            if not len(self._targets):
                self._block, self._targets = next(self._blocks)
            parts.append((self._block, self._targets[:size]))
            self._targets = self._targets[size:]
            size -= len(parts[-1][1])
        return parts

    def _read(self) -> Iterator[tuple[Block, np.ndarray]]:
        for again in itertools.count():
            found = False
            for shard in self._order:
                block = samples.read_shard(self._shards[shard])
                targets = samples.train_targets(self._config, block)
                found |= len(targets) > 0
                yield block, np.random.default_rng([*self._seed, shard, again]).permutation(targets)
            if not found:
                names = ", ".join(self._shards[shard].name for shard in self._order)
                raise ValueError(f"no user in {names} has two train events; build the corpus with fewer etl.num_shards")


def _stream_steps(
    config: Config, shards: list[Path], stream: int, steps: range, epoch_steps: int
) -> Iterator[list[tuple[Block, np.ndarray]]]:
    """For each step the stream's part of the global batch."""
    size = config.train.global_batch // config.train.streams
    source = None
    for step in steps:
        epoch, done = divmod(step, epoch_steps)
        if source is None or done == 0:
            source = Stream(config, shards, stream, epoch)
            source.take(done * size)
        yield source.take(size)


def _draw(config: Config, catalog: Catalog, step: int, stream: int, parts: list[tuple[Block, np.ndarray]]) -> dict:
    """Histories, positives, negatives and siblings of a stream's part of a step, as arrays over its targets."""
    rng = np.random.default_rng([config.seed, step, stream])
    drawn = []
    for block, targets in parts:
        positive = block.item_idx.values[targets].astype(np.int64)
        drawn.append(
            vars(samples.train_histories(config, catalog, block, targets, rng))
            | {
                "positive": positive,
                "weight": catalog.event_weights[block.event[targets]],
                "negative": samples.draw_negatives(catalog, block, targets, rng),
                "sibling": samples.draw_siblings(catalog, positive, rng),
                "shard": np.full(len(targets), block.shard),
            }
        )
    return _concatenate(drawn)


def _by_length(drawn: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The samples sorted by the length of their histories: micro-batches of like length pad little, and the gradient
    of a step is a sum, whatever the order."""
    order = np.argsort((drawn["item_idx"] > 0).sum(1), kind="stable")
    return {name: array[order] for name, array in drawn.items()}


def _concatenate(drawn: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in drawn]) for name in drawn[0]}


def eval_sample(config: Config, corpus: Artifact, split: str) -> list[np.ndarray]:
    """The rows (ascending) of each shard of a split that make up a sample of `train.eval_users` users, or all."""
    sizes = [shard["num_users"] for shard in corpus.manifest["shards"][split]]
    begin = np.concatenate([[0], np.cumsum(sizes)])
    users = np.arange(begin[-1])
    if 0 < config.train.eval_users < len(users):
        users = np.sort(np.random.default_rng(config.seed).choice(users, config.train.eval_users, replace=False))
    return [
        part - start for part, start in zip(np.split(users, np.searchsorted(users, begin[1:-1])), begin, strict=False)
    ]


def num_eval_batches(
    corpus: Artifact, split: str, batch: int, world_size: int, sample: list[np.ndarray] | None = None
) -> int:
    """Batches of the rank that has most; the others fill up, so that every rank takes part in collectives."""
    sizes = [len(rows) for rows in sample] if sample else [s["num_users"] for s in corpus.manifest["shards"][split]]
    return max(sum(-(-size // batch) for size in sizes[rank::world_size]) for rank in range(world_size))


def eval_batches(
    config: Config,
    catalog: Catalog,
    corpus: Artifact,
    split: str,
    batch: int,
    rank: int,
    world_size: int,
    sample: list[np.ndarray] | None = None,
) -> Iterator[dict]:
    """The users of a valid or test split, all or those of `eval_sample`; a rank's shards of them.

    A batch never crosses a shard, so that what is computed of a user is the same at any number of ranks. Yields

        user: X_u of B users; user_idx (B,), 0 in batches that only fill up
        pair_row (P,), pair_item (P,), pair_gid (P, l): the targets, as rows of user, item_idx and GIDs; a user may
        have several
        seen_row (S,), seen_item (S,): the whole histories as rows of user and item_idx, whatever the encoder sees
    """
    shards = shard_paths(corpus, split)
    count, last = 0, None
    for number in range(rank, len(shards), world_size):
        block = samples.read_shard(shards[number])
        if sample:
            block = samples.take_users(block, sample[number])
        history = samples.eval_histories(
            config, catalog, block, np.random.default_rng([config.seed, len(block.user_idx)])
        )
        for begin in range(0, len(block.user_idx), batch):
            last = _eval_batch(config, catalog, block, history, range(begin, min(begin + batch, len(block.user_idx))))
            yield last
            count += 1
    if last is None:  # more ranks than shards
        block = samples.read_shard(shards[0])
        history = samples.eval_histories(config, catalog, block, np.random.default_rng(0))
        last = _eval_batch(config, catalog, block, history, range(1))
    filler = last | {"user_idx": torch.zeros_like(last["user_idx"])}
    filler |= {name: last[name][:0] for name in ("pair_row", "pair_item", "pair_gid")}
    for _ in range(count, num_eval_batches(corpus, split, batch, world_size, sample)):
        yield filler


def _eval_batch(config: Config, catalog: Catalog, block: Block, history: History, rows: range) -> dict:
    at = slice(rows.start, rows.stop)
    begin, end = block.item_idx.offsets[rows.start], block.item_idx.offsets[rows.stop]
    row, item, is_target = block.row[begin:end], block.item_idx.values[begin:end], block.is_target[begin:end]
    batch = {
        "user": inputs.user_inputs(config, catalog, History(*(array[at] for array in vars(history).values()))),
        "user_idx": block.user_idx[at],
        "pair_row": row[is_target] - rows.start,
        "pair_item": item[is_target].astype(np.int64),
        "pair_gid": catalog.gids[item[is_target]],
        "seen_row": row[~is_target] - rows.start,
        "seen_item": item[~is_target].astype(np.int64),
    }
    return to_tensors(batch)


def to_tensors(arrays: dict) -> dict:
    return {k: to_tensors(v) if isinstance(v, dict) else torch.from_numpy(np.array(v)) for k, v in arrays.items()}


def to_device(batch: dict, device: torch.device) -> dict:
    """The tensors of a nested batch on a device; other values as they are."""
    return {
        k: to_device(v, device) if isinstance(v, dict) else v.to(device, non_blocking=True) if torch.is_tensor(v) else v
        for k, v in batch.items()
    }
