"""Item neighbours.

I: item ids.
"""

import itertools
import warnings

import numpy as np
import scipy.sparse as sp
import torch
from implicit.nearest_neighbours import BM25Recommender
from implicit.utils import ParameterWarning

from eval.baselines.ranking import Fit, Ranking, choose, rank_by_similarity
from eval.users import EvalUsers

NUM_NEIGHBOURS = 100
K1S = (0.1, 0.4, 1.2)
BS = (0.25, 0.5, 0.75)


def item_knn(fit: Fit, users: EvalUsers, k: int, mask_seen: bool) -> Ranking:
    """score(u, i) = sum over the items j of u's history of s(j, i), s by `similarity`; K1 and B from valid."""
    grid = [{"K": NUM_NEIGHBOURS, "K1": K1, "B": B} for K1, B in itertools.product(K1S, BS)]

    def recommend(users: EvalUsers, k: int, settings: dict) -> np.ndarray:
        return rank_by_similarity(similarity(fit.train, **settings), users, k, mask_seen)

    return choose(grid, recommend, fit, users, k)


def similarity(train: sp.csr_matrix, K: int, K1: float, B: float) -> sp.csr_matrix:
    """float64 (I + 1, I + 1): s(j, i) of the K items i most similar to j, by BM25 of the package `implicit`.

        w(u, i) = (K1 + 1) / (K1 (1 - B + B |U_i| / mean |U|) + 1) * log(items / (1 + |I_u|))
        s(j, i) = sum over u of w(u, j) w(u, i)

    that is, an item is a document, its users are the words: those of many items say little, and B takes from the
    weight of popular items. An item is not its own neighbour.
    """
    model = BM25Recommender(K=K, K1=K1, B=B, num_threads=torch.get_num_threads())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ParameterWarning)  # of a conversion within the package
        model.fit(train, show_progress=False)
    found = model.similarity
    found.setdiag(0)
    found.eliminate_zeros()
    return found
