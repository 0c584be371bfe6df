import numpy as np
import pytest

from gid.report import draw_map, entropy, principal_axes


def test_entropy_in_bits():
    assert entropy(np.array([4, 4, 0, 4, 4])) == 2
    assert entropy(np.array([7])) == 0
    assert entropy(np.array([2, 1, 1])) == pytest.approx(1.5)


def test_principal_axes_carry_the_most_variance_and_do_not_flip():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 4)) * [0.1, 5, 0.2, 2]
    found = principal_axes(x, 2)
    np.testing.assert_allclose(np.abs(np.corrcoef(found[:, 0], x[:, 1])[0, 1]), 1, atol=1e-2)
    np.testing.assert_allclose(found.var(0), [25, 4], rtol=0.2)
    np.testing.assert_allclose(principal_axes(x[::-1], 2)[::-1], found, atol=1e-8)
    assert principal_axes(np.ones((4, 1)), 2).shape == (4, 2)


def test_the_same_map_for_the_same_items():
    x = np.random.default_rng(0).normal(size=(50, 3))
    gids = np.stack([np.arange(50) % 4, np.arange(50) // 4], axis=1)
    assert draw_map(gids, x, 0) == draw_map(gids, x, 0)
    assert draw_map(gids, x, 0) != draw_map(gids, -x, 0)
