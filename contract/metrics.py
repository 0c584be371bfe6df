"""Ranking metrics over users and the whole catalog, of training's validation as of the evaluation.

N: users, T: targets, k: cutoff. Metric names carry their cutoff: `recall@10`.
"""

from collections.abc import Sequence

import numpy as np

from contract.schema import Ragged

# Bounds the memory of comparing lists with targets: a byte or a few for each.
MAX_CELLS = 1 << 22


def ranking_metrics(recommended: np.ndarray, targets: Ragged, cutoffs: Sequence[int]) -> dict[str, np.ndarray]:
    """Metrics of each user's ranking, where an item is relevant or not.

    Args:
        recommended: int (N, k_max) item_idx, best first; 0 is no recommendation. No item twice in a row.
        targets: N rows of relevant item_idx; an item counts once.
        cutoffs: the values of k.

    Returns:
        {name: float64 (N,)}, recall at each cutoff, then ndcg, then mrr, see `metrics_of_ranks`.

    Raises:
        ValueError: a cutoff beyond k_max, another number of rows, or a user without targets.
    """
    if max(cutoffs) > recommended.shape[1]:
        raise ValueError(f"cutoff {max(cutoffs)} needs as many recommendations per user, not {recommended.shape[1]}")
    rank_T, user_T = target_ranks(recommended, targets), rows_of(targets)
    once = first_occurrences(user_T, targets.values)
    return metrics_of_ranks(rank_T[once], user_T[once], len(targets), cutoffs)


def rows_of(targets: Ragged) -> np.ndarray:
    """int64 (T,): the row of each value."""
    return np.repeat(np.arange(len(targets)), targets.lengths)


def first_occurrences(user: np.ndarray, item: np.ndarray) -> np.ndarray:
    """int64, ascending: places of the pairs (user, item), each once, at its first occurrence."""
    pair = user.astype(np.int64) * (1 + item.max(initial=0).astype(np.int64)) + item
    return np.sort(np.unique(pair, return_index=True)[1])


def target_ranks(recommended: np.ndarray, targets: Ragged) -> np.ndarray:
    """int32 (T,): where each target is in its user's list; 1 is first, 0 is nowhere.

    Args:
        recommended: int (N, k_max) item_idx, best first; 0 is no recommendation. No item twice in a row.
        targets: N rows of item_idx.

    Raises:
        ValueError: another number of rows.
    """
    if len(recommended) != len(targets):
        raise ValueError(f"{len(recommended)} rows of recommendations for {len(targets)} users")
    user_T, rank_T = rows_of(targets), np.zeros(len(targets.values), np.int32)
    size = max(1, MAX_CELLS // max(1, recommended.shape[1]))
    for begin in range(0, len(rank_T), size):
        part = slice(begin, begin + size)
        same_TK = recommended[user_T[part]] == targets.values[part, None]
        rank_T[part] = np.where(same_TK.any(axis=1), 1 + same_TK.argmax(axis=1), 0)
    return rank_T


def metrics_of_ranks(
    rank: np.ndarray, user: np.ndarray, num_users: int, cutoffs: Sequence[int]
) -> dict[str, np.ndarray]:
    """Metrics of each user from where the relevant items are in the list.

        recall@k = relevant items of rank <= k / number of relevant items
        ndcg@k   = sum over relevant items of rank r <= k of 1 / log2(r + 1), as a share of the best possible sum,
                   which has min(k, number of relevant items) terms
        mrr@k    = 1 / the least rank of a relevant item; 0 when it is beyond k

    Args:
        rank: int (T,) of each relevant item as `target_ranks` gives it; user: int (T,) its row, 0..num_users - 1.

    Returns:
        {name: float64 (N,)}, recall at each cutoff, then ndcg, then mrr.

    Raises:
        ValueError: a user has no relevant items.
    """
    num_relevant_N = np.bincount(user, minlength=num_users)
    if num_users and not num_relevant_N.all():
        raise ValueError(f"user in row {num_relevant_N.argmin()} has no targets: recall is not defined")
    discount = np.concatenate([[0], 1 / np.log2(np.arange(max(cutoffs)) + 2)])  # by rank
    ideal = np.cumsum(discount)  # by number of relevant items
    found = np.flatnonzero(rank)
    rank, user = rank[found], user[found]
    first_N = np.full(num_users, np.inf)
    np.minimum.at(first_N, user, rank)
    recall, ndcg, mrr = {}, {}, {}
    for k in cutoffs:
        hit = rank <= k
        gain = np.bincount(user[hit], weights=discount[rank[hit]], minlength=num_users)
        recall[f"recall@{k}"] = np.bincount(user[hit], minlength=num_users) / num_relevant_N
        ndcg[f"ndcg@{k}"] = gain / ideal[np.minimum(num_relevant_N, k)]
        mrr[f"mrr@{k}"] = np.where(first_N <= k, 1 / first_N, 0)
    return recall | ndcg | mrr
