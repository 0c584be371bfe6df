import itertools

import numpy as np
import pytest

from gid import hierarchy
from gid.hierarchy import (
    build_tree,
    cluster_capacity,
    cluster_sse,
    gid_length,
    leaf_sse,
    prefix_of,
    random_tree,
)


def cluster_sizes(gids, level):
    return np.unique(gids[:, :level], axis=0, return_counts=True)[1]


@pytest.mark.parametrize(
    ("num_items", "branching", "slack", "length"),
    [(1, 2, 1, 1), (32, 32, 1, 1), (32, 32, 1.25, 2), (1024, 32, 1, 2), (1025, 32, 1, 3), (10429, 32, 1.25, 3)],
)
def test_length_is_the_least_that_holds_the_items(num_items, branching, slack, length):
    assert gid_length(num_items, branching, slack) == length


@pytest.mark.parametrize("seed", range(12))
def test_gids_are_unique_and_clusters_keep_to_capacity_for_any_input(seed):
    rng = np.random.default_rng(seed)
    branching, length = int(rng.integers(2, 9)), int(rng.integers(1, 5))
    num_items = int(rng.integers(1, min(branching**length, 600) + 1))
    headroom = float(rng.choice([0.3, 0.75, 1.0]))
    x = rng.normal(size=(num_items, 5)) * rng.exponential(size=(num_items, 1)) ** 3
    x = x[rng.integers(num_items, size=num_items)] if seed % 3 == 0 else x  # rows that repeat
    gids = build_tree(x, branching, length, headroom, seed)
    assert gids.shape == (num_items, length)
    assert gids.dtype == np.int16
    assert gids.min() >= 0
    assert gids.max() < branching
    assert len(np.unique(gids, axis=0)) == num_items
    for level in range(1, length + 1):
        assert cluster_sizes(gids, level).max() <= branching ** (length - level)


def test_full_tree_takes_every_path():
    gids = build_tree(np.random.default_rng(0).normal(size=(64, 3)), 4, 3, 0.5, 0)
    assert sorted(map(tuple, gids.tolist())) == list(itertools.product(range(4), repeat=3))


def test_headroom_leaves_room_in_inner_clusters():
    # one dense blob beside scattered rows: without headroom its cluster would be filled to the brim
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(size=(280, 4)) * 0.01, rng.normal(size=(80, 4)) * 50])
    tight, roomy = build_tree(x, 8, 3, 1.0, 0), build_tree(x, 8, 3, 0.75, 0)
    assert cluster_sizes(tight, 1).max() > 48
    assert cluster_sizes(roomy, 1).max() <= 48
    assert cluster_sizes(roomy, 2).max() <= 6


@pytest.mark.parametrize(
    ("num_items", "expected"),
    [(100, 48), (384, 48), (390, 49), (512, 64)],  # K = 8: at most 64, 0.75 of it where 8 children can hold the items
)
def test_cluster_capacity(num_items, expected):
    assert cluster_capacity(num_items, 8, 2, 0.75) == expected


def test_siblings_are_alike_and_leaf_sse_is_the_textbook_sum():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(20, 6))[rng.integers(20, size=400)] + 0.1 * rng.normal(size=(400, 6))
    gids = build_tree(x, 8, 3, 0.75, 0)
    total = 0.0
    for prefix in {tuple(g[:-1]) for g in gids.tolist()}:
        leaf = x[(gids[:, :-1] == prefix).all(1)]
        total += np.square(leaf - leaf.mean(0)).sum()
    assert leaf_sse(x, gids) == pytest.approx(total)
    assert leaf_sse(x, gids) < 0.2 * leaf_sse(x, gids[rng.permutation(400)])


def test_same_seed_same_tree_whoever_splits_the_nodes(monkeypatch):
    # pieces as of a large tree: the root by two threads, nodes of level 1 alone, subtrees below
    for name, rows in {"ALONE": 800, "SUBTREE": 100, "WORTH_PROCESSES": 10}.items():
        monkeypatch.setattr(hierarchy, name, rows)
    x = np.random.default_rng(0).normal(size=(900, 5))
    one = build_tree(x, 4, 6, 0.75, 3, workers=1)
    np.testing.assert_array_equal(one, build_tree(x, 4, 6, 0.75, 3, workers=2))
    assert (one != build_tree(x, 4, 6, 0.75, 4, workers=1)).any()
    assert len(np.unique(one, axis=0)) == 900
    assert cluster_sse(x, one, 3) < 0.5 * cluster_sse(x, random_tree(900, 4, 6), 3)


@pytest.mark.parametrize("rows", [np.zeros((70, 3)), np.repeat(np.eye(3), [60, 5, 5], axis=0), np.zeros((3, 3))])
def test_rows_that_are_alike_fill_a_tree(rows):
    gids = build_tree(rows, 5, 3, 0.75, 0)
    assert len(np.unique(gids, axis=0)) == len(rows)
    for level in (1, 2):
        assert cluster_sizes(gids, level).max() <= 5 ** (3 - level)


def test_prefixes_are_numbered_in_their_order_and_sse_falls_with_the_level():
    gids = np.array([[1, 0, 0], [0, 2, 1], [1, 0, 1], [0, 1, 0]])
    np.testing.assert_array_equal(prefix_of(gids, 2), [2, 1, 2, 0])
    np.testing.assert_array_equal(prefix_of(gids, 0), [0, 0, 0, 0])
    x = np.array([[0.0], [1.0], [2.0], [5.0]])
    assert [cluster_sse(x, gids, level) for level in range(4)] == [14.0, 10.0, 2.0, 0.0]


def test_too_many_items_names_the_length_that_would_do():
    with pytest.raises(ValueError, match=r"65 items do not fit .* \(4\^3 = 64\); set gid.length = 4 or more"):
        build_tree(np.zeros((65, 2)), 4, 3)


def test_row_that_is_not_finite_is_named_by_its_item():
    x = np.zeros((50, 2))
    x[17] = np.nan
    with pytest.raises(ValueError, match="row 17"):
        build_tree(x, 4, 3)


@pytest.mark.parametrize(("num_items", "branching", "length"), [(1, 2, 1), (27, 3, 3), (20, 3, 3), (5, 32, 2)])
def test_random_tree_is_unique_and_even(num_items, branching, length):
    gids = random_tree(num_items, branching, length, seed=1)
    assert len(np.unique(gids, axis=0)) == num_items
    assert gids.dtype == np.int16
    first = np.bincount(gids[:, 0], minlength=branching)
    assert first.max() - first.min() <= 1
    if num_items > 2:
        assert (gids != random_tree(num_items, branching, length, seed=2)).any()
