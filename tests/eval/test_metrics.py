"""Intervals against the normal approximation, and the comparison of models."""

import numpy as np
import pytest

from eval import metrics
from tests.eval.rows import ragged


def test_summary_tells_the_denominator():
    assert metrics.summary({"recall@5": np.array([0, 0.5, 1])}) == {"recall@5": 0.5, "num_users": 3}
    with pytest.raises(ValueError, match="no users"):
        metrics.summary({"recall@5": np.array([])})


def test_coverage_is_the_share_of_the_catalog():
    recommended = np.array([[1, 2, 0], [1, 3, 0]])
    assert metrics.coverage(recommended, 10, (1, 2, 3)) == {"coverage@1": 0.1, "coverage@2": 0.3, "coverage@3": 0.3}


def test_interval_is_the_normal_one_for_many_users(monkeypatch):
    values = np.random.default_rng(0).random(2000)
    low, high = metrics.bootstrap_interval({"x": values}, seed=1)["x"]
    error = 1.96 * values.std() / np.sqrt(len(values))
    np.testing.assert_allclose([low, high], [values.mean() - error, values.mean() + error], atol=0.15 * error)
    assert metrics.bootstrap_interval({"x": values}, seed=1)["x"] == (low, high)
    assert metrics.bootstrap_interval({"x": values}, seed=2)["x"] != (low, high)
    monkeypatch.setattr(metrics, "MAX_WEIGHTS", 3 * len(values))  # 334 chunks
    np.testing.assert_allclose(metrics.bootstrap_interval({"x": values}, seed=1)["x"], (low, high))


def test_intervals_share_their_resamples():
    values = np.random.default_rng(0).random(200)
    intervals = metrics.bootstrap_interval({"a": values, "b": values + 1, "a - b": values - (values + 1)}, seed=1)
    np.testing.assert_allclose(np.subtract(intervals["b"], intervals["a"]), 1)
    np.testing.assert_allclose(intervals["a - b"], -1)


def test_the_lead_is_over_the_best_other_model():
    targets = ragged([[1], [2], [3], [4]])
    rankings = {
        "ours": np.array([[1], [2], [3], [9]]),
        "weak": np.array([[9], [9], [9], [9]]),
        "strong": np.array([[1], [9], [9], [9]]),
    }
    models, lead = metrics.compare(rankings, targets, [1], num_items=9, seed=1)
    assert {model: m["recall@1"]["mean"] for model, m in models.items()} == {"ours": 0.75, "weak": 0, "strong": 0.25}
    assert models["ours"]["coverage@1"] == {"mean": 4 / 9}
    assert (lead["recall@1"]["mean"], lead["recall@1"]["over"]) == (0.5, "strong")
    assert 0 <= lead["recall@1"]["low"] < 0.5 < lead["recall@1"]["high"] <= 1
    assert metrics.compare({"ours": rankings["ours"]}, targets, [1], num_items=9, seed=1)[1] == {}
