"""OTTO's metric against its definition, said once more a session at a time, and against literal sessions."""

import numpy as np
import pytest

from eval import metrics, otto
from eval.users import EvalUsers
from tests.eval.rows import ragged

EVENTS = ["clicks", "carts", "orders"]


def measure(sessions: list[dict], lists: list[list[int]], events=EVENTS, **options) -> dict[str, float]:
    """Means of one model. A session: {event: its targets}."""
    pairs = [[(item, 1 + code) for code, event in enumerate(events) for item in one.get(event, [])] for one in sessions]
    targets = ragged([[item for item, _ in row] for row in pairs])
    event = np.array([code for row in pairs for _, code in row], np.int8)
    num = len(sessions)
    users = EvalUsers(np.arange(1, num + 1), ragged([[]] * num), targets, target_event=event)
    recommended = np.array([row + [0] * (25 - len(row)) for row in lists], np.int32)
    ranks = metrics.read_lists(recommended, targets, [20], np.ones(1000, int))
    models, _ = otto.compare({"ours": ranks}, users, events, seed=1, **options)
    return {name: estimate["mean"] for name, estimate in models.get("ours", {}).items()}


def definition(sessions: list[dict], lists: list[list[int]]) -> dict[str, float]:
    recall = {}
    for event in EVENTS:
        hits = sum(len(set(one.get(event, [])) & set(shown[:20])) for one, shown in zip(sessions, lists, strict=True))
        possible = sum(min(20, len(set(one.get(event, [])))) for one in sessions)
        recall[f"otto_{event}@20"] = hits / possible
    weighted = zip(recall.values(), (0.1, 0.3, 0.6), strict=True)
    return recall | {"otto@20": sum(weight * value for value, weight in weighted)}


def test_literal_sessions():
    sessions = [
        {"clicks": [5], "carts": [6, 7]},
        {"clicks": [8], "orders": [9]},
        {"carts": list(range(100, 125))},  # 25: 20 of them could be shown
    ]
    lists = [[6, 5], [1, 2], list(range(100, 110))]
    found = measure(sessions, lists)
    assert found["otto_clicks@20"] == 1 / 2
    assert found["otto_carts@20"] == (1 + 10) / (2 + 20)
    assert found["otto_orders@20"] == 0
    assert found["otto@20"] == pytest.approx(0.1 / 2 + 0.3 / 2)


def test_it_is_the_definition():
    rng = np.random.default_rng(0)

    def items(low: int, high: int) -> list[int]:
        return rng.choice(np.arange(1, 60), rng.integers(low, high), replace=False).tolist()

    sessions = [{"clicks": items(0, 2), "carts": items(0, 4), "orders": items(1, 30)} for _ in range(200)]
    lists = [items(0, 26) for _ in sessions]
    assert measure(sessions, lists) == pytest.approx(definition(sessions, lists))


def test_an_item_may_be_carted_and_ordered_and_counts_once_in_each():
    sessions = [{"clicks": [3], "carts": [3, 3, 4], "orders": [3]}]
    found = measure(sessions, [[3]])
    assert (found["otto_clicks@20"], found["otto_carts@20"], found["otto_orders@20"]) == (1, 0.5, 1)


def test_article_0_is_no_click_as_in_ottos_code():
    sessions = [{"clicks": [7], "orders": [7]}, {"clicks": [8], "carts": [8]}]
    found = measure(sessions, [[7], [1]], uncounted=7)
    assert (found["otto_clicks@20"], found["otto_orders@20"]) == (0, 1)


def test_a_type_without_targets_has_no_recall_and_then_there_is_no_total():
    assert measure([{"clicks": [1], "carts": [2]}], [[1]]) == {"otto_clicks@20": 1, "otto_carts@20": 0}
    assert measure([{"view": [1], "buy": [2]}], [[1]], ["view", "buy"]) == {"otto_view@20": 1, "otto_buy@20": 0}
    assert measure([{"clicks": [1]}], [[1]], uncounted=1) == {}


def test_a_lead_has_an_interval():
    rng = np.random.default_rng(0)
    num = 300
    targets = ragged(rng.integers(1, 20, (num, 3)).tolist())
    users = EvalUsers(np.arange(num), ragged([[]] * num), targets, target_event=np.tile([1, 2, 3], num))
    lists = {
        model: metrics.read_lists(items.astype(np.int32), targets, [5], np.ones(30, int))
        for model, items in {
            "ours": np.tile(np.arange(1, 11), (num, 1)),
            "other": np.tile(np.arange(9, 14), (num, 1)),
        }.items()
    }
    models, lead = otto.compare(lists, users, EVENTS, seed=1)
    ours, other = models["ours"]["otto@20"], models["other"]["otto@20"]
    assert lead["otto@20"]["mean"] == pytest.approx(ours["mean"] - other["mean"])
    assert other["high"] < ours["low"] < ours["mean"] < ours["high"]
    assert 0 < lead["otto@20"]["low"] < lead["otto@20"]["mean"]
