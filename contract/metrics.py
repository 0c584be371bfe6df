"""Ranking metrics over users and the whole catalog, of training's validation as of the evaluation.

N: users, k: cutoff. Metric names carry their cutoff: `recall@10`.
"""

from collections.abc import Sequence

import numpy as np

from contract.schema import Ragged


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
