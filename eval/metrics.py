"""Ranking metrics of several models over the same users, with intervals.

All that is reported of users is a mean over them, or a ratio of two. Of a model's lists only the ranks of the targets
are kept, so that millions of users and many models fit into memory; slices are measured on the same ranks.

N: users, T: targets, I: items, G: groups of users, R: resamples, k: cutoff.
"""

import functools
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from contract.metrics import first_occurrences, metrics_of_ranks, rows_of, target_ranks
from contract.schema import Ragged

NUM_RESAMPLES = 1000
LEVEL = 0.95
# Up to so many users are resampled one by one; of more, so many groups are. Dense ids are a keyed permutation, so that
# every so many-th user is a random group, and the spread of the means of random groups tells that of users: the width
# of an interval is then itself known to 1 / sqrt(2 * 10,000) = 0.7%, better than 1000 resamples tell it.
MAX_GROUPS = 10_000
RESAMPLES_AT_ONCE, USERS_AT_ONCE = 50, 1 << 16


@dataclass(frozen=True)
class Lists:
    """What is kept of a model's recommendations."""

    rank: np.ndarray  # int32 (T,): of each target in its user's list; 1 is first, 0 is nowhere
    coverage: dict[str, float]  # {coverage@k: share of the catalog that is in somebody's first k}
    popularity: dict[str, np.ndarray]  # {arp@k: float64 (N,), mean train events of a user's first k}


def read_lists(recommended: np.ndarray, targets: Ragged, cutoffs: Sequence[int], num_train: np.ndarray) -> Lists:
    """Args: recommended: int (N, k_max) item_idx, best first, 0 is none; num_train: int (I + 1,) train events."""
    shown = {k: np.zeros(len(num_train), bool) for k in cutoffs}
    popularity = {f"arp@{k}": np.zeros(len(recommended)) for k in cutoffs}
    for begin in range(0, len(recommended), USERS_AT_ONCE):
        items_NK = recommended[begin : begin + USERS_AT_ONCE]
        sum_NK, count_NK = np.cumsum(num_train[items_NK], axis=1), np.cumsum(items_NK > 0, axis=1)
        for k in cutoffs:
            shown[k][items_NK[:, :k]] = True
            mean_N = sum_NK[:, k - 1] / np.maximum(count_NK[:, k - 1], 1)
            popularity[f"arp@{k}"][begin : begin + len(items_NK)] = mean_N
    coverage = {f"coverage@{k}": float(shown[k][1:].sum() / (len(num_train) - 1)) for k in cutoffs}
    return Lists(target_ranks(recommended, targets), coverage, popularity)


def compare(
    models: dict[str, Lists],
    targets: Ragged,
    cutoffs: Sequence[int],
    seed: int,
    kept: np.ndarray | None = None,
    names: Iterable[str] = (),
) -> tuple[dict[str, dict], dict[str, dict]]:
    """Measures each model over the same users.

    Args:
        kept: bool (T,): only these targets are relevant, and only the users that have any of them count.
        names: only these metrics; empty: recall, ndcg, mrr and arp at each cutoff.

    Returns:
        models: {model: {metric: {"mean", "low", "high"}}}
        lead: {metric: {"mean", "low", "high", "over"}}, see `lead_of`

    Raises:
        ValueError: there are no users.
    """
    user_T = rows_of(targets)
    place = np.arange(len(user_T)) if kept is None else np.flatnonzero(kept)
    place = place[first_occurrences(user_T[place], targets.values[place])]
    users, row = np.unique(user_T[place], return_inverse=True)
    if not len(users):
        raise ValueError("there are no users to average over")
    sums = {}
    for model, lists in models.items():
        per_user = metrics_of_ranks(lists.rank[place], row, len(users), cutoffs)
        per_user |= {name: values[users] for name, values in lists.popularity.items()}
        sums |= {(model, name): in_groups(values) for name, values in per_user.items() if not names or name in names}
    return estimates(sums, in_groups(np.ones(len(users))), seed)


def recall_curves(models: dict[str, Lists], targets: Ragged, k_max: int) -> dict[str, list[float]]:
    """{model: recall@1 .. recall@k_max}, means over the users."""
    user_T = rows_of(targets)
    place = first_occurrences(user_T, targets.values)
    num_relevant_N = np.bincount(user_T[place], minlength=len(targets))
    share = 1 / num_relevant_N[user_T[place]] / len(targets)
    found = {model: np.bincount(lists.rank[place], share, k_max + 1)[1 : k_max + 1] for model, lists in models.items()}
    return {model: np.cumsum(by_rank).tolist() for model, by_rank in found.items()}


