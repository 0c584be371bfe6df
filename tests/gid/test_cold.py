import numpy as np
import scipy.sparse as sp

from contract.schema import Ragged
from gid import cold


def tokens_of(rows):
    """Ragged with the empty padding row 0."""
    lengths = [0, *map(len, rows)]
    return Ragged(np.array([t for row in rows for t in row], np.int32), np.concatenate([[0], np.cumsum(lengths)]))


def test_cold_items_land_near_warm_items_of_like_content():
    rng = np.random.default_rng(0)
    topic = rng.integers(3, size=200)
    centres = rng.normal(size=(3, 8)) * 5
    embeddings = (centres[topic] + 0.1 * rng.normal(size=(200, 8))).astype(np.float32)
    rows = [rng.integers(100 * t + 10, 100 * t + 40, size=6) for t in topic]
    is_cold = np.zeros(200, bool)
    is_cold[[5, 50, 150]] = True
    rows[199], is_cold[199] = [], True
    embeddings[is_cold] = np.nan  # must not be read
    tokens = tokens_of(rows)
    filled = cold.fill(embeddings, tokens, is_cold, seed=1)
    np.testing.assert_array_equal(tokens.values, np.concatenate(rows))  # not sorted or summed in place
    np.testing.assert_array_equal(filled[~is_cold], embeddings[~is_cold])
    assert filled.dtype == np.float32
    for item in (5, 50, 150):
        assert np.linalg.norm(filled[item] - centres, axis=1).argmin() == topic[item]
    np.testing.assert_allclose(filled[199], embeddings[~is_cold].mean(0), rtol=1e-4, atol=1e-5)


def test_items_without_any_content_get_the_mean():
    embeddings = np.array([[1, 2], [3, 4], [0, 0]], np.float32)
    filled = cold.fill(embeddings, tokens_of([[], [], []]), np.array([False, False, True]), seed=0)
    np.testing.assert_allclose(filled[2], [2, 3])


def test_ridge_equals_the_normal_equations():
    rng = np.random.default_rng(0)
    x, y = rng.random((50, 12)) * (rng.random((50, 12)) < 0.3), rng.normal(size=(50, 4))
    exact = np.linalg.solve(x.T @ x + cold.RIDGE * np.eye(12), x.T @ y)
    np.testing.assert_allclose(cold.ridge(sp.csr_array(x), y), exact, atol=1e-4)
    assert not cold.ridge(sp.csr_array(x), np.zeros((50, 4))).any()
