"""Baselines: what all of them promise, and each against a formula or literal rows."""

import dataclasses

import numpy as np
import pytest
import scipy.sparse as sp

from contract.metrics import ranking_metrics
from contract.settings import Config, Eval
from eval.baselines import BASELINES, Fit, LeftOut, ease, factors, neighbours, popularity, rank_all, ranking, sasrec
from eval.users import EvalUsers
from tests.eval.rows import ragged

NUM_USERS, NUM_ITEMS = 90, 32
# Four tastes of eight items each, walked through in a circle. The last two came late and have fewer users, but theirs
# are the users that are asked for: the popular items are wrong for them.
TASTE = np.array([0] * 30 + [1] * 30 + [2] * 15 + [3] * 15)


def make_fit() -> Fit:
    rng = np.random.default_rng(0)
    start, length = rng.integers(8, size=NUM_USERS), rng.integers(3, 6, NUM_USERS)
    walks = [(1 + 8 * t + (s + np.arange(n)) % 8).tolist() for t, s, n in zip(TASTE, start, length, strict=True)]
    sequences = ragged(walks)
    train = sp.csr_matrix(
        (np.ones(len(sequences.values)), (np.repeat(np.arange(NUM_USERS) + 1, length), sequences.values)),
        (NUM_USERS + 1, NUM_ITEMS + 1),
    )
    late = np.arange(60, NUM_USERS)
    targets = [[1 + 8 * TASTE[u] + (start[u] + length[u]) % 8] for u in late]
    users = EvalUsers(late + 1, ragged([walks[u] for u in late]), ragged(targets))
    ts = np.repeat(np.arange(NUM_USERS) * 1000, length) + np.concatenate([np.arange(n) for n in length])
    user_embeddings = np.concatenate([np.zeros((1, 4)), np.eye(4)[TASTE]]).astype(np.float32)
    item_embeddings = np.concatenate([np.zeros((1, 4)), np.eye(4)[np.arange(NUM_ITEMS) // 8]]).astype(np.float32)
    config = Config(eval=Eval(sasrec_epochs=12))
    return Fit(train, users, user_embeddings, item_embeddings, sequences, ts, config)


@pytest.fixture(autouse=True)
def small_sasrec(monkeypatch):
    shrink_sasrec(monkeypatch)


def shrink_sasrec(monkeypatch) -> None:
    """A model that some dozens of steps train."""
    for key, value in {"dim": 16, "num_layers": 1, "dropout": 0.0}.items():
        monkeypatch.setitem(sasrec.MODEL, key, value)
    monkeypatch.setitem(sasrec.TRAINING, "lr", 1e-2)


@pytest.fixture(scope="module")
def fit():
    return make_fit()


@pytest.fixture(scope="module")
def users(fit):
    """Those of `fit.valid`, and one of whom nothing is known."""
    known = fit.valid
    nobody = EvalUsers(np.array([1]), ragged([[]]), ragged([[1]]))
    values = [np.concatenate([nobody.history.values, known.history.values]).astype(np.int32), known.targets.values]
    offsets = [np.concatenate([[0], known.history.offsets]), np.arange(len(known) + 2)]
    targets = np.concatenate([[1], values[1]]).astype(np.int32)
    return EvalUsers(
        np.concatenate([[1], known.user_idx]),
        ranking.Ragged(values[0], offsets[0]),
        ranking.Ragged(targets, offsets[1]),
    )


def ranked(scores: np.ndarray, users: EvalUsers, k: int, mask_seen: bool) -> list[list[int]]:
    """The definition: sort (-score, item_idx) of every allowed item, a user at a time."""
    result = []
    for row in range(len(users)):
        seen = set(users.history.row(row).tolist()) if mask_seen else set()
        allowed = [i for i in range(1, scores.shape[1]) if i not in seen]
        best = sorted(allowed, key=lambda i: (-np.float32(scores[row, i]), i))[:k]
        result.append(best + [0] * (k - len(best)))
    return result


def history_matrix(users: EvalUsers) -> np.ndarray:
    matrix = np.zeros((len(users), NUM_ITEMS + 1))
    for row in range(len(users)):
        matrix[row, users.history.row(row)] = 1
    return matrix


def ndcg(recommended: list[list[int]] | np.ndarray, users: EvalUsers) -> float:
    return ranking_metrics(np.asarray(recommended), users.targets, [10])["ndcg@10"].mean()


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("mask_seen", [True, False])
def test_all_rank_real_items_once_and_none_that_is_masked(name, mask_seen, fit, users):
    recommended = BASELINES[name](fit, users, NUM_ITEMS + 5, mask_seen).item_idx
    assert recommended.dtype == np.int32
    assert recommended.shape == (len(users), NUM_ITEMS + 5)
    everything = set(range(1, NUM_ITEMS + 1))
    for row in range(len(users)):
        expected = everything - set(users.history.row(row).tolist()) if mask_seen else everything
        items = recommended[row].tolist()
        assert set(items[: len(expected)]) == expected
        assert not any(items[len(expected) :])


@pytest.mark.parametrize("name", BASELINES)
def test_neither_blocks_nor_a_second_run_show(name, fit, users, monkeypatch):
    whole = BASELINES[name](fit, users, 8, True).item_idx
    monkeypatch.setattr(ranking, "MAX_BLOCK_CELLS", 3 * (NUM_ITEMS + 1))
    np.testing.assert_array_equal(BASELINES[name](fit, users, 8, True).item_idx, whole)
    rows = np.arange(1, len(users), 2)
    np.testing.assert_array_equal(BASELINES[name](fit, users.take(rows), 8, True).item_idx, whole[rows])


@pytest.mark.parametrize("name", [name for name in BASELINES if name != "popularity"])
def test_all_find_more_than_popularity(name, fit):
    plain = BASELINES["popularity"](fit, fit.valid, 10, True).item_idx
    found = BASELINES[name](fit, fit.valid, 10, True).item_idx
    assert ndcg(found, fit.valid) > ndcg(plain, fit.valid) + 0.1


@pytest.mark.parametrize("mask_seen", [True, False])
def test_popularity_is_the_number_of_train_users(fit, users, mask_seen):
    scores = np.tile(fit.train.toarray().sum(axis=0), (len(users), 1))
    found = popularity.popularity(fit, users, 6, mask_seen).item_idx
    assert found.tolist() == ranked(scores, users, 6, mask_seen)


def test_recent_popularity_counts_the_last_events(fit, monkeypatch):
    """Ten events in an order of time that is not that of the rows; with 0.3 of them, items 5, 6 and 6 count."""
    sequences, ts = ragged([[1, 2, 6], [1, 3, 5], [1, 2, 3, 6]]), np.array([10, 20, 90, 30, 40, 95, 50, 60, 70, 99])
    log = dataclasses.replace(fit, sequences=sequences, ts=ts)
    user = EvalUsers(np.array([1]), ragged([[6]]), ragged([[4]]))
    monkeypatch.setattr(popularity, "RECENT_SHARES", (0.3,))
    assert popularity.recent_popularity(log, user, 4, False).item_idx.tolist() == [[6, 5, 1, 2]]
    assert popularity.recent_popularity(log, user, 4, True).item_idx.tolist() == [[5, 1, 2, 3]]
    monkeypatch.setattr(popularity, "RECENT_SHARES", (1,))
    assert popularity.recent_popularity(log, user, 4, False).item_idx.tolist() == [[1, 2, 3, 6]]


@pytest.mark.parametrize("ts", [None, -1])
def test_recent_popularity_needs_dates(fit, ts):
    log = dataclasses.replace(fit, ts=ts and np.full(len(fit.ts), ts))
    with pytest.raises(LeftOut, match="no times"):
        popularity.recent_popularity(log, fit.valid, 5, True)


@pytest.mark.parametrize("mask_seen", [True, False])
def test_lightgcn_is_the_inner_product(fit, users, mask_seen):
    rng = np.random.default_rng(3)
    tables = [rng.normal(size=(n + 1, 4)).astype(np.float32) for n in (NUM_USERS, NUM_ITEMS)]
    other = dataclasses.replace(fit, user_embeddings=tables[0], item_embeddings=tables[1])
    scores = tables[0][users.user_idx].astype(np.float64) @ tables[1].astype(np.float64).T
    assert factors.lightgcn(other, users, 6, mask_seen).item_idx.tolist() == ranked(scores, users, 6, mask_seen)


def test_als_solves_for_the_history_that_it_is_given(fit, monkeypatch):
    """x_u = (Y'Y + Y'(C_u - 1)Y + reg)^-1 Y' C_u p_u (Hu, Koren and Volinsky), confidence alpha in what is known."""
    settings = {"factors": 4, "alpha": 5, "regularization": 0.1}
    item_factors = factors._fit_als(fit, settings).item_factors.astype(np.float64)
    history = history_matrix(fit.valid)
    scores = []
    for row in history:
        known = item_factors[row > 0]
        gram = item_factors.T @ item_factors + 4 * known.T @ known + 0.1 * np.eye(4)
        scores.append(item_factors @ np.linalg.solve(gram, 5 * known.sum(0)))
    monkeypatch.setattr(factors, "NUM_FACTORS", 4)
    monkeypatch.setattr(factors, "ALPHAS", (5,))
    monkeypatch.setattr(factors, "REGULARIZATIONS", (0.1,))
    found = factors.als(fit, fit.valid, 3, True)
    assert found.settings == settings
    assert found.item_idx.tolist() == ranked(np.array(scores), fit.valid, 3, True)


def test_item_knn_is_bm25_over_the_users_of_an_item(fit):
    dense, k1, b = fit.train.toarray(), 1.2, 0.25
    num_users, num_items = dense.sum(axis=0), dense.sum(axis=1)
    idf = np.log(len(num_users)) - np.log(1 + num_items)
    weight = dense * (k1 + 1) / (k1 * (1 - b + b * num_users / num_users.mean()) + 1) * idf[:, None]
    expected = weight.T @ weight
    np.fill_diagonal(expected, 0)
    np.testing.assert_allclose(neighbours.similarity(fit.train, 100, k1, b).toarray(), expected)


def test_item_knn_scores_with_the_history_that_it_is_given(fit):
    """At test time the history may hold valid items that the fit has not seen of this user."""
    user = EvalUsers(np.array([1]), ragged([[2, 30]]), ragged([[4]]))
    found = neighbours.item_knn(fit, user, 5, True)
    scores = history_matrix(user) @ neighbours.similarity(fit.train, **found.settings)
    assert found.item_idx.tolist() == ranked(scores, user, 5, True)


def test_ease_is_the_ridge_regression_of_each_item_on_the_others():
    """4 users, 3 items: the least squares with the coefficient of the item itself left out."""
    dense = np.array([[0, 1, 1, 0], [0, 1, 1, 1], [0, 0, 1, 1], [0, 1, 0, 1]], np.float64)
    weights = ease.item_weights(sp.csr_matrix(dense), 0.5)
    for item in (1, 2, 3):
        others = [i for i in (1, 2, 3) if i != item]
        x = dense[:, others]
        expected = np.linalg.solve(x.T @ x + 0.5 * np.eye(2), x.T @ dense[:, item])
        np.testing.assert_allclose(weights[others, item], expected, rtol=1e-5)
        assert weights[item, item] == 0


def test_a_catalog_too_large_for_ease_is_left_out_and_said(fit, monkeypatch):
    monkeypatch.setattr(ease, "MAX_ITEMS", 31)
    said = []
    config = dataclasses.replace(fit.config, eval=Eval(baselines=("popularity", "ease", "item_knn")))
    rankings, facts = rank_all(dataclasses.replace(fit, config=config, progress=said.append), fit.valid, 5, True)
    assert list(rankings) == ["popularity", "item_knn"]
    assert "popularity" not in facts
    assert facts["ease"] == "left out: 32 items, more than the 31 of which a dense matrix can be inverted"
    assert "(chosen on valid)" in facts["item_knn"]
    assert len(said) == 3


def test_the_settings_are_those_of_the_best_valid_ndcg(fit, users):
    """The valid lists of each candidate are literal; the second hits."""
    hit, miss = np.zeros((2, len(fit.valid), 10), np.int32)
    hit[:, 3] = fit.valid.targets.values
    lists = {1: miss, 2: hit, 3: hit}

    def recommend(asked: EvalUsers, k: int, settings: dict) -> np.ndarray:
        if asked is fit.valid:
            assert k == 10
            return lists[settings["x"]]
        return np.full((len(asked), k), settings["x"], np.int32)

    found = ranking.choose([{"x": x} for x in lists], recommend, fit, users, 3)
    assert found.settings == {"x": 2}
    assert (found.item_idx == 2).all()


def test_top_items_breaks_ties_by_column():
    inf = np.float32(np.inf)
    scores = np.array([[-inf, 2, 5, 5, 2, -1], [-inf, -0.0, 0.0, -3, -2, -inf], [-inf, -inf, -inf, 1, -inf, -inf]])
    assert ranking.top_items(scores.astype(np.float32), 4).tolist() == [[2, 3, 1, 4], [1, 2, 4, 3], [3, 0, 0, 0]]


def test_top_items_is_a_full_sort():
    scores = np.random.default_rng(0).integers(-3, 4, (20, 50)).astype(np.float32) / 7
    expected = np.lexsort((np.broadcast_to(np.arange(50), scores.shape), -scores))[:, :9]
    np.testing.assert_array_equal(ranking.top_items(scores, 9), expected)
