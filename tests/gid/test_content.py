import numpy as np

from contract.schema import Ragged
from gid import content


def tokens_of(rows):
    """Ragged with the empty padding row 0."""
    lengths = [0, *map(len, rows)]
    return Ragged(np.array([t for row in rows for t in row], np.int32), np.concatenate([[0], np.cumsum(lengths)]))


def test_tfidf_by_hand():
    found = content.tfidf(tokens_of([[3, 3, 4], [4], []])).toarray()
    rare, common = np.log(4 / 2), np.log(4 / 3)
    first = np.array([(1 + np.log(2)) * rare, common])
    np.testing.assert_allclose(found[0, 3:], first / np.linalg.norm(first))
    np.testing.assert_allclose(found[1:, 3:], [[0, 1], [0, 0]])


def test_features_keep_the_leading_directions_of_tfidf():
    rng = np.random.default_rng(0)
    rows = [rng.integers(10 * topic, 10 * topic + 12, size=8) for topic in rng.integers(4, size=150)]
    exact = content.tfidf(tokens_of([*rows, []])).toarray()
    left, singular, _ = np.linalg.svd(exact, full_matrices=False)
    found = content.features(tokens_of([*rows, []]), 4, seed=1)
    assert found.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(found, axis=0), singular[:4], rtol=1e-3)
    expected = left[:, :4] * singular[:4]
    np.testing.assert_allclose(found @ found.T, expected @ expected.T, atol=0.02)
    assert not found[-1].any()


def test_fewer_words_than_features_leave_zeros():
    found = content.features(tokens_of([[1], [2], [1, 2]]), 8, seed=0)
    assert found.shape == (3, 8)
    assert np.linalg.matrix_rank(found) == 2
    assert not content.features(tokens_of([[], []]), 4, seed=0).any()


def test_whitened_blocks_weigh_the_same():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2000, 3)) * [100, 10, 5] + 7
    found = content.whitened(x)
    np.testing.assert_allclose(np.cov(found.T, bias=True), np.eye(3) / 3, atol=1e-3)
    np.testing.assert_allclose(found.mean(0), 0, atol=1e-5)
    flat = content.whitened(np.column_stack([x, np.full(2000, 4.0)]))
    assert np.isfinite(flat).all()
    assert not content.whitened(np.zeros((5, 2))).any()
