import itertools

import numpy as np
import pytest
import torch

from gid.tree import GidTree


def with_padding(gids):
    return np.concatenate([np.zeros((1, gids.shape[1]), gids.dtype), gids])


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
