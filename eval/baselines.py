"""The rankings that ColaRec is compared with.

All of them are fitted on the train interactions alone. What is known of a user at evaluation, the history, comes
with the users: item-kNN scores with it, and all mask it when seen items are masked.

N: users, U: user ids, I: item ids, B: users of a block, k: recommendations per user.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

from contract import schema
from contract.artifacts import Artifact
from contract.metrics import ranking_metrics
from eval.users import EvalUsers, read_eval_users

SHRINKAGES = (0, 10, 100, 1000)
# On Phone, 200 cost 0.7% of Recall@10 against all neighbours, 1000 cost 0.1%.
NUM_NEIGHBOURS = 1000
# Scores of a block of users, or overlaps of a block of items. Arrays of a few MB are reused by the allocator
# and stay in the cache, which makes them faster than large ones.
MAX_BLOCK_CELLS = 1 << 18


@dataclass(frozen=True)
class Fit:
    """What baselines learn from. Row and column 0 are padding."""

    train: sp.csr_matrix  # float64 (U + 1, I + 1), 1 where a user has an item
    valid: EvalUsers  # to choose settings on
    user_embeddings: np.ndarray  # float32 (U + 1, d), LightGCN
    item_embeddings: np.ndarray  # float32 (I + 1, d)


@dataclass(frozen=True)
class Ranking:
    """Recommendations, and the settings that were chosen for them."""

    item_idx: np.ndarray  # int32 (N, k), best first, ties by item_idx; 0 where nothing is left to recommend
    settings: dict[str, float]


def read_fit(corpus: Artifact, gid: Artifact) -> Fit:
    user_embeddings = np.load(gid.path / "user_embeddings.npy", mmap_mode="r")
    item_embeddings = np.load(gid.path / "item_embeddings.npy")
    user_idx, item_idx = schema.read_interactions(corpus.path, schema.TRAIN)
    train = sp.csr_matrix(
        (np.ones(len(user_idx)), (user_idx, item_idx)), shape=(len(user_embeddings), len(item_embeddings))
    )
    return Fit(train, read_eval_users(corpus, "valid"), user_embeddings, item_embeddings)


def popularity(fit: Fit, users: EvalUsers, k: int, mask_seen: bool) -> Ranking:
    """Items by their number of train users."""
    num_train_I = np.asarray(fit.train.sum(axis=0)).ravel()
    return Ranking(_rank(lambda rows: np.tile(num_train_I, (len(rows), 1)), users, k, mask_seen, len(num_train_I)), {})


def item_knn(fit: Fit, users: EvalUsers, k: int, mask_seen: bool) -> Ranking:
    """score(u, i) = sum over the items j of u's history of s(j, i), with the shrunk cosine

        s(j, i) = |U_j and U_i| / (sqrt(|U_j| |U_i|) + shrinkage)

    over the NUM_NEIGHBOURS items i most similar to j. The shrinkage of the best valid NDCG@10 is taken.
    """
    valid_ndcg = {}
    for shrinkage in SHRINKAGES:
        ranked = _rank_by_similarity(_neighbours(fit.train, shrinkage), fit.valid, 10, mask_seen)
        valid_ndcg[shrinkage] = ranking_metrics(ranked, fit.valid.targets, [10])["ndcg@10"].mean()
    best = max(valid_ndcg, key=valid_ndcg.get)
    item_idx = _rank_by_similarity(_neighbours(fit.train, best), users, k, mask_seen)
    return Ranking(item_idx, {"shrinkage": best})


def lightgcn(fit: Fit, users: EvalUsers, k: int, mask_seen: bool) -> Ranking:
    """score(u, i) = e_u . e_i, the collaborative embeddings that the GIDs were made of."""
    # In float64 the sums do not depend, once rounded, on how the users are cut into blocks.
    item_embeddings = fit.item_embeddings.astype(np.float64)

    def scores(rows: np.ndarray) -> np.ndarray:
        return fit.user_embeddings[users.user_idx[rows]].astype(np.float64) @ item_embeddings.T

    return Ranking(_rank(scores, users, k, mask_seen, len(item_embeddings)), {})


BASELINES: dict[str, Callable[[Fit, EvalUsers, int, bool], Ranking]] = {
    "popularity": popularity,
    "item_knn": item_knn,
    "lightgcn": lightgcn,
}


def _neighbours(train: sp.csr_matrix, shrinkage: float) -> sp.csr_matrix:
    """float64 (I + 1, I + 1): s(j, i) of the NUM_NEIGHBOURS items i most similar to j, ties by item_idx."""
    item_users, num_items = train.T.tocsr(), train.shape[1]
    norm_I = np.sqrt(np.asarray(train.sum(axis=0)).ravel())
    blocks = []
    for items in _blocks(num_items, num_items):
        overlap = (item_users[items] @ train).tocoo()
        other = overlap.col != items[overlap.row]
        row, col = overlap.row[other], overlap.col[other]
        similarity = overlap.data[other] / (norm_I[items[row]] * norm_I[col] + shrinkage)
        order = np.lexsort((col, -similarity, row))
        first_of_row = np.searchsorted(row[order], np.arange(len(items)))
        kept = order[np.arange(len(order)) - first_of_row[row[order]] < NUM_NEIGHBOURS]
        blocks.append(sp.csr_matrix((similarity[kept], (row[kept], col[kept])), shape=(len(items), num_items)))
    return sp.vstack(blocks, format="csr")


def _rank_by_similarity(similarity: sp.csr_matrix, users: EvalUsers, k: int, mask_seen: bool) -> np.ndarray:
    def scores(rows: np.ndarray) -> np.ndarray:
        seen = users.history.take(rows)
        history = sp.csr_matrix(
            (np.ones(len(seen.values)), seen.values, seen.offsets), (len(rows), similarity.shape[0])
        )
        return (history @ similarity).toarray()

    return _rank(scores, users, k, mask_seen, similarity.shape[1])


def _rank(
    scores: Callable[[np.ndarray], np.ndarray], users: EvalUsers, k: int, mask_seen: bool, num_columns: int
) -> np.ndarray:
    """int32 (N, k): the best items by `scores(rows)`, float (B, I + 1), asked for a block of users at a time."""
    ranked = np.zeros((len(users), k), np.int32)
    for rows in _blocks(len(users), num_columns):
        scores_BI = scores(rows).astype(np.float32)
        scores_BI[:, 0] = -np.inf
        if mask_seen:
            seen = users.history.take(rows)
            scores_BI[np.repeat(np.arange(len(rows)), seen.lengths), seen.values] = -np.inf
        best = top_items(scores_BI, min(k, num_columns))
        ranked[rows, : best.shape[1]] = best
    return ranked


def top_items(scores: np.ndarray, k: int) -> np.ndarray:
    """int32 (B, k): columns of the k highest scores, float32 (B, I + 1), ties by column; 0 for scores of -inf.

    A score and its column make one integer that orders as both do, so that a partial sort breaks ties as a full
    one would.
    """
    num_columns = scores.shape[1]
    keys = _ordered_bits(scores).astype(np.int64)
    keys <<= 32
    keys |= np.arange(num_columns, 0, -1)
    keys = np.partition(keys, num_columns - k, axis=1)[:, num_columns - k :]
    keys = np.sort(keys, axis=1)[:, ::-1]
    column = num_columns - (keys & 0xFFFFFFFF)
    return np.where(keys >> 32 == _ordered_bits(np.float32([-np.inf])), 0, column).astype(np.int32)


def _ordered_bits(values: np.ndarray) -> np.ndarray:
    """int32 that order as the float32 values do."""
    bits = (values + np.float32(0)).view(np.int32)  # -0.0 + 0 is 0.0
    bits ^= (bits >> 31) & 0x7FFFFFFF  # the bits of negative floats order backwards
    return bits


def _blocks(num_rows: int, num_columns: int) -> Iterator[np.ndarray]:
    """Row numbers, in blocks of at most MAX_BLOCK_CELLS cells."""
    size = max(1, MAX_BLOCK_CELLS // num_columns)
    for start in range(0, num_rows, size):
        yield np.arange(start, min(start + size, num_rows))
