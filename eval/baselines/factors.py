"""Factorisations: a vector per user and per item, whose inner product is the score.

d: width of the vectors, U: user ids, I: item ids.
"""

import itertools

import numpy as np
import torch
from implicit.cpu.als import AlternatingLeastSquares
from threadpoolctl import threadpool_limits

from eval.baselines.ranking import Fit, Ranking, choose, history_matrix, rank_by_product
from eval.users import EvalUsers

NUM_FACTORS = 128
ALPHAS = (1, 10, 40)
REGULARIZATIONS = (1, 10)


def als(fit: Fit, users: EvalUsers, k: int, mask_seen: bool) -> Ranking:
    """Alternating least squares with confidences, by the package `implicit`; alpha and regularization from valid.

    A user's vector is solved for from the history that is given, by the item vectors of train.
    """
    grid = [
        {"factors": NUM_FACTORS, "alpha": alpha, "regularization": regularization}
        for alpha, regularization in itertools.product(ALPHAS, REGULARIZATIONS)
    ]
    # Its own threads go over users and items; those of BLAS would get in their way.
    with threadpool_limits(1, "blas"):
        models = {tuple(settings.values()): _fit_als(fit, settings) for settings in grid}

        def recommend(users: EvalUsers, k: int, settings: dict) -> np.ndarray:
            model = models[tuple(settings.values())]
            history = history_matrix(users, np.arange(len(users)), fit.train.shape[1])
            vectors = model.recalculate_user(np.arange(len(users)), history)
            return rank_by_product(vectors, model.item_factors, users, k, mask_seen)

        return choose(grid, recommend, fit, users, k)


def _fit_als(fit: Fit, settings: dict) -> AlternatingLeastSquares:
    model = AlternatingLeastSquares(**settings, num_threads=torch.get_num_threads(), random_state=fit.config.seed)
    model.fit(fit.train.astype(np.float32), show_progress=False)
    return model


def lightgcn(fit: Fit, users: EvalUsers, k: int, mask_seen: bool) -> Ranking:
    """score(u, i) = e_u . e_i, the collaborative embeddings that the GIDs were made of."""
    vectors = fit.user_embeddings[users.user_idx]
    return Ranking(rank_by_product(vectors, fit.item_embeddings, users, k, mask_seen), {})
