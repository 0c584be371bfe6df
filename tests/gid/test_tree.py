import itertools

import numpy as np
import pytest
import torch

from gid.tree import GidTree, build_tree, cluster_capacity, gid_length, leaf_sse, random_tree


def with_padding(gids):
    return np.concatenate([np.zeros((1, gids.shape[1]), gids.dtype), gids])


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


def test_same_seed_same_tree():
    x = np.random.default_rng(0).normal(size=(200, 5))
    np.testing.assert_array_equal(build_tree(x, 4, 4, 0.75, 3), build_tree(x, 4, 4, 0.75, 3))


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


def prefixes(gids, level):
    return sorted({tuple(g[:level]) for g in gids.tolist()})


@pytest.mark.parametrize("seed", range(6))
def test_child_tables_against_all_prefixes(seed):
    rng = np.random.default_rng(seed)
    branching, length = int(rng.integers(2, 6)), int(rng.integers(1, 5))
    every = np.array(list(itertools.product(range(branching), repeat=length)))
    gids = every[rng.permutation(len(every))[: rng.integers(1, len(every) + 1)]]
    tree = GidTree(with_padding(gids), branching)
    assert (tree.num_items, tree.length, tree.branching) == (len(gids), length, branching)
    for level in range(length):
        table, parents, children = tree.child_table(level), prefixes(gids, level), prefixes(gids, level + 1)
        assert table.dtype == torch.int64
        assert table.shape == (len(parents), branching)
        for node, parent in enumerate(parents):
            for code in range(branching):
                child = (*parent, code)
                assert table[node, code] == (children.index(child) if child in children else -1)
    for leaf, gid in enumerate(prefixes(gids, length)):
        assert gids[tree.leaf_item[leaf] - 1].tolist() == list(gid)


def test_child_table_serves_beams():
    gids = np.array([[0, 0], [0, 2], [2, 1]])
    tree = GidTree(with_padding(gids))
    assert tree.branching == 3
    nodes = torch.tensor([[0, 1], [1, 1]])  # (B, beams), prefixes (0,) and (2,)
    assert tree.child_table(1)[nodes].tolist() == [[[0, -1, 1], [-1, 2, -1]], [[-1, 2, -1], [-1, 2, -1]]]
    assert tree.to("cpu").leaf_item[tree.child_table(1)[0, 2]] == 2


def test_siblings_share_the_prefix():
    gids = np.array([[1, 0], [0, 0], [1, 2], [0, 1], [2, 0]])
    tree = GidTree(with_padding(gids))
    siblings = tree.siblings()
    assert tree.group[0] == 0
    assert len(siblings.row(0)) == 0
    for item in range(1, 6):
        same = [j for j in range(1, 6) if gids[j - 1, 0] == gids[item - 1, 0]]
        assert siblings.row(tree.group[item]).tolist() == same


def test_tree_refuses_twins_and_codes_out_of_range():
    with pytest.raises(ValueError, match=r"items 1 and 3 share the GID \(1, 2\)"):
        GidTree(with_padding(np.array([[1, 2], [0, 0], [1, 2]])))
    with pytest.raises(ValueError, match=r"codes 0..5, not within 0..3"):
        GidTree(with_padding(np.array([[1, 5], [0, 0]])), branching=4)
