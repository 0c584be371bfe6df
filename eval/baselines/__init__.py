"""The rankings that ColaRec is compared with, in the same table, from the same split.

All of them are fitted on the train interactions alone, with settings chosen on valid. What is known of a user at
evaluation, the history, comes with the users: item_knn, als, ease and sasrec score with it, and all mask it when seen
items are masked. docs/baselines.md says where each is from.
"""

import time
from collections.abc import Callable

import numpy as np

from eval.baselines import ease, factors, neighbours, popularity, sasrec
from eval.baselines.ranking import Fit, LeftOut, Ranking, read_fit, top_items
from eval.users import EvalUsers

__all__ = ["BASELINES", "Fit", "LeftOut", "Ranking", "rank_all", "read_fit", "top_items"]

# (fit, users, k, mask_seen): k recommendations for each of the users. Those of eval.baselines by their names.
BASELINES: dict[str, Callable[[Fit, EvalUsers, int, bool], Ranking]] = {
    "popularity": popularity.popularity,
    "recent_popularity": popularity.recent_popularity,
    "item_knn": neighbours.item_knn,
    "als": factors.als,
    "ease": ease.ease,
    "lightgcn": factors.lightgcn,
    "sasrec": sasrec.sasrec,
}


def rank_all(fit: Fit, users: EvalUsers, k: int, mask_seen: bool) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The lists of the baselines that eval.baselines names, and what a reader of the table must know of them.

    Returns:
        {name: int32 (N, k)} without those that these data do not allow;
        {name: what was chosen on valid, or why it was left out}.
    """
    rankings, facts = {}, {}
    for name in fit.config.eval.baselines:
        start = time.monotonic()
        try:
            ranking = BASELINES[name](fit, users, k, mask_seen)
        except LeftOut as reason:
            facts[name] = f"left out: {reason}"
            fit.progress(f"{name} is {facts[name]}")
            continue
        rankings[name] = ranking.item_idx
        chosen = ", ".join(f"{key} {value:g}" for key, value in ranking.settings.items())
        if chosen:
            facts[name] = f"{chosen} (chosen on valid)"
        fit.progress(f"ranked by {name} in {time.monotonic() - start:.1f} s" + (f": {chosen}" if chosen else ""))
    return rankings, facts
