"""Codes that mean the same below every node: children are numbered by the direction in which they leave their parent.

k-means numbers the children of each node as it finds them, so that below the first level a code says nothing without
its prefix, and the decoder, whose codebook of a level is one for all nodes, has to learn every node's numbering by
heart. Here each level has K directions, and the children of a node are dealt to them, one to each, so that what they
add to their parent's mean agrees with their direction as well as it can. The tree stays as it is: only the names of
its branches change. What RQ-VAE codes have by construction (TIGER, Rajput et al., 2023) and the paper's have not.
"""

import numpy as np
from scipy.optimize import linear_sum_assignment

ROUNDS = 10
# Nodes that the directions are learned from; all are dealt to them afterwards.
SAMPLE = 4_096


def align_codes(embeddings: np.ndarray, gids: np.ndarray, branching: int, seed: int = 0) -> np.ndarray:
    """The same tree with the codes of all levels but the first dealt anew.

    Args:
        embeddings: float (n, d), of the items that the tree was built from.
        gids: int16 (n, l), all rows different.

    Returns:
        int16 (n, l).
    """
    aligned, rng = gids.copy(), np.random.default_rng(seed)
    parent = np.unique(gids[:, 0], return_inverse=True)[1]
    for level in range(1, gids.shape[1]):
        child, of_child = np.unique(parent * branching + gids[:, level], return_inverse=True)
        node = child // branching
        steps = _normed(_means(embeddings, of_child) - _means(embeddings, parent)[node])
        aligned[:, level] = _deal(steps, node, branching, rng)[of_child]
        parent = of_child
    return aligned


def _deal(steps: np.ndarray, node: np.ndarray, branching: int, rng: np.random.Generator) -> np.ndarray:
    """A code for each child, int64 (c,), different ones below a node. node: int64 (c,), ascending."""
    begin = np.flatnonzero(np.diff(node, prepend=-1))
    nodes = [slice(a, b) for a, b in zip(begin, [*begin[1:], len(node)], strict=True)]
    codes = np.zeros(len(node), np.int64)
    by_size = sorted(range(len(nodes)), key=lambda n: nodes[n].start - nodes[n].stop)
    sample = [nodes[n] for n in by_size[:1] + list(rng.permutation(by_size[1:])[: SAMPLE - 1])]
    first = steps[sample[0]]
    directions = _normed(rng.standard_normal((branching, steps.shape[1])))
    directions[: len(first)] = first
    for _ in range(ROUNDS):
        for children in sample:
            codes[children] = _assign(steps[children], directions)
        rows = np.concatenate([np.arange(children.start, children.stop) for children in sample])
        sums = np.zeros_like(directions)
        np.add.at(sums, codes[rows], steps[rows])
        met = np.bincount(codes[rows], minlength=branching) > 0
        directions[met] = _normed(sums[met])
    for children in nodes:
        codes[children] = _assign(steps[children], directions)
    return codes


def _assign(steps: np.ndarray, directions: np.ndarray) -> np.ndarray:
    return linear_sum_assignment(-steps @ directions.T)[1]


def _means(embeddings: np.ndarray, group: np.ndarray) -> np.ndarray:
    """float64 (g, d): the mean of each group, group int64 (n,) in 0..g-1."""
    order = np.argsort(group, kind="stable")
    sizes = np.bincount(group)
    return np.add.reduceat(embeddings[order].astype(np.float64), np.cumsum(sizes) - sizes) / sizes[:, None]


def _normed(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
