"""Where a model is good and where it is not: the same metrics over some of the users, or some of the targets.

A slice of users counts these users alone, with all their targets. A slice of targets takes these targets alone as
relevant and counts the users who have any of them; an item that is another target of theirs then counts as a miss.
A kind of slice that does not divide the users or targets at hand is left out.

N: users, T: targets, I: items.
"""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from contract.metrics import rows_of
from contract.schema import NO_TIME
from eval import metrics
from eval.metrics import Lists
from eval.users import EvalUsers

CUTOFF = 10
HISTORY_BINS = (0, 1, 5, 10, 20, 50)  # events where a bin begins; the last one has no end

MINUTE, HOUR, DAY = 60_000, 3_600_000, 86_400_000  # ms


@dataclass(frozen=True)
class Slice:
    """Some targets of all."""

    kind: str  # history, activity, recency: of users; popularity, event: of targets
    name: str  # the same for any data, but for the event types
    what: str  # in words
    kept: np.ndarray  # bool (T,)


def measure(models: dict[str, Lists], users: EvalUsers, slices: Iterator[Slice], k_max: int, seed: int) -> list[dict]:
    """recall and ndcg at CUTOFF, or at the largest cutoff k_max when that is less, JSON-ready:

    [{"kind", "name", "what", "num_users", "num_targets", "models", "lead"}], the last two as of `metrics.compare`
    """
    k, measured = min(CUTOFF, k_max), []
    for one in slices:
        part, lead = metrics.compare(models, users.targets, [k], seed, one.kept, (f"recall@{k}", f"ndcg@{k}"))
        num_users = len(np.unique(rows_of(users.targets)[one.kept]))
        facts = {"kind": one.kind, "name": one.name, "what": one.what, "num_users": num_users}
        measured.append(facts | {"num_targets": int(one.kept.sum()), "models": part, "lead": lead})
    return measured


def read_slices(users: EvalUsers, num_train: np.ndarray, events: list[str], has_time: bool) -> Iterator[Slice]:
    """All slices, one kind after the other.

    Args:
        users: with times and events.
        num_train: int (I + 1,) train events of an item.
        events: names of the event types, 1 and following.
        has_time: times are dates.
    """
    user_T = rows_of(users.targets)
    of_users = {"history": by_history(users.history.lengths), "activity": by_activity(users.history.lengths)}
    if has_time:
        of_users["recency"] = by_recency(users)
    of_targets = {"popularity": by_popularity(num_train, users.targets.values)}
    of_targets["event"] = by_event(users.target_event, events)
    for kind, parts in of_users.items():
        yield from _filled(kind, [(name, what, mask_N[user_T]) for name, what, mask_N in parts])
    for kind, parts in of_targets.items():
        yield from _filled(kind, parts)


def _filled(kind: str, parts: list[tuple[str, str, np.ndarray]]) -> list[Slice]:
    filled = [Slice(kind, name, what, mask) for name, what, mask in parts if mask.any()]
    return filled if len(filled) > 1 else []


def by_history(num_events: np.ndarray) -> list[tuple[str, str, np.ndarray]]:
    """Users by the number of events in their history (N,)."""
    which = np.searchsorted(HISTORY_BINS, num_events, side="right") - 1
    names = [f"{low}-{high - 1}" for low, high in itertools.pairwise(HISTORY_BINS)]
    names = ["0", *names[1:], f"{HISTORY_BINS[-1]}_or_more"]
    return [(name, f"{name.replace('_', ' ')} events in the history", which == i) for i, name in enumerate(names)]


def by_activity(num_events: np.ndarray) -> list[tuple[str, str, np.ndarray]]:
    """The long tail: the half of the users, rounded down, whose histories are shortest; ties by user_idx, which is a
    keyed permutation of the users and so no property of theirs."""
    long_tail = np.zeros(len(num_events), bool)
    long_tail[np.argsort(num_events, kind="stable")[: len(num_events) // 2]] = True
    return [
        ("long_tail", "the half of the users with the shortest histories", long_tail),
        ("other_half", "the other half", ~long_tail),
    ]


def by_recency(users: EvalUsers) -> list[tuple[str, str, np.ndarray]]:
    """Quarters of the users by the time from the last event of the history to their first target, or, when the targets
    have no times, to the last event that any of the users has. Users of equal times are in the same quarter; those
    whose times are unknown are in none."""
    first_target_N = users.target_ts[users.targets.offsets[:-1]]
    if (first_target_N == NO_TIME).all():
        first_target_N = np.full(len(users), users.last_ts.max(initial=NO_TIME))
    known = (users.last_ts != NO_TIME) & (first_target_N != NO_TIME)
    elapsed = np.where(known, first_target_N - users.last_ts, 0)
    if not known.any():
        return []
    edges = np.quantile(elapsed[known], [0.25, 0.5, 0.75], method="inverted_cdf")
    which = np.searchsorted(edges, elapsed)
    low, mid, high = (duration(edge) for edge in edges)
    words = [f"up to {low}", f"{low} to {mid}", f"{mid} to {high}", f"more than {high}"]
    return [(f"q{i + 1}", f"last seen {text} before", known & (which == i)) for i, text in enumerate(words)]


def duration(ms: float) -> str:
    """90 000 -> 1.5 min."""
    for size, unit in ((DAY, "days"), (HOUR, "h"), (MINUTE, "min")):
        if ms >= size:
            return f"{ms / size:.1f} {unit}"
    return f"{ms / 1000:.0f} s"


def by_popularity(num_train: np.ndarray, item_idx: np.ndarray) -> list[tuple[str, str, np.ndarray]]:
    """Targets (T,) by the train events of the item: of the items, most popular first and ties by item_idx, those that
    the first third of all train events is on are the head, the next third the middle, the last the tail; items that
    train does not know are cold."""
    order = np.argsort(-num_train, kind="stable")
    before = np.cumsum(num_train[order]) - num_train[order]
    third = np.zeros(len(num_train), np.int64)
    third[order] = np.minimum(3 * before // max(1, num_train.sum()), 2)
    third[num_train == 0] = 3
    texts = []
    for name, what in (("head", "most"), ("mid", "medium"), ("tail", "least")):
        num = num_train[third == len(texts)]
        extent = f", {num.min():,} to {num.max():,} train events each" if len(num) else ""
        texts.append((name, f"the {len(num):,} {what} popular items{extent}"))
    num_cold = (num_train[1:] == 0).sum()
    texts.append(("cold", f"the {num_cold:,} items without train events"))
    return [(name, what, third[item_idx] == i) for i, (name, what) in enumerate(texts)]


def by_event(event: np.ndarray, events: list[str]) -> list[tuple[str, str, np.ndarray]]:
    """Targets (T,) by their event type, 1 + position in `events`; those of unknown type are in none."""
    # MLflow allows no other characters in a metric's name.
    return [(re.sub(r"[^\w. -]", "_", name), f"{name} events", event == i) for i, name in enumerate(events, 1)]
