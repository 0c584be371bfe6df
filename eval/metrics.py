"""Ranking metrics of several models over the same users, with intervals.

N: users, k: cutoff, M: metrics.
"""

from collections.abc import Sequence

import numpy as np

from contract.metrics import ranking_metrics
from contract.schema import Ragged

NUM_RESAMPLES = 1000
LEVEL = 0.95
# Bounds the memory of a chunk of resamples: 8 bytes each.
MAX_WEIGHTS = 1 << 23


def coverage(recommended: np.ndarray, num_items: int, cutoffs: Sequence[int]) -> dict[str, float]:
    """{coverage@k: share of the catalog that is in somebody's first k}."""
    return {f"coverage@{k}": (np.unique(recommended[:, :k]) != 0).sum() / num_items for k in cutoffs}


def summary(per_user: dict[str, np.ndarray]) -> dict[str, float]:
    """Means over the users, and their denominator, `num_users`. Raises ValueError when there are no users."""
    num_users = len(next(iter(per_user.values())))
    if num_users == 0:
        raise ValueError("there are no users to average over")
    return {name: float(values.mean()) for name, values in per_user.items()} | {"num_users": num_users}


def bootstrap_interval(per_user: dict[str, np.ndarray], seed: int) -> dict[str, tuple[float, float]]:
    """Percentile bootstrap over users of each mean: {name: (low, high)} of the middle 95%.

    All entries are computed on the same resamples, so that the interval of a difference between two models
    is that of another entry: `{"lead": ours["ndcg@10"] - theirs["ndcg@10"]}` (a paired bootstrap).
    """
    rng = np.random.default_rng(seed)
    values_NM = np.stack(list(per_user.values()), axis=1)
    num_users = len(values_NM)
    chunk = max(1, MAX_WEIGHTS // num_users)
    # Drawing N users with replacement is drawing how often each occurs; the mean is then a matrix product.
    means = [
        rng.multinomial(num_users, np.full(num_users, 1 / num_users), size=min(chunk, NUM_RESAMPLES - start))
        @ values_NM
        / num_users
        for start in range(0, NUM_RESAMPLES, chunk)
    ]
    low_M, high_M = np.quantile(np.concatenate(means), [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return {name: (float(low), float(high)) for name, low, high in zip(per_user, low_M, high_M, strict=True)}


def compare(
    rankings: dict[str, np.ndarray], targets: Ragged, cutoffs: Sequence[int], num_items: int, seed: int
) -> tuple[dict[str, dict], dict[str, dict]]:
    """Measures each model's recommendations, int (N, k_max), for the same users.

    Returns:
        models: {model: {metric: {"mean", "low", "high"}}}; coverage has no interval.
        lead: {metric: {"mean", "low", "high", "over"}}, the first model minus the best of the others, which
            `over` names; empty when there is only one model. Parts of the first model, whose names begin with its
            name, are no others.
    """
    per_user = {model: ranking_metrics(recommended, targets, cutoffs) for model, recommended in rankings.items()}
    means = {model: summary(values) for model, values in per_user.items()}
    ours, *others = rankings
    others = [model for model in others if not model.startswith(ours)]
    columns = {(model, name): values for model, metrics in per_user.items() for name, values in metrics.items()}
    over = {name: max(others, key=lambda model: means[model][name]) for name in per_user[ours] if others}
    columns |= {("", name): per_user[ours][name] - per_user[other][name] for name, other in over.items()}
    intervals = bootstrap_interval(columns, seed)

    def estimate(model: str, name: str) -> dict:
        low, high = intervals[model, name]
        return {"mean": float(columns[model, name].mean()), "low": low, "high": high}

    models = {
        model: {name: estimate(model, name) for name in per_user[model]}
        | {name: {"mean": float(v)} for name, v in coverage(recommended, num_items, cutoffs).items()}
        for model, recommended in rankings.items()
    }
    return models, {name: estimate("", name) | {"over": other} for name, other in over.items()}
