"""OTTO's metric (github.com/otto-de/recsys-dataset, src/evaluate.py), from the ranks of the targets.

    recall_type = sum over sessions of hits within the first 20
                  / sum over sessions of min(20, number of relevant items)
    total       = 0.10 recall_clicks + 0.30 recall_carts + 0.60 recall_orders

Relevant are, of a session, the next click, all items carted later, and all items ordered later, each once. A sum over
all sessions: a session with many orders counts more than one with few. OTTO asks for a list per type; here a model's
one list stands for all three.
"""

import numpy as np

from contract.metrics import first_occurrences, rows_of
from eval import metrics
from eval.metrics import Lists
from eval.users import EvalUsers

CUTOFF = 20
WEIGHTS = (0.10, 0.30, 0.60)  # of the event types, clicks first


def compare(
    models: dict[str, Lists], users: EvalUsers, events: list[str], seed: int, uncounted: int = 0
) -> tuple[dict[str, dict], dict[str, dict]]:
    """As `metrics.compare`, of otto@20 and, by event type, otto_clicks@20, otto_carts@20, otto_orders@20.

    A type without targets is left out, and so is otto@20 then, or when there are not three types.

    Args:
        users: with the events of the targets.
        events: names of the event types, 1 and following; the first, clicks, is what a session has one target of.
        uncounted: item_idx of the article '0', or 0; evaluate.py takes a click on it for none.
    """
    means, resampled = {}, {}
    user_T = rows_of(users.targets)
    for code, event in enumerate(events, 1):
        place = np.flatnonzero(users.target_event == code)
        if code == 1 and uncounted:
            place = place[users.targets.values[place] != uncounted]
        place = place[first_occurrences(user_T[place], users.targets.values[place])]
        if not len(place):
            continue
        num_N = np.minimum(np.bincount(user_T[place], minlength=len(users)), CUTOFF)
        sums = {"num": metrics.in_groups(num_N)}
        for model, lists in models.items():
            hit = (lists.rank[place] > 0) & (lists.rank[place] <= CUTOFF)
            sums[model] = metrics.in_groups(np.bincount(user_T[place[hit]], minlength=len(users)))
        drawn = metrics.resample(sums, seed)
        for model in models:
            name = f"otto_{event}@{CUTOFF}"
            means[model, name] = float(sums[model].sum() / sums["num"].sum())
            # A resample of few sessions may have none of a type.
            resampled[model, name] = drawn[model] / np.maximum(drawn["num"], 1)
    names = [f"otto_{event}@{CUTOFF}" for event in events]
    for model in models:
        if len(names) == len(WEIGHTS) and all((model, name) in means for name in names):
            for of in (means, resampled):
                total = sum(weight * of[model, name] for weight, name in zip(WEIGHTS, names, strict=True))
                of[model, f"otto@{CUTOFF}"] = total
    return metrics.with_intervals(means, resampled)
