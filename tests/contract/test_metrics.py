"""Ranking metrics against hand-computed cases and scikit-learn."""

import numpy as np
import pytest
from sklearn.metrics import ndcg_score

from contract import metrics
from tests.eval.rows import ragged


def test_literal_rankings():
    recommended = np.array([[4, 2, 9], [1, 2, 3], [7, 8, 0], [5, 0, 0]])
    targets = ragged([[2], [3, 1, 6], [9], [5, 8]])
    per_user = metrics.ranking_metrics(recommended, targets, (1, 2, 3))
    assert list(per_user) == ["recall@1", "recall@2", "recall@3", "ndcg@1", "ndcg@2", "ndcg@3"]
    third, half = 1 / 3, 1 / 2
    second_rank, third_rank = 1 / np.log2(3), 1 / 2
    np.testing.assert_allclose(per_user["recall@1"], [0, third, 0, half])
    np.testing.assert_allclose(per_user["recall@2"], [1, third, 0, half])
    np.testing.assert_allclose(per_user["recall@3"], [1, 2 * third, 0, half])
    np.testing.assert_allclose(per_user["ndcg@1"], [0, 1, 0, 1])
    np.testing.assert_allclose(per_user["ndcg@2"], [second_rank, 1 / (1 + second_rank), 0, 1 / (1 + second_rank)])
    ideal = 1 + second_rank + third_rank
    np.testing.assert_allclose(per_user["ndcg@3"], [second_rank, (1 + third_rank) / ideal, 0, 1 / (1 + second_rank)])


def test_padding_is_never_a_hit_and_a_repeated_target_counts_once():
    per_user = metrics.ranking_metrics(np.array([[3, 0], [0, 0]]), ragged([[3, 3], [3]]), [2])
    np.testing.assert_allclose(per_user["recall@2"], [1, 0])
    np.testing.assert_allclose(per_user["ndcg@2"], [1, 0])


def test_targets_of_one_user_are_not_those_of_another():
    per_user = metrics.ranking_metrics(np.array([[1], [2]]), ragged([[2], [1]]), [1])
    assert per_user["recall@1"].tolist() == [0, 0]


def test_ndcg_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    num_users, num_items = 50, 30
    recommended = np.argsort(rng.random((num_users, num_items)), axis=1) + 1
    relevance = rng.random((num_users, num_items)) < 0.2
    relevance[:, 0] = True
    targets = ragged([(np.nonzero(row)[0] + 1).tolist() for row in relevance])
    scores = np.empty((num_users, num_items))
    np.put_along_axis(scores, recommended - 1, -np.arange(num_items)[None, :].astype(float), axis=1)
    for k in (1, 5, 20):
        ours = metrics.ranking_metrics(recommended[:, :20], targets, [k])[f"ndcg@{k}"]
        each = [ndcg_score(relevance[[i]], scores[[i]], k=k) for i in range(num_users)]
        np.testing.assert_allclose(ours, each, atol=1e-12)


@pytest.mark.parametrize(
    ("recommended", "targets", "message"),
    [
        ([[1, 2]], [[1]], "cutoff 3"),
        ([[1, 2, 3]], [[1], [2]], "1 rows of recommendations for 2 users"),
        ([[1, 2, 3], [1, 2, 3]], [[1], []], "row 1 has no targets"),
    ],
)
def test_what_has_no_metric_is_refused(recommended, targets, message):
    with pytest.raises(ValueError, match=message):
        metrics.ranking_metrics(np.array(recommended), ragged(targets), [3])
