"""EASE: the linear model of an item from the others, in closed form (Steck, 2019, arXiv 1905.03375).

I: item ids.
"""

import numpy as np
import scipy.sparse as sp
from scipy.linalg import lapack

from eval.baselines.ranking import Fit, LeftOut, Ranking, choose, rank_by_similarity
from eval.users import EvalUsers

LAMBDAS = (100, 300, 1000)
# A dense matrix of items x items, inverted: 20,000 items are 1.6 GB twice and some minutes on a CPU core.
MAX_ITEMS = 20_000


def ease(fit: Fit, users: EvalUsers, k: int, mask_seen: bool) -> Ranking:
    """score(u, .) = x_u B, x_u the items of u's history; lambda from valid.

    Raises:
        LeftOut: the catalog is too large.
    """
    num_items = fit.train.shape[1] - 1
    if num_items > MAX_ITEMS:
        raise LeftOut(f"{num_items:,} items, more than the {MAX_ITEMS:,} of which a dense matrix can be inverted")
    weights: dict[float, np.ndarray] = {}

    def recommend(users: EvalUsers, k: int, settings: dict) -> np.ndarray:
        if settings["lambda"] not in weights:
            weights.clear()  # two would be large
            weights[settings["lambda"]] = item_weights(fit.train, settings["lambda"])
        return rank_by_similarity(weights[settings["lambda"]], users, k, mask_seen)

    return choose([{"lambda": value} for value in LAMBDAS], recommend, fit, users, k)


def item_weights(train: sp.csr_matrix, l2: float) -> np.ndarray:
    """float32 (I + 1, I + 1): B of the least |X - X B|^2 + l2 |B|^2 with a zero diagonal.

    P = (X^T X + l2)^-1,   B_ij = -P_ij / P_jj off the diagonal
    """
    gram = (train.T @ train).toarray(order="F").astype(np.float32)
    gram[np.diag_indices_from(gram)] += l2
    factor, failed = lapack.spotrf(gram, overwrite_a=True)
    assert not failed, "a Gram matrix and a positive diagonal are positive definite"
    inverse, _ = lapack.spotri(factor, overwrite_c=True)  # its upper triangle
    inverse = np.triu(inverse) + np.triu(inverse, 1).T
    inverse /= -np.diag(inverse)
    inverse[np.diag_indices_from(inverse)] = 0
    return inverse
