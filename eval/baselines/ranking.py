"""What all baselines share: what they learn from, and how scores become lists.

N: users, U: user ids, I: item ids, B: users of a block, k: recommendations per user.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import scipy.sparse as sp

from contract import schema
from contract.artifacts import Artifact
from contract.metrics import ranking_metrics
from contract.schema import Ragged
from contract.settings import Config
from eval.users import EvalUsers, read_eval_users
from trainer.loader import shard_paths
from trainer.samples import read_shard

# Scores of a block of users, or overlaps of a block of items. Arrays of a few MB are reused by the allocator
# and stay in the cache, which makes them faster than large ones.
MAX_BLOCK_CELLS = 1 << 18
# Settings are chosen on a sample of the valid users when there are more.
MAX_VALID_USERS = 10_000


@dataclass(frozen=True)
class Fit:
    """What baselines learn from. Row and column 0 are padding."""

    train: sp.csr_matrix  # float64 (U + 1, I + 1), 1 where a user has an item
    valid: EvalUsers  # to choose settings on, a sample
    user_embeddings: np.ndarray  # float32 (U + 1, d), LightGCN
    item_embeddings: np.ndarray  # float32 (I + 1, d)
    sequences: Ragged  # int32 item_idx: the train events of each user in time order
    ts: np.ndarray | None  # int64, ms: when each of them was; None where only the order is known
    config: Config = field(default_factory=Config)  # its seed and [eval]
    digest: str = ""  # of corpus/
    cache: Path | None = None  # folder that keeps what took long to train; None: it is trained anew
    progress: Callable[[str], None] = lambda message: None


@dataclass(frozen=True)
class Ranking:
    """Recommendations, and the settings that were chosen for them."""

    item_idx: np.ndarray  # int32 (N, k), best first, ties by item_idx; 0 where nothing is left to recommend
    settings: dict[str, float]


class LeftOut(ValueError):
    """A baseline cannot be fitted to these data; the message says why."""


def read_fit(
    corpus: Artifact,
    gid: Artifact,
    config: Config | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> Fit:
    """Reads all that baselines learn from into memory: some 40 bytes per train event.

    What is trained for long is kept in baselines/ beside corpus/, so that the next evaluation finds it.
    """
    user_embeddings = np.load(gid.path / "user_embeddings.npy", mmap_mode="r")
    item_embeddings = np.load(gid.path / "item_embeddings.npy")
    user_idx, item_idx = schema.read_interactions(corpus.path, schema.TRAIN)
    train = sp.csr_matrix(
        (np.ones(len(user_idx)), (user_idx, item_idx)), shape=(len(user_embeddings), len(item_embeddings))
    )
    blocks = [read_shard(path) for path in shard_paths(corpus, "train")]
    lengths = np.concatenate([block.item_idx.lengths for block in blocks])
    items = np.concatenate([block.item_idx.values for block in blocks])
    valid = read_eval_users(corpus, "valid")
    valid = valid.take(np.arange(0, len(valid), math.ceil(len(valid) / MAX_VALID_USERS)))
    ts = None if corpus.manifest["time_unit"] == "order" else np.concatenate([block.ts for block in blocks])
    return Fit(
        train,
        valid,
        user_embeddings,
        item_embeddings,
        Ragged(items, np.concatenate([[0], np.cumsum(lengths)])),
        ts,
        config or Config(),
        corpus.digest,
        corpus.path.parent / "baselines",
        progress,
    )


def choose(
    candidates: list[dict], recommend: Callable[[EvalUsers, int, dict], np.ndarray], fit: Fit, users: EvalUsers, k: int
) -> Ranking:
    """The lists by the settings of the highest valid NDCG@10, the first of them on ties.

    Args:
        recommend: called as recommend(users, k, settings) -> int32 (N, k).
    """
    ndcg = [
        ranking_metrics(recommend(fit.valid, 10, settings), fit.valid.targets, [10])["ndcg@10"].mean()
        for settings in candidates
    ]
    best = candidates[int(np.argmax(ndcg))]
    return Ranking(recommend(users, k, best), best)


def rank(
    scores: Callable[[np.ndarray], np.ndarray], users: EvalUsers, k: int, mask_seen: bool, num_columns: int
) -> np.ndarray:
    """int32 (N, k): the best items by `scores(rows)`, float (B, I + 1), asked for a block of users at a time."""
    ranked = np.zeros((len(users), k), np.int32)
    for rows in blocks(len(users), num_columns):
        scores_BI = scores(rows).astype(np.float32)
        scores_BI[:, 0] = -np.inf
        if mask_seen:
            seen = users.history.take(rows)
            scores_BI[np.repeat(np.arange(len(rows)), seen.lengths), seen.values] = -np.inf
        best = top_items(scores_BI, min(k, num_columns))
        ranked[rows, : best.shape[1]] = best
    return ranked


def rank_by_similarity(similarity: np.ndarray | sp.csr_matrix, users: EvalUsers, k: int, mask_seen: bool) -> np.ndarray:
    """int32 (N, k): items i by the sum over the items j of a history of similarity[j, i], float (I + 1, I + 1)."""

    def scores(rows: np.ndarray) -> np.ndarray:
        summed = history_matrix(users, rows, similarity.shape[0]).astype(similarity.dtype) @ similarity
        return summed.toarray() if sp.issparse(summed) else summed

    return rank(scores, users, k, mask_seen, similarity.shape[1])


def history_matrix(users: EvalUsers, rows: np.ndarray, num_columns: int) -> sp.csr_matrix:
    """float64 (B, I + 1): how often each item is in the history of these users."""
    seen = users.history.take(rows)
    return sp.csr_matrix((np.ones(len(seen.values)), seen.values, seen.offsets), (len(rows), num_columns))


def rank_by_product(
    user_vectors: np.ndarray, item_vectors: np.ndarray, users: EvalUsers, k: int, mask_seen: bool
) -> np.ndarray:
    """int32 (N, k): items by user_vectors (N, d) . item_vectors (I + 1, d)."""
    # In float64 the sums do not depend, once rounded, on how the users are cut into blocks.
    item_vectors = item_vectors.astype(np.float64)

    def scores(rows: np.ndarray) -> np.ndarray:
        return user_vectors[rows].astype(np.float64) @ item_vectors.T

    return rank(scores, users, k, mask_seen, len(item_vectors))


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


def blocks(num_rows: int, num_columns: int) -> Iterator[np.ndarray]:
    """Row numbers, in blocks of at most MAX_BLOCK_CELLS cells."""
    size = max(1, MAX_BLOCK_CELLS // num_columns)
    for start in range(0, num_rows, size):
        yield np.arange(start, min(start + size, num_rows))
