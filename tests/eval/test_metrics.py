"""Intervals against the normal approximation, and the comparison of models."""

import numpy as np
import pytest

from eval import metrics
from tests.eval.rows import ragged

NUM_TRAIN = np.array([0, 10, 4, 1, 0, 0, 0, 0, 0, 3])  # of items 0 (none) to 9


def read(recommended, targets, cutoffs) -> metrics.Lists:
    return metrics.read_lists(np.array(recommended, np.int32), targets, cutoffs, NUM_TRAIN)


def means(values: np.ndarray, seed: int = 1) -> tuple[dict, dict]:
    """Of a model whose metric "x" is `values` (N,)."""
    num_users = metrics.in_groups(np.ones(len(values)))
    return metrics.estimates({("ours", "x"): metrics.in_groups(values)}, num_users, seed)[0]["ours"]["x"]


def normal(values: np.ndarray) -> tuple[list[float], float]:
    error = 1.96 * values.std() / np.sqrt(len(values))
    return [values.mean() - error, values.mean() + error], error


def test_what_is_kept_of_lists(monkeypatch):
    targets = ragged([[2, 9], [3]])
    for at_once in (1, 100):
        monkeypatch.setattr(metrics, "USERS_AT_ONCE", at_once)
        lists = read([[1, 2, 0], [1, 3, 0]], targets, (1, 2, 3))
        assert lists.rank.tolist() == [2, 0, 2]
        assert lists.coverage == {"coverage@1": 1 / 9, "coverage@2": 3 / 9, "coverage@3": 3 / 9}
        assert lists.popularity["arp@1"].tolist() == [10, 10]
        assert lists.popularity["arp@3"].tolist() == [7, 5.5]  # of what is there


def test_interval_is_the_normal_one_for_many_users():
    values = np.random.default_rng(0).random(2000)
    found = means(values)
    assert found["mean"] == pytest.approx(values.mean())
    expected, error = normal(values)
    np.testing.assert_allclose([found["low"], found["high"]], expected, atol=0.15 * error)
    assert means(values) == found
    assert means(values, seed=2) != found
    both = metrics.bootstrap_interval({"x": values, "twice": 2 * values}, seed=1)
    assert both["x"] == (found["low"], found["high"])
    assert both["twice"] == pytest.approx((2 * found["low"], 2 * found["high"]))


def test_groups_of_users_give_the_interval_of_users(monkeypatch):
    monkeypatch.setattr(metrics, "MAX_GROUPS", 1000)
    values = np.random.default_rng(0).random(20_011)
    sums = metrics.in_groups(values)
    assert sums.shape == (1000,)
    assert sums[11] == pytest.approx(values[11::1000].sum())
    found = means(values)
    assert found["mean"] == pytest.approx(values.mean())
    expected, error = normal(values)
    np.testing.assert_allclose([found["low"], found["high"]], expected, atol=0.15 * error)


def test_draws_are_with_replacement_and_as_many_as_there_are_groups():
    times = metrics._draws(300, 1).astype(int)
    assert (times.sum(axis=1) == 300).all()
    assert times.mean(axis=0) == pytest.approx(np.ones(300), abs=0.2)
    assert times.var() == pytest.approx(1, abs=0.02)  # Binomial(300, 1 / 300)


def test_entries_share_their_draws():
    values = np.random.default_rng(0).random(200)
    drawn = metrics.resample({"a": values, "b": values + 1, "a - b": -np.ones(200)}, seed=1)
    np.testing.assert_allclose(drawn["b"] - drawn["a"], 200)
    np.testing.assert_allclose(drawn["a - b"], -200)


def test_the_lead_is_over_the_best_other_model():
    targets = ragged([[1], [2], [3], [4]])
    lists = {
        "ours": read([[1], [2], [3], [9]], targets, [1]),
        "ours, a half": read([[1], [2], [3], [4]], targets, [1]),
        "weak": read([[9], [9], [9], [9]], targets, [1]),
        "strong": read([[1], [9], [9], [9]], targets, [1]),
    }
    models, lead = metrics.compare(lists, targets, [1], seed=1)
    assert {model: m["recall@1"]["mean"] for model, m in models.items()} == {
        "ours": 0.75,
        "ours, a half": 1,
        "weak": 0,
        "strong": 0.25,
    }
    assert models["strong"]["arp@1"]["mean"] == (10 + 3 * 3) / 4
    assert list(lead) == ["recall@1", "ndcg@1", "mrr@1"]
    assert (lead["recall@1"]["mean"], lead["recall@1"]["over"]) == (0.5, "strong")
    assert 0 <= lead["recall@1"]["low"] < 0.5 < lead["recall@1"]["high"] <= 1
    assert metrics.compare({"ours": lists["ours"]}, targets, [1], seed=1)[1] == {}


def test_only_the_kept_targets_count():
    targets = ragged([[1, 2], [3], [4, 5]])
    lists = {"ours": read([[2, 1], [3, 9], [9, 5]], targets, [2])}
    kept = np.array([True, False, False, True, True])
    models, _ = metrics.compare(lists, targets, [2], seed=1, kept=kept, names=["recall@2", "ndcg@2"])
    ndcg = 1 / np.log2(3)  # at rank 2, the only relevant item of user 0
    both = ndcg / (1 + ndcg)  # one of two at rank 2, user 2
    assert list(models["ours"]) == ["recall@2", "ndcg@2"]
    assert models["ours"]["recall@2"]["mean"] == pytest.approx((1 + 0.5) / 2)
    assert models["ours"]["ndcg@2"]["mean"] == pytest.approx((ndcg + both) / 2)
    with pytest.raises(ValueError, match="no users"):
        metrics.compare(lists, targets, [2], seed=1, kept=np.zeros(5, bool))


def test_recall_curves_pass_through_recall():
    targets = ragged([[1, 2, 2], [3], [4, 5]])
    lists = {"ours": read([[2, 1, 0], [9, 8, 3], [9, 5, 7]], targets, [1, 2, 3])}
    models, _ = metrics.compare(lists, targets, [1, 2, 3], seed=1)
    expected = [models["ours"][f"recall@{k}"]["mean"] for k in (1, 2, 3)]
    assert metrics.recall_curves(lists, targets, 3)["ours"] == pytest.approx(expected)
