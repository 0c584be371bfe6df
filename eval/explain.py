"""Why an item was recommended: what its score is without each item of the history in turn (occlusion).

The change is exact, of the score that the items are ranked by, but of one item at a time: of two alike in a history
either may do, and then neither moves the score much.
"""

from dataclasses import dataclass

import numpy as np
import torch

from contract.artifacts import Artifact
from contract.metrics import rows_of, target_ranks
from contract.schema import Ragged
from contract.settings import Config
from eval.users import EvalUsers
from trainer import inputs, loader, packing, samples
from trainer.inputs import Catalog, History
from trainer.recommender import Recommender
from trainer.samples import Block

NUM_PEOPLE, NUM_SHOWN, NUM_REASONS = 10, 10, 3


@dataclass(frozen=True)
class Event:
    item_idx: int
    event: int  # 0 unknown, else 1 + position in the corpus manifest's "events"
    ts: int  # ms or NO_TIME


@dataclass(frozen=True)
class Recommended:
    item_idx: int
    score: float
    is_target: bool
    # (position in the history, score minus the score without it), what moved it most first
    reasons: list[tuple[int, float]]


@dataclass(frozen=True)
class Person:
    """A user, what the model saw and what it made of it."""

    num_known: int  # events of the whole history
    history: list[Event]  # what the encoder saw, in its order
    targets: list[tuple[Event, int]]  # with the rank in the list that was decoded, 0: not in it
    recommended: list[Recommended]


def choose_users(users: EvalUsers, recommended: np.ndarray, seed: int) -> np.ndarray:
    """int64: rows of NUM_PEOPLE users drawn at random; half of them, as far as there are such, have a target in their
    first NUM_SHOWN items. These and the others take turns.

    Args:
        recommended: int (N, k) item_idx.
    """
    rank_T = target_ranks(recommended[:, :NUM_SHOWN], users.targets)
    hit_N = np.bincount(rows_of(users.targets)[rank_T > 0], minlength=len(users)) > 0
    drawn = np.random.default_rng(seed).permutation(len(users))
    hits, misses = drawn[hit_N[drawn]], drawn[~hit_N[drawn]]
    num_hits = min(len(hits), max(NUM_PEOPLE // 2, NUM_PEOPLE - len(misses)))
    hits, misses = hits[:num_hits], misses[: NUM_PEOPLE - num_hits]
    turn = np.concatenate([2 * np.arange(len(hits)), 1 + 2 * np.arange(len(misses))])
    return np.concatenate([hits, misses])[np.argsort(turn)]


def explain(
    recommender: Recommender, corpus: Artifact, users: EvalUsers, recommended: np.ndarray, rows: np.ndarray
) -> list[Person]:
    """The users of these rows, with the first NUM_SHOWN of what was recommended to them.

    Args:
        recommended: int (N, k) item_idx, as `Recommender.recommend` returned it for all users.
    """
    seen = _visible(recommender.config, recommender.catalog, corpus, users.user_idx[rows])
    chosen = users.take(np.sort(rows))
    rank_T = Ragged(target_ranks(recommended[np.sort(rows)], chosen.targets), chosen.targets.offsets)
    people = []
    for row in rows:
        block, visible = seen[int(users.user_idx[row])]
        place = int(np.searchsorted(np.sort(rows), row))
        events = [
            Event(int(item), int(event), int(ts))
            for item, event, ts in zip(block.item_idx.values, block.event, block.ts, strict=True)
        ]
        items = recommended[row, :NUM_SHOWN]
        items = items[items > 0]
        targets = [event for event, is_target in zip(events, block.is_target, strict=True) if is_target]
        people.append(
            Person(
                len(events) - len(targets),
                [events[i] for i in visible],
                list(zip(targets, rank_T.row(place).tolist(), strict=True)),
                _reasons(recommender, block, visible, items, {event.item_idx for event in targets}),
            )
        )
    return people


def _visible(
    config: Config, catalog: Catalog, corpus: Artifact, user_idx: np.ndarray
) -> dict[int, tuple[Block, np.ndarray]]:
    """{user_idx: the user alone, and the places of the events that the encoder saw, in its order}."""
    found = {}
    for shard in loader.shard_paths(corpus, config.eval.split):
        block = samples.read_shard(shard)
        rows = np.flatnonzero(np.isin(block.user_idx, user_idx))
        if len(rows):
            # As `loader.eval_batches` draws it.
            rng = np.random.default_rng([config.seed, len(block.user_idx)])
            history = samples.eval_histories(config, catalog, block, rng)
            for row in rows:
                user = samples.take_users(block, row[None])
                known = np.flatnonzero(~user.is_target)
                items = history.item_idx[row][history.item_idx[row] > 0]
                if config.history.order == "time":
                    visible = known[len(known) - len(items) :]
                else:
                    visible = known[[np.flatnonzero(user.item_idx.values[known] == item)[0] for item in items]]
                found[int(block.user_idx[row])] = user, visible.astype(np.int64)
    return found


@torch.no_grad()
def _reasons(
    recommender: Recommender, block: Block, visible: np.ndarray, items: np.ndarray, targets: set[int]
) -> list[Recommended]:
    config, catalog = recommender.config, recommender.catalog
    history = without_each(config, catalog, block, visible)
    scores = []
    for begin in range(0, len(history.item_idx), config.eval.batch):
        part = History(*(values[begin : begin + config.eval.batch] for values in vars(history).values()))
        user = packing.to_tensors(inputs.user_inputs(config, catalog, part))
        item_BN = torch.from_numpy(items.astype(np.int64)).expand(len(part.item_idx), -1)
        scores.append(recommender.score({"user": user}, item_BN).cpu().numpy())
    whole, *without = np.concatenate(scores)
    moved_JN = whole - np.array(without).reshape(len(visible), len(items))
    return [
        Recommended(
            int(item),
            float(whole[n]),
            int(item) in targets,
            [(int(j), float(moved_JN[j, n])) for j in np.argsort(-np.abs(moved_JN[:, n]), kind="stable")[:NUM_REASONS]],
        )
        for n, item in enumerate(items)
    ]


def without_each(config: Config, catalog: Catalog, block: Block, visible: np.ndarray) -> History:
    """n + 1 histories: of all `visible` events (n,) of the one user of `block`, then without the first, the second ...

    What is left looks as if the event had never been: recency and gaps are those of the events that are there.
    """
    rows = [visible, *(np.delete(visible, j) for j in range(len(visible)))]
    events = np.concatenate(rows)
    items = Ragged(block.item_idx.values[events], np.cumsum([0, *map(len, rows)]))
    if config.history.order == "time" and len(events):
        nobody, no_target = np.zeros(len(rows), np.int64), np.zeros(len(events), bool)
        alone = Block(nobody, items, block.ts[events], block.event[events], no_target, block.shard)
        return samples.eval_histories(config, catalog, alone, np.random.default_rng(0))
    # A set is not drawn again: the others stay in the order in which they were. Nothing looks the same in any order.
    item_idx = np.zeros((len(rows), max(1, len(visible))), np.int64)
    item_idx[rows_of(items), inputs.ragged_arange(items.lengths)] = items.values
    return History(item_idx, *(np.zeros_like(item_idx) for _ in range(3)))
