"""Batches for training and evaluation.

The order of the data is a function of (seed, epoch, step) and of nothing else. The shards of an epoch are dealt to
`train.streams` streams; a global batch takes an equal part of every stream; a rank builds the parts of its own
streams. So the global batch of a step is the same at any number of ranks and of loader processes, and training goes
on from any step by skipping, without a saved loader state.
"""

import itertools
from collections.abc import Iterator

import fsspec
import numpy as np
import torch

from contract.artifacts import Artifact
from contract.schema import Ragged
from contract.settings import Config
from trainer import inputs, samples
from trainer.inputs import Catalog, History
from trainer.packing import to_tensors
from trainer.samples import Block


def shard_paths(corpus: Artifact, split: str) -> list[str]:
    """The shards of a split, in the corpus folder or below data.shards_url.

    Raises:
        ValueError: a shard there is not the one that the manifest of corpus/ lists.
    """
    names = [shard["file"] for shard in corpus.manifest["shards"][split]]
    base = corpus.shards_url.rstrip("/")
    if not base:
        return [str(corpus.path / name) for name in names]
    remedy = f"copy the .tar files of {corpus.path} to it, or set data.shards_url = '' to read them where they are"
    try:
        system, root = fsspec.url_to_fs(base)
        sizes = {file["name"].rpartition("/")[2]: file["size"] for file in system.ls(root, detail=True)}
    except Exception as error:  # every file system has exceptions of its own
        raise ValueError(f"data.shards_url = {base!r} cannot be listed: {error}; {remedy}") from error
    for name in names:
        expected = corpus.manifest["files"][name]["bytes"]
        if sizes.get(name, 0) not in (expected, None):  # a listing over HTTP knows no sizes
            found = f"has {sizes[name]} bytes, not {expected}" if name in sizes else "is missing"
            raise ValueError(f"shard {base}/{name} {found}; {remedy}")
    return [f"{base}/{name}" for name in names]


