"""Ranking metrics over all users and the whole catalog, with intervals.

N: users, k: cutoff, M: metrics. Metric names carry their cutoff: `recall@10`.
"""

from collections.abc import Sequence

import numpy as np

from contract.schema import Ragged

NUM_RESAMPLES = 1000
LEVEL = 0.95
# Bounds the memory of a chunk of resamples: 8 bytes each.
MAX_WEIGHTS = 1 << 23


def ranking_metrics(recommended: np.ndarray, targets: Ragged, cutoffs: Sequence[int]) -> dict[str, np.ndarray]:
    """Metrics of each user's ranking, where an item is relevant or not.

        recall@k = hits in the first k / number of relevant items
        ndcg@k   = sum over hits at rank r <= k of 1 / log2(r + 1), as a share of the best possible sum,
                   which has min(k, number of relevant items) terms

    Args:
        recommended: int (N, k_max) item_idx, best first; 0 is no recommendation. No item twice in a row.
        targets: N rows of relevant item_idx; an item counts once.
        cutoffs: the values of k.

    Returns:
        {name: float64 (N,)}, recall at each cutoff, then ndcg at each.

    Raises:
        ValueError: a cutoff beyond k_max, another number of rows, or a user without targets.
    """
    hits_NK, num_relevant_N = _hits(recommended, targets)
    if max(cutoffs) > recommended.shape[1]:
        raise ValueError(f"cutoff {max(cutoffs)} needs as many recommendations per user, not {recommended.shape[1]}")
    recall = {f"recall@{k}": hits_NK[:, :k].sum(axis=1) / num_relevant_N for k in cutoffs}
    discount_K = 1 / np.log2(np.arange(recommended.shape[1]) + 2)
    ideal_K = np.cumsum(discount_K)
    ndcg = {f"ndcg@{k}": hits_NK[:, :k] @ discount_K[:k] / ideal_K[np.minimum(num_relevant_N, k) - 1] for k in cutoffs}
    return recall | ndcg


def _hits(recommended: np.ndarray, targets: Ragged) -> tuple[np.ndarray, np.ndarray]:
    """bool (N, k_max), and the number of distinct relevant items, int64 (N,)."""
    num_users = len(targets)
    if len(recommended) != num_users:
        raise ValueError(f"{len(recommended)} rows of recommendations for {num_users} users")
    # A (user, item) pair as one integer makes the membership test a single sorted search.
    stride = 1 + max(recommended.max(initial=0), targets.values.max(initial=0)).astype(np.int64)
    users = np.arange(num_users)
    relevant = np.unique(np.repeat(users, targets.lengths) * stride + targets.values)
    num_relevant_N = np.bincount(relevant // stride, minlength=num_users)
    if num_users and not num_relevant_N.all():
        raise ValueError(f"user in row {num_relevant_N.argmin()} has no targets: recall is not defined")
    return np.isin(users[:, None] * stride + recommended, relevant) & (recommended != 0), num_relevant_N


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
