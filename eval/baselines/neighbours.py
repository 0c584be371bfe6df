"""Item neighbours.

I: item ids.
"""

import itertools

import numpy as np

from eval.baselines.ranking import Fit, Ranking, choose, rank_by_similarity
from eval.users import EvalUsers
from gid.neighbours import similarity

NUM_NEIGHBOURS = 100
K1S = (0.1, 0.4, 1.2)
BS = (0.25, 0.5, 0.75)


def item_knn(fit: Fit, users: EvalUsers, k: int, mask_seen: bool) -> Ranking:
    """score(u, i) = sum over the items j of u's history of s(j, i), `gid.neighbours.similarity`; K1, B from valid."""
    grid = [{"K": NUM_NEIGHBOURS, "K1": K1, "B": B} for K1, B in itertools.product(K1S, BS)]

    def recommend(users: EvalUsers, k: int, settings: dict) -> np.ndarray:
        return rank_by_similarity(similarity(fit.train, **settings), users, k, mask_seen)

    return choose(grid, recommend, fit, users, k)
