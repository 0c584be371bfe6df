"""Items by how many took them."""

import numpy as np

from contract.schema import NO_TIME
from eval.baselines.ranking import Fit, LeftOut, Ranking, choose, rank
from eval.users import EvalUsers

# Shares rather than days: a log of ten days and one of ten years have both a recent past.
RECENT_SHARES = (0.01, 0.03, 0.1, 0.3, 1)


def popularity(fit: Fit, users: EvalUsers, k: int, mask_seen: bool) -> Ranking:
    """Items by their number of train users."""
    return Ranking(_rank_alike(np.asarray(fit.train.sum(axis=0)).ravel(), users, k, mask_seen), {})


def recent_popularity(fit: Fit, users: EvalUsers, k: int, mask_seen: bool) -> Ranking:
    """Items by their number of events among the last of all train events; which share of them, valid NDCG@10 says.

    Raises:
        LeftOut: the log says no more than the order of each user's events.
    """
    if fit.ts is None or fit.ts.max() == NO_TIME:
        raise LeftOut("the log has no times, only an order within each user")
    ts = np.sort(fit.ts)

    def recommend(users: EvalUsers, k: int, settings: dict) -> np.ndarray:
        first = ts[len(ts) - max(1, round(settings["share"] * len(ts)))]
        num_recent_I = np.bincount(fit.sequences.values[fit.ts >= first], minlength=fit.train.shape[1])
        return _rank_alike(num_recent_I, users, k, mask_seen)

    return choose([{"share": share} for share in RECENT_SHARES], recommend, fit, users, k)


def _rank_alike(score_I: np.ndarray, users: EvalUsers, k: int, mask_seen: bool) -> np.ndarray:
    return rank(lambda rows: np.tile(score_I, (len(rows), 1)), users, k, mask_seen, len(score_I))