def in_groups(values: np.ndarray) -> np.ndarray:
    """float64 (G,): sums of values (N,) over the users g, g + G, g + 2 G, .. for each group g."""
    num_groups = min(len(values), MAX_GROUPS)
    return np.pad(values, (0, -len(values) % num_groups)).reshape(-1, num_groups).sum(axis=0, dtype=np.float64)


def resample(sums: dict[Hashable, np.ndarray], seed: int) -> dict[Hashable, np.ndarray]:
    """{name: float64 (R,)}: totals of sums (G,) over groups that are drawn with replacement, as many as there are.

    All entries are totalled over the same draws, so that what is made of several, such as a ratio or the difference
    of two models, is that of the same users (a paired bootstrap).
    """
    sums_GM = np.stack(list(sums.values()), axis=1)
    times_RG = _draws(len(sums_GM), seed)
    parts = [
        times_RG[begin : begin + RESAMPLES_AT_ONCE].astype(np.float64) @ sums_GM
        for begin in range(0, NUM_RESAMPLES, RESAMPLES_AT_ONCE)
    ]
    return dict(zip(sums, np.concatenate(parts).T, strict=True))


@functools.lru_cache(maxsize=2)
def _draws(num_groups: int, seed: int) -> np.ndarray:
    """uint8 (R, G): how often each group is drawn in each resample."""
    drawn = np.random.default_rng(seed).integers(num_groups, size=(NUM_RESAMPLES, num_groups))
    return np.stack([np.bincount(groups, minlength=num_groups) for groups in drawn]).astype(np.uint8)


def interval(resampled: np.ndarray) -> tuple[float, float]:
    """The middle 95% (percentile bootstrap)."""
    low, high = np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def bootstrap_interval(per_user: dict[Hashable, np.ndarray], seed: int) -> dict[Hashable, tuple[float, float]]:
    """{name: interval of the mean of values (N,)}; all are of the same resamples, so that a difference of two models
    may be an entry as well."""
    sums = {name: in_groups(values) for name, values in per_user.items()}
    num_users = in_groups(np.ones(len(next(iter(per_user.values())))))
    *drawn, drawn_users = resample(sums | {"": num_users}, seed).values()
    return {name: interval(totals / drawn_users) for name, totals in zip(sums, drawn, strict=True)}


def estimates(
    sums: dict[tuple[str, str], np.ndarray], num_users: np.ndarray, seed: int
) -> tuple[dict[str, dict], dict[str, dict]]:
    """Means with intervals of {(model, metric): sums (G,) over the users of a group}.

    Args:
        num_users: (G,) users of each group.

    Returns: as `compare` does.
    """
    total = num_users.sum()
    means = {key: float(values.sum() / total) for key, values in sums.items()}
    resampled = resample(sums | {"num_users": num_users}, seed)
    drawn = resampled.pop("num_users")
    return with_intervals(means, {key: values / drawn for key, values in resampled.items()})


def with_intervals(
    means: dict[tuple[str, str], float], resampled: dict[tuple[str, str], np.ndarray]
) -> tuple[dict[str, dict], dict[str, dict]]:
    """Of {(model, metric): ..}: {model: {metric: {"mean", "low", "high"}}}, and the lead of the first model:

    {metric: {"mean", "low", "high", "over"}}, the first model minus the best of the others, which `over` names; empty
    when there is only one model, and without arp, of which more is not better. Parts of the first model, whose names
    begin with its name, are no others.
    """

    def estimate(mean: float, values: np.ndarray) -> dict:
        low, high = interval(values)
        return {"mean": mean, "low": low, "high": high}

    if not means:
        return {}, {}
    models, lead = {}, {}
    for (model, name), mean in means.items():
        models.setdefault(model, {})[name] = estimate(mean, resampled[model, name])
    ours, *others = models
    others = [model for model in others if not model.startswith(ours)]
    for name in models[ours] if others else ():
        if not name.startswith("arp"):
            over = max(others, key=lambda model, name=name: means[model, name])
            difference = resampled[ours, name] - resampled[over, name]
            lead[name] = estimate(means[ours, name] - means[over, name], difference) | {"over": over}
    return models, lead
