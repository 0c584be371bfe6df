import numpy as np
import pytest
import torch

from gid.extend import extend_tree
from gid.hierarchy import build_tree
from gid.tree import GidTree


def with_padding(gids):
    return np.concatenate([np.zeros((1, gids.shape[1]), gids.dtype), gids])


def test_new_items_go_to_the_leaf_of_their_likes():
    x = np.array([[0.0, 0], [0, 1], [10, 0], [10, 1]])
    gids = np.array([[0, 0], [0, 1], [2, 0], [2, 2]], np.int16)
    new, displaced = extend_tree(gids, x, np.array([[9.0, 0], [1, 0]]), 3)
    assert new.tolist() == [[2, 1], [0, 2]]  # the free place of the nearest leaf
    assert not displaced.any()


def test_the_nearest_stay_where_a_leaf_fills_up_and_the_others_are_displaced():
    x = np.array([[0.0], [0.1], [10.0]])
    gids = np.array([[0, 0], [0, 1], [1, 0]], np.int16)
    new, displaced = extend_tree(gids, x, np.array([[3.0], [0.5], [4.0]]), 3)
    assert new[1].tolist() == [0, 2]
    assert new[[0, 2], 0].tolist() == [1, 1]
    assert displaced.tolist() == [True, False, True]


def test_an_unused_child_is_opened_when_the_others_are_full():
    gids = np.array([[1, 0], [1, 1]], np.int16)
    new, displaced = extend_tree(gids, np.zeros((2, 1)), np.zeros((2, 1)), 2)
    assert sorted(new.tolist()) == [[0, 0], [0, 1]]
    assert displaced.all()


@pytest.mark.parametrize("seed", range(5))
def test_old_items_decode_as_before_and_capacity_holds(seed):
    rng = np.random.default_rng(seed)
    branching, length = 4, 4
    x = rng.normal(size=(120, 5)) + 4 * rng.normal(size=(6, 5))[rng.integers(6, size=120)]
    new_x = rng.normal(size=(branching**length - 120, 5)) + x[0]  # fills every path
    old = build_tree(x, branching, length, 0.75, seed)
    new, displaced = extend_tree(old, x, new_x, branching)
    tree = GidTree(with_padding(np.concatenate([old, new])), branching)  # refuses twins
    assert 0 < displaced.mean() <= 1
    for item, codes in enumerate(old, 1):
        node = torch.tensor(0)
        for level, code in enumerate(codes):
            node = tree.child(level, node, (tree.codes(level, node) == int(code)).nonzero()[0, 0])
        assert tree.leaf_item[node] == item
    with pytest.raises(ValueError, match=r"2 new items do not fit: 4\^4 paths hold 255 items already, 1 are free"):
        extend_tree(np.concatenate([old, new])[:-1], np.concatenate([x, new_x])[:-1], new_x[:2], branching)


def test_with_room_the_descent_costs_little_more_than_building_anew():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(30, 6)) * 3
    x = centres[rng.integers(30, size=500)] + rng.normal(size=(500, 6))
    gids = build_tree(x[:420], 8, 3, 0.75, 0)
    new, displaced = extend_tree(gids, x[:420], x[420:], 8)
    from gid.hierarchy import cluster_sse

    grown = np.concatenate([gids, new])
    assert displaced.mean() < 0.6
    assert cluster_sse(x, grown, 1) < 1.15 * cluster_sse(x, build_tree(x, 8, 3, 0.75, 0), 1)