def steps_per_epoch(config: Config, corpus: Artifact) -> int:
    """Optimizer steps in which about every training target is seen once. With causal attention these are windows: one
    for each user, more where the users have more events on average than a window holds."""
    shards = corpus.manifest["shards"]["train"]
    num_events, num_users = (sum(shard[count] for shard in shards) for count in ("num_events", "num_users"))
    if config.history.attention == "causal":
        num_targets = max(num_users, (num_events - num_users) // config.history.train_items)
    else:  # in order 'time' a user's first event has nothing before it
        num_targets = num_events - (num_users if config.history.order == "time" else 0)
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
    if train.length_groups > rank_batch:
        raise ValueError(
            f"train.length_groups = {train.length_groups} is more than the {rank_batch} targets that each of "
            f"{world_size} ranks has of train.global_batch = {train.global_batch}"
        )


class TrainBatches(torch.utils.data.IterableDataset):
    """The optimizer steps `steps` of one rank, in order: each a list of micro-batches, which partition its targets.

    The losses of a micro-batch are sums over its targets divided by the rank's number of them in the step, so their
    sum over the list is the mean over the rank's share. A micro-batch is a dict of int64 tensors:

        user: X_u, see `inputs._assemble`, rows by length, with groups
        next_row, next_at (S,): the targets, as rows of user and the positions in them that they come after; a row has
        one, after its last position, or with causal attention one after each item; next_gid (S, l); next_weight (S,)
        at (B,): the position of that target of each row which the losses of items take; weight float32 (B,)
        candidate: item (N,), distinct, with prefix (N,), the numbers of their l-1 prefixes, and content bags; with
        L_softmax, into it next (S,), the targets, and random (R,), the items that are drawn at random for the step, or
        all; log_q float32 (R,): log of how often each of these is drawn; where leaves are items, 1 + rows of it
        next_leaf (S, C): the items of the prefix of each target, 0 where there are no more, and next_choice (S,): its
        column among them
        item: X_i of the distinct items in use, rows by length, with groups and gid (N, l), when a loss needs it; and
        into its rows positive (B,), negative (B,), sibling (B,)
        sibling_weight float32 (B,): of the targets in L_c, 0 where there is no sibling
        index_rows (V,): the distinct positive and negative items; index_weight float32 (V,): of them in L_index;
        index_leaf (V, C), index_choice (V,): as those of next

    and beside them

        groups (of user and item): [begin, end, width] of the runs of rows that are encoded together, see
        `inputs.length_groups`. Always train.length_groups of them: under ZeRO 3 every pass of every rank must be alike
        num_tokens, num_positions: encoder positions of X_u and X_i in use, and with padding
        lengths: of X_u, of what of it the targets are decoded from, of X_i and of the X_i that are decoded:
        {name: (rows, sum of lengths, sum of their squares)}
        shard: names, for messages
    """

    def __init__(
        self,
        config: Config,
        catalog: Catalog,
        shards: list[str],
        rank: int,
        world_size: int,
        steps: range,
        epoch_steps: int,
    ):
        self.config, self.catalog, self.shards = config, catalog, shards
        per_rank = config.train.streams // world_size
        self.streams = range(rank * per_rank, (rank + 1) * per_rank)
        self.rank_batch = config.train.global_batch // world_size
        self.steps, self.epoch_steps = steps, epoch_steps

    def __iter__(self) -> Iterator[list[dict]]:
        worker = torch.utils.data.get_worker_info()
        index, count = (worker.id, worker.num_workers) if worker else (0, 1)
        streams = [_stream_steps(self.config, self.shards, s, self.steps, self.epoch_steps) for s in self.streams]
        for turn, (step, *parts) in enumerate(zip(self.steps, *streams, strict=True)):
            # Loader processes take steps in turn, as torch's DataLoader collects them in turn.
            if turn % count == index:
                yield self._step(step, parts)

    def _step(self, step: int, parts: list[list[tuple[Block, np.ndarray]]]) -> list[dict]:
        drawn = [_draw(self.config, self.catalog, step, s, part) for s, part in zip(self.streams, parts, strict=True)]
        random_items = np.concatenate([stream.pop("random_items") for stream in drawn])
        drawn = _concatenate(drawn)
        length = inputs.user_lengths(self.config, self.catalog, drawn["item_idx"])
        order = np.argsort(length, kind="stable")
        drawn = {name: values[order] for name, values in drawn.items()}
        shards = ", ".join(sorted({block.shard for part in parts for block, _ in part}))
        batches = []
        for begin, end in cut(length[order], self._item_positions(drawn), self.config.train.micro_tokens):
            # Too few rows for the groups: the last one is repeated, without weight.
            column = np.arange(begin, max(end, begin + self.config.train.length_groups))
            micro = {name: values[np.minimum(column, end - 1)] for name, values in drawn.items()}
            share = (column < end).astype(np.float32) / np.float32(self.rank_batch)
            batches.append(self._build(step, micro, share, random_items) | {"shard": shards})
        return batches

    def _item_positions(self, drawn: dict[str, np.ndarray]) -> np.ndarray:
        """int64 (B,): the positions of a target's items, each as long as the longest of them."""
        lengths = [inputs.item_lengths(self.config, self.catalog, drawn[name]) for name in self._item_names()]
        return len(lengths) * np.max(lengths, axis=0) if lengths else np.zeros(len(drawn["positive"]), np.int64)

    def _item_names(self) -> list[str]:
        """The columns of the items that a loss needs."""
        loss = self.config.loss
        pair = ["positive", "negative"] if loss.index or loss.bpr or loss.contrastive else []
        return [*pair, *(["sibling"] if loss.contrastive else [])]

    def _build(self, step: int, drawn: dict[str, np.ndarray], share: np.ndarray, random_items: np.ndarray) -> dict:
        """A micro-batch of targets sorted by length. share: float32 (B,), the weight of a target."""
        config, catalog = self.config, self.catalog
        history = History(*(drawn[name] for name in ("item_idx", "event", "recency", "gap")))
        batch = {"user": inputs.user_inputs(config, catalog, history), "weight": drawn["weight"] * share}
        if config.history.attention == "causal":
            # By the average of all users and not by the number here, which the cut and the ranks would decide.
            per_user = min(max(1.0, catalog.events_per_user - 1), config.history.train_items)
            row, column = np.nonzero(drawn["next_item"])
            target = drawn["next_item"][row, column]
            batch |= {"next_row": row, "next_at": column + 1, "at": drawn["column"] + 1}
            batch["next_weight"] = drawn["next_weight"][row, column] * share[row] / np.float32(per_user)
        else:
            target, at = drawn["positive"], batch["user"]["eos"]
            batch |= {"next_row": np.arange(len(at)), "next_at": at, "next_weight": batch["weight"], "at": at}
        batch["next_gid"] = catalog.gids[target]
        decoded = {"next": target} if config.loss.rec else {}
        if names := self._item_names():
            distinct, rows = self._distinct_by_length(np.stack([drawn[name] for name in names]))
            batch["item"] = inputs.item_inputs(config, catalog, distinct, key=config.seed * 1_000_003 + step)
            batch |= dict(zip(names, rows, strict=True))
            batch["sibling_weight"] = (drawn["sibling"] > 0) * share
            index_weight = np.bincount(rows[:2].ravel(), np.tile(share, 2), minlength=len(distinct))
            batch["index_rows"] = np.unique(rows[:2])
            batch["index_weight"] = index_weight[batch["index_rows"]].astype(np.float32)
            decoded |= {"index": distinct[batch["index_rows"]]} if config.loss.index else {}
        batch |= self._candidates(target, random_items, decoded)
        sides = [batch[side] for side in ("user", "item") if side in batch]
        for side in sides:
            side["groups"] = inputs.length_groups(side["eos"] + 1, config.train.length_groups)
        if "item" in batch:
            batch["item"]["gid"] = catalog.gids[distinct]
        return to_tensors(batch) | {
            "num_tokens": int(sum(side["mask"].sum() for side in sides)),
            "num_positions": sum((end - begin) * width for side in sides for begin, end, width in side["groups"]),
            "lengths": _lengths(batch),
        }

    def _candidates(self, target: np.ndarray, random_items: np.ndarray, decoded: dict[str, np.ndarray]) -> dict:
        """Items that are ranked: by L_softmax targets (S,) above random items (R,); and those below the prefixes of the
        items that are decoded, by {name of their arrays: items}, where leaves are items."""
        leaves = {}
        if self.config.model.codebooks == "prefix":
            leaves = {name: inputs.items_of_prefix(self.catalog, items) for name, items in decoded.items()}
        softmax = [target, random_items] if self.config.loss.softmax else []
        everything = [*softmax, *(leaf.ravel() for leaf, _ in leaves.values())]
        if not everything:
            return {}
        distinct = np.unique(np.concatenate(everything))
        distinct = distinct[distinct > 0]
        batch = {"candidate": {"item": distinct, "prefix": self.catalog.prefix(distinct, self.config.gid.branching)}}
        batch["candidate"] |= inputs.content_bags(self.config, self.catalog, distinct)
        for name, (leaf, choice) in leaves.items():
            row = np.where(leaf > 0, 1 + np.searchsorted(distinct, leaf), 0)
            batch |= {f"{name}_leaf": row, f"{name}_choice": choice}
        if softmax:
            batch |= {"next": np.searchsorted(distinct, target), "random": np.searchsorted(distinct, random_items)}
            rate = np.ones(len(random_items))
            if not softmax_is_exact(self.config, self.catalog):
                num_drawn = len(random_items) * self.config.train.streams // len(self.streams)  # of all ranks
                cdf = self.catalog.negative_cdf
                rate = num_drawn * (cdf[random_items] - cdf[random_items - 1])
            batch["log_q"] = np.log(rate).astype(np.float32)
        return batch

    def _distinct_by_length(self, item_idx: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The distinct items (N,) of item_idx (n, B), by the length of X_i, and int64 (n, B) into them."""
        distinct, rows = np.unique(item_idx, return_inverse=True)
        rows = rows.reshape(item_idx.shape)
        if distinct[0] == 0:  # "no sibling"; row 0 stands in, and its weight hides it
            distinct, rows = distinct[1:], np.maximum(rows - 1, 0)
        order = np.argsort(inputs.item_lengths(self.config, self.catalog, distinct), kind="stable")
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        missing = max(0, self.config.train.length_groups - len(distinct))
        return np.pad(distinct[order], (0, missing), mode="edge"), rank[rows]


def cut(user_length: np.ndarray, item_positions: np.ndarray, budget: int) -> list[tuple[int, int]]:
    """Partitions targets, sorted by the length of X_u, into micro-batches (begin, end) of at most `budget` positions.

    Counted as rectangles, every row as long as the longest of its kind: what the states of a pass take in memory.
    A target beyond the budget is a micro-batch of its own.

    Args:
        user_length: int64 (B,), ascending.
        item_positions: int64 (B,), of a target's items together, each as long as the longest of them.
        budget: 0: all targets at once.
    """
    if not budget:
        return [(0, len(user_length))]
    begin, cuts = 0, []
    while begin < len(user_length):
        width = user_length[begin:] + np.maximum.accumulate(item_positions[begin:])
        positions = np.arange(1, len(width) + 1) * width
        end = begin + max(1, int(np.searchsorted(positions, budget, side="right")))
        cuts.append((begin, end))
        begin = end
    return cuts


def _lengths(batch: dict) -> dict[str, tuple[int, int, int]]:
    """What `flops.step_flops` needs to know of a micro-batch of arrays."""
    lengths = {side: batch[side]["eos"] + 1 for side in ("user", "item") if side in batch}
    lengths["decoded user"] = batch["next_at"] + 1
    if "item" in batch:
        lengths["decoded item"] = lengths["item"][batch["index_rows"]]
    return {name: (len(length), int(length.sum()), int(np.square(length).sum())) for name, length in lengths.items()}


def filler(batch: dict) -> dict:
    """A micro-batch without weight, for ranks with fewer than others: all must make equally many passes.

    The others are making a pass of like size meanwhile, so a smaller one would end no sooner.
    """
    weights = {name: torch.zeros_like(batch[name]) for name in batch if name.endswith("weight")}
    return batch | weights | {"num_tokens": 0, "lengths": {}}


class Stream:
    """The training targets of one stream in the fixed order of an epoch; after the last shard it begins again.

    Streams hold unequal numbers of targets but give equally many to an epoch: the surplus of a long one waits for
    the next epoch, which deals the shards anew.
    """

    def __init__(self, config: Config, shards: list[str], stream: int, epoch: int):
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
                rng = np.random.default_rng([*self._seed, shard, again])
                for block in samples.read_blocks(self._shards[shard]):
                    if (self._config.history.order, self._config.history.attention) == ("set", "causal"):
                        block = samples.in_random_order(block, rng)
                    targets = samples.train_targets(self._config, block, rng)
                    found |= len(targets) > 0
                    yield block, rng.permutation(targets)
            if not found:
                raise ValueError(self._nothing_to_learn())

    def _nothing_to_learn(self) -> str:
        """The message where no user of the stream has two train events: what to do depends on the other streams."""
        others = (block for shard in self._shards for block in samples.read_blocks(shard))
        if not any((block.item_idx.lengths > 1).any() for block in others):
            return (
                "no user of the corpus has two train events, one to be predicted from the other: nothing can be "
                "learned; build it so that less is held out (etl.split), or of a log with more events of a user"
            )
        names = ", ".join(self._shards[shard] for shard in self._order)
        return (
            f"no user in {names} has two train events, but users in other shards have; use fewer train.streams than "
            f"{self._config.train.streams}, so that a stream has more shards"
        )


def _stream_steps(
    config: Config, shards: list[str], stream: int, steps: range, epoch_steps: int
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


def _draw(
    config: Config, catalog: Catalog, step: int, stream: int, parts: list[tuple[Block, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Histories, positives, negatives and siblings of a stream's part of a step, as arrays over its targets; and
    random_items, its part of them.

    With causal attention the positive is any of the window's targets, the one after item `column`; next_item and
    next_weight (B, n) are what comes after each item of the history.
    """
    rng = np.random.default_rng([config.seed, step, stream])
    drawn = []
    for block, targets in parts:
        columns = vars(samples.train_histories(config, catalog, block, targets, rng))
        if config.history.attention == "causal":
            last = (columns["item_idx"] > 0).sum(1) - 1
            column = rng.integers(0, last + 1)
            after = (targets - last)[:, None] + np.arange(config.history.train_items)
            there = after <= targets[:, None]
            after = np.where(there, after, 0)
            columns["column"] = column
            columns["next_item"] = np.where(there, block.item_idx.values[after], 0).astype(np.int64)
            columns["next_weight"] = catalog.event_weights[block.event[after]]
            targets = targets - last + column
        positive = block.item_idx.values[targets].astype(np.int64)
        drawn.append(
            columns
            | {
                "positive": positive,
                "weight": catalog.event_weights[block.event[targets]],
                "negative": samples.draw_negatives(catalog, block, targets, rng),
                "sibling": samples.draw_siblings(catalog, positive, rng),
            }
        )
    return _concatenate(drawn) | {"random_items": _random_items(config, catalog, stream, rng)}


def _random_items(config: Config, catalog: Catalog, stream: int, rng: np.random.Generator) -> np.ndarray:
    """A stream's part, int64, of what L_softmax ranks the targets among: as many in each, so that all ranks together
    draw the same at any number of them; or each item once, dealt to the streams, when there are no more of them."""
    if not config.loss.softmax:
        return np.zeros(0, np.int64)
    if softmax_is_exact(config, catalog):
        return np.arange(1 + stream, catalog.num_items + 1, config.train.streams)
    uniform = rng.random(-(-config.train.negatives // config.train.streams))
    return np.searchsorted(catalog.negative_cdf, uniform, side="right")


def softmax_is_exact(config: Config, catalog: Catalog) -> bool:
    """Whether L_softmax is over all items, as drawing `train.negatives` of them would be no less work."""
    return catalog.num_items <= config.train.negatives


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

    A batch never crosses a shard, so that what is computed of a user is the same at any number of ranks; within a
    shard users are batched by length, as that pads little. Yields

        user: X_u of B users; user_idx (B,), 0 in batches that only fill up
        pair_row (P,), pair_item (P,): the targets, as rows of user and item_idx; a user may have several
        seen_row (S,), seen_item (S,): the whole histories as rows of user and item_idx, whatever the encoder sees
    """
    shards = shard_paths(corpus, split)
    count, last = 0, None
    for number in range(rank, len(shards), world_size):
        block = samples.read_shard(shards[number])
        if sample:
            block = samples.take_users(block, sample[number])
        for last in user_batches(config, catalog, block, batch, len(block.user_idx)):
            yield last
            count += 1
    if last is None:  # more ranks than shards
        block = samples.take_users(samples.read_shard(shards[0]), np.arange(1))
        last = next(user_batches(config, catalog, block, batch, 0))
    filler = last | {"user_idx": torch.zeros_like(last["user_idx"])}
    filler |= {name: last[name][:0] for name in ("pair_row", "pair_item")}
    for _ in range(count, num_eval_batches(corpus, split, batch, world_size, sample)):
        yield filler


def user_batches(config: Config, catalog: Catalog, block: Block, batch: int, key: int) -> Iterator[dict]:
    """All users of a block, batched by length, as `eval_batches` yields them. `key`: of the samples of order 'set'."""
    history = samples.eval_histories(config, catalog, block, np.random.default_rng([config.seed, key]))
    order = np.argsort(inputs.user_lengths(config, catalog, history.item_idx), kind="stable")
    for begin in range(0, len(order), batch):
        yield _eval_batch(config, catalog, block, history, order[begin : begin + batch])


def _eval_batch(config: Config, catalog: Catalog, block: Block, history: History, rows: np.ndarray) -> dict:
    items = block.item_idx.take(rows)
    is_target = Ragged(block.is_target, block.item_idx.offsets).take(rows).values
    row = np.repeat(np.arange(len(rows)), items.lengths)
    batch = {
        "user": inputs.user_inputs(config, catalog, History(*(array[rows] for array in vars(history).values()))),
        "user_idx": block.user_idx[rows],
        "pair_row": row[is_target],
        "pair_item": items.values[is_target].astype(np.int64),
        "seen_row": row[~is_target],
        "seen_item": items.values[~is_target].astype(np.int64),
    }
    return to_tensors(batch)
