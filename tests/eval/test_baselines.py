"""Baselines against dense formulas, and what all of them promise: masks, ties, padding, blocks."""

import numpy as np
import pytest
import scipy.sparse as sp

from contract.metrics import ranking_metrics
from eval import baselines
from eval.baselines import BASELINES, Fit
from eval.users import EvalUsers
from tests.eval.rows import ragged

NUM_USERS, NUM_ITEMS = 40, 25


def make_fit(rng: np.random.Generator) -> Fit:
    """Users of two tastes, so that neighbours mean something."""
    taste = np.arange(NUM_USERS + 1)[:, None] % 2 == np.arange(NUM_ITEMS + 1)[None, :] % 2
    dense = rng.random((NUM_USERS + 1, NUM_ITEMS + 1)) < np.where(taste, 0.35, 0.05)
    dense[0], dense[:, 0] = False, False
    train = sp.csr_matrix(dense.astype(float))
    return Fit(
        train,
        make_users(rng, train),
        rng.normal(size=(NUM_USERS + 1, 4)).astype(np.float32),
        rng.normal(size=(NUM_ITEMS + 1, 4)).astype(np.float32),
    )


def make_users(rng: np.random.Generator, train: sp.csr_matrix) -> EvalUsers:
    user_idx = np.sort(rng.choice(np.arange(1, NUM_USERS + 1), 30, replace=False))
    history = [rng.permutation(train[u].indices).tolist() for u in user_idx]
    return EvalUsers(user_idx, ragged(history), ragged(rng.integers(1, NUM_ITEMS + 1, (30, 1)).tolist()))


@pytest.fixture
def fit():
    return make_fit(np.random.default_rng(0))


@pytest.fixture
def users(fit):
    return make_users(np.random.default_rng(1), fit.train)


def ranked(scores: np.ndarray, users: EvalUsers, k: int, mask_seen: bool) -> list[list[int]]:
    """The definition: sort (-score, item_idx) of every allowed item, a user at a time."""
    result = []
    for row in range(len(users)):
        seen = set(users.history.row(row).tolist()) if mask_seen else set()
        allowed = [i for i in range(1, NUM_ITEMS + 1) if i not in seen]
        best = sorted(allowed, key=lambda i: (-np.float32(scores[row, i]), i))[:k]
        result.append(best + [0] * (k - len(best)))
    return result


def cosine(train: sp.csr_matrix, shrinkage: float) -> np.ndarray:
    dense = train.toarray()
    overlap, count = dense.T @ dense, dense.sum(axis=0)
    np.fill_diagonal(overlap, 0)
    with np.errstate(invalid="ignore"):
        return np.nan_to_num(overlap / (np.sqrt(np.outer(count, count)) + shrinkage))


def history_matrix(users: EvalUsers) -> np.ndarray:
    matrix = np.zeros((len(users), NUM_ITEMS + 1))
    for row in range(len(users)):
        matrix[row, users.history.row(row)] = 1
    return matrix


@pytest.mark.parametrize("mask_seen", [True, False])
def test_popularity_is_the_number_of_train_users(fit, users, mask_seen):
    scores = np.tile(fit.train.toarray().sum(axis=0), (len(users), 1))
    ranking = baselines.popularity(fit, users, 6, mask_seen)
    assert ranking.item_idx.tolist() == ranked(scores, users, 6, mask_seen)


@pytest.mark.parametrize("mask_seen", [True, False])
def test_lightgcn_is_the_inner_product(fit, users, mask_seen):
    scores = fit.user_embeddings[users.user_idx].astype(np.float64) @ fit.item_embeddings.astype(np.float64).T
    ranking = baselines.lightgcn(fit, users, 6, mask_seen)
    assert ranking.item_idx.tolist() == ranked(scores, users, 6, mask_seen)


