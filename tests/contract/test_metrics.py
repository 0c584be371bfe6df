"""Ranking metrics against hand-computed cases, scikit-learn and Cornac."""

import cornac.metrics
import numpy as np
import pytest
from sklearn.metrics import ndcg_score

from contract import metrics
from tests.eval.rows import ragged


def test_literal_rankings():
    recommended = np.array([[4, 2, 9], [1, 2, 3], [7, 8, 0], [5, 0, 0]])
    targets = ragged([[2], [3, 1, 6], [9], [5, 8]])
    per_user = metrics.ranking_metrics(recommended, targets, (1, 2, 3))
    assert list(per_user) == [f"{name}@{k}" for name in ("recall", "ndcg", "mrr") for k in (1, 2, 3)]
    third, half = 1 / 3, 1 / 2
    second_rank, third_rank = 1 / np.log2(3), 1 / 2
    np.testing.assert_allclose(per_user["recall@1"], [0, third, 0, half])
    np.testing.assert_allclose(per_user["recall@2"], [1, third, 0, half])
    np.testing.assert_allclose(per_user["recall@3"], [1, 2 * third, 0, half])
    np.testing.assert_allclose(per_user["ndcg@1"], [0, 1, 0, 1])
    np.testing.assert_allclose(per_user["ndcg@2"], [second_rank, 1 / (1 + second_rank), 0, 1 / (1 + second_rank)])
    ideal = 1 + second_rank + third_rank
    np.testing.assert_allclose(per_user["ndcg@3"], [second_rank, (1 + third_rank) / ideal, 0, 1 / (1 + second_rank)])
    np.testing.assert_allclose(per_user["mrr@1"], [0, 1, 0, 1])
    np.testing.assert_allclose(per_user["mrr@3"], [half, 1, 0, 1])


def test_padding_is_never_a_hit_and_a_repeated_target_counts_once():
    per_user = metrics.ranking_metrics(np.array([[3, 0], [0, 0]]), ragged([[3, 3], [3]]), [2])
    np.testing.assert_allclose(per_user["recall@2"], [1, 0])
    np.testing.assert_allclose(per_user["ndcg@2"], [1, 0])
    np.testing.assert_allclose(per_user["mrr@2"], [1, 0])


def test_targets_of_one_user_are_not_those_of_another():
    per_user = metrics.ranking_metrics(np.array([[1], [2]]), ragged([[2], [1]]), [1])
    assert per_user["recall@1"].tolist() == [0, 0]


@pytest.fixture
def rankings():
    """Orders of all items (50, 30), item_idx 1 and following, and which are relevant (50, 30), 1 to many of a user."""
    rng = np.random.default_rng(0)
    recommended = np.argsort(rng.random((50, 30)), axis=1) + 1
    relevant = rng.random((50, 30)) < 0.2
    relevant[:, 0] = True
    return recommended, relevant, ragged([(np.nonzero(row)[0] + 1).tolist() for row in relevant])


@pytest.mark.parametrize("k", [1, 5, 20])
def test_ndcg_is_that_of_scikit_learn(rankings, k):
    recommended, relevant, targets = rankings
    scores = np.empty(relevant.shape)
    np.put_along_axis(scores, recommended - 1, -np.arange(30)[None, :].astype(float), axis=1)
    ours = metrics.ranking_metrics(recommended[:, :20], targets, [k])[f"ndcg@{k}"]
    each = [ndcg_score(relevant[[i]], scores[[i]], k=k) for i in range(len(scores))]
    np.testing.assert_allclose(ours, each, atol=1e-12)


@pytest.mark.parametrize("k", [1, 5, 20])
def test_recall_and_ndcg_are_those_of_cornac(rankings, k):
    recommended, _, targets = rankings
    ours = metrics.ranking_metrics(recommended[:, :20], targets, [k])
    for name, theirs in (("recall", cornac.metrics.Recall(k)), ("ndcg", cornac.metrics.NDCG(k))):
        each = [theirs.compute(gt_pos=targets.row(i), pd_rank=recommended[i]) for i in range(len(targets))]
        np.testing.assert_allclose(ours[f"{name}@{k}"], each, atol=1e-12)


def test_mrr_is_that_of_cornac_which_knows_no_cutoff(rankings):
    recommended, _, targets = rankings
    theirs = cornac.metrics.MRR()
    each = np.array([theirs.compute(targets.row(i), recommended[i]) for i in range(len(targets))])
    np.testing.assert_allclose(metrics.ranking_metrics(recommended, targets, [30])["mrr@30"], each)
    cut = metrics.ranking_metrics(recommended, targets, [2])["mrr@2"]
    assert set(cut) == {0, 0.5, 1}
    np.testing.assert_allclose(cut, np.where(each >= 0.5, each, 0))


def test_ranks_of_every_target_in_pieces(monkeypatch):
    recommended, targets = np.array([[4, 2, 9], [1, 2, 0], [0, 0, 0]]), ragged([[9, 4, 9], [3, 2], [1]])
    assert metrics.target_ranks(recommended, targets).tolist() == [3, 1, 3, 0, 2, 0]
    monkeypatch.setattr(metrics, "MAX_CELLS", 6)
    assert metrics.target_ranks(recommended, targets).tolist() == [3, 1, 3, 0, 2, 0]


def test_first_occurrences_of_a_users_items():
    user, item = np.array([0, 0, 0, 1, 1]), np.array([9, 4, 9, 4, 4], np.int32)
    assert metrics.first_occurrences(user, item).tolist() == [0, 1, 3]


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
