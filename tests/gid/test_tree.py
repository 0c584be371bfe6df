import itertools

import numpy as np
import pytest
import torch

from gid.tree import GidTree


def with_padding(gids):
    return np.concatenate([np.zeros((1, gids.shape[1]), gids.dtype), gids])


def prefixes(gids, level):
    return sorted({tuple(g[:level]) for g in gids.tolist()})


@pytest.mark.parametrize("some", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_codes_and_children_against_all_prefixes(seed, some):
    rng = np.random.default_rng(seed)
    branching, length = int(rng.integers(2, 6)), int(rng.integers(1, 5))
    every = np.array(list(itertools.product(range(branching), repeat=length)))
    gids = every[rng.permutation(len(every))[: rng.integers(1, len(every) + 1)]]
    catalog = len(gids)
    items = np.arange(1, catalog + 1)
    only = rng.choice(items, rng.integers(1, len(items) + 1)) if some else None
    tree = GidTree(with_padding(gids), branching, only)
    kept = gids if only is None else gids[np.unique(only) - 1]
    assert (tree.num_items, tree.length, tree.branching) == (catalog, length, branching)
    for level in range(length):
        parents, children, lead_on = prefixes(gids, level), prefixes(gids, level + 1), prefixes(kept, level + 1)
        assert tree.nodes_per_level[level : level + 2] == [len(parents), len(children)]
        nodes = torch.arange(len(parents))
        codes = tree.codes(level, nodes)
        assert codes.dtype == torch.int64
        width = codes.shape[1]
        child = tree.child(level, nodes[:, None], torch.arange(width))
        sizes = []
        for node, parent in enumerate(parents):
            expected = [code for code in range(branching) if (*parent, code) in children]
            sizes.append(len(expected))
            some = [code if (*parent, code) in lead_on else -1 for code in expected]
            assert codes[node].tolist() == some + [-1] * (width - len(expected))
            assert child[node, : len(expected)].tolist() == [children.index((*parent, code)) for code in expected]
        assert width == max(sizes)
        assert child.max() < len(children)
    of_item = dict(zip(items.tolist(), gids.tolist(), strict=True))
    assert [tuple(of_item[int(item)]) for item in tree.leaf_item] == prefixes(gids, length)
    parents = prefixes(gids, length - 1)
    below = tree.items(torch.arange(len(parents)))
    for node, parent in enumerate(parents):
        of_parent = [item for item in tree.leaf_item.tolist() if tuple(of_item[item][:-1]) == parent]
        assert below[node].tolist() == of_parent + [0] * (below.shape[1] - len(of_parent))
        assert tree.parent(torch.tensor(of_parent)).tolist() == [node] * len(of_parent)


def test_codes_of_beams():
    gids = np.array([[0, 0], [0, 2], [2, 1]])
    tree = GidTree(with_padding(gids))
    assert tree.branching == 3
    nodes = torch.tensor([[0, 1], [1, 1]])  # (B, beams), prefixes (0,) and (2,)
    assert tree.codes(1, nodes).tolist() == [[[0, 2], [1, -1]], [[1, -1], [1, -1]]]
    assert tree.to("cpu").leaf_item[tree.child(1, torch.tensor(0), torch.tensor(1))] == 2


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