@pytest.mark.parametrize("mask_seen", [True, False])
def test_item_knn_is_the_shrunk_cosine_of_the_best_valid_ndcg(fit, users, mask_seen):
    def ndcg(shrinkage):
        recommended = ranked(history_matrix(fit.valid) @ cosine(fit.train, shrinkage), fit.valid, 10, mask_seen)
        return ranking_metrics(np.array(recommended), fit.valid.targets, [10])["ndcg@10"].mean()

    values = {shrinkage: ndcg(shrinkage) for shrinkage in baselines.SHRINKAGES}
    assert len(set(values.values())) > 1, "the choice must matter for this test to be one"
    best = max(values, key=values.get)
    ranking = baselines.item_knn(fit, users, 6, mask_seen)
    assert ranking.settings["shrinkage"] == best
    assert ranking.item_idx.tolist() == ranked(history_matrix(users) @ cosine(fit.train, best), users, 6, mask_seen)


def test_item_knn_keeps_the_most_similar_neighbours(fit, monkeypatch):
    monkeypatch.setattr(baselines, "NUM_NEIGHBOURS", 3)
    kept, dense = baselines._neighbours(fit.train, 10).toarray(), cosine(fit.train, 10)
    for item in range(NUM_ITEMS + 1):
        near = sorted(np.nonzero(dense[item])[0], key=lambda i: (-dense[item, i], i))[:3]
        expected = np.zeros(NUM_ITEMS + 1)
        expected[near] = dense[item, near]
        np.testing.assert_allclose(kept[item], expected)


def test_item_knn_scores_with_the_history_that_it_is_given(fit):
    """At test time the history may hold valid items that the fit has not seen of this user."""
    user = EvalUsers(np.array([1]), ragged([[2, 3]]), ragged([[4]]))
    ranking = baselines.item_knn(fit, user, 5, True)
    scores = history_matrix(user) @ cosine(fit.train, ranking.settings["shrinkage"])
    assert ranking.item_idx.tolist() == ranked(scores, user, 5, True)


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("mask_seen", [True, False])
def test_all_rank_real_items_once_and_none_that_is_masked(name, mask_seen, fit, users):
    ranking = BASELINES[name](fit, users, NUM_ITEMS + 5, mask_seen)
    assert ranking.item_idx.dtype == np.int32
    everything = set(range(1, NUM_ITEMS + 1))
    for row in range(len(users)):
        expected = everything - set(users.history.row(row).tolist()) if mask_seen else everything
        items = ranking.item_idx[row].tolist()
        assert set(items[: len(expected)]) == expected
        assert not any(items[len(expected) :])


@pytest.mark.parametrize("name", BASELINES)
def test_blocks_do_not_show(name, fit, users, monkeypatch):
    whole = BASELINES[name](fit, users, 8, True).item_idx
    monkeypatch.setattr(baselines, "MAX_BLOCK_CELLS", 3 * (NUM_ITEMS + 1))
    np.testing.assert_array_equal(BASELINES[name](fit, users, 8, True).item_idx, whole)
    rows = np.arange(1, len(users), 2)
    np.testing.assert_array_equal(BASELINES[name](fit, users.take(rows), 8, True).item_idx, whole[rows])


def test_top_items_breaks_ties_by_column():
    inf = np.float32(np.inf)
    scores = np.array([[-inf, 2, 5, 5, 2, -1], [-inf, -0.0, 0.0, -3, -2, -inf], [-inf, -inf, -inf, 1, -inf, -inf]])
    assert baselines.top_items(scores.astype(np.float32), 4).tolist() == [[2, 3, 1, 4], [1, 2, 4, 3], [3, 0, 0, 0]]


def test_top_items_is_a_full_sort():
    scores = np.random.default_rng(0).integers(-3, 4, (20, 50)).astype(np.float32) / 7
    expected = np.lexsort((np.broadcast_to(np.arange(50), scores.shape), -scores))[:, :9]
    np.testing.assert_array_equal(baselines.top_items(scores, 9), expected)
