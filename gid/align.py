"""Codes that mean the same below every node: children are numbered by the direction in which they leave their parent.

k-means numbers the children of each node as it finds them. Below the first level a code then says nothing without its
prefix, and the decoder, whose codebook of a level is one for all nodes, has to learn the numbering of every node by
heart. Here each level has K directions, and the children of a node are dealt to them, at most one to each, so that
their steps away from their parent's mean agree with their directions as well as they can. Only the names of branches
change: clusters, prefixes' neighbours and sizes stay. The codes of RQ-VAE (TIGER, Rajput et al., 2023), residuals
shared by all prefixes, are so by construction; the paper's are not.
"""

import itertools
from collections.abc import Callable

import numpy as np
from scipy.optimize import linear_sum_assignment

ROUNDS = 10
# Nodes that the directions of a level are learned from; all are dealt to them afterwards.
SAMPLE = 4_096
ROWS_AT_ONCE = 1 << 16

# The steps of some children, float64 (c, d), rows of length 1 or 0.
Steps = Callable[[slice], np.ndarray]


def align_codes(embeddings: np.ndarray, gids: np.ndarray, branching: int, seed: int = 0) -> np.ndarray:
    """The same tree with the codes of all levels but the first dealt anew.

    Args:
        embeddings: float (n, d), of the items that the tree was built from.
        gids: int (n, l), all rows different.

    Returns:
        int16 (n, l).
    """
    aligned, rng = gids.astype(np.int16), np.random.default_rng(seed)
    parent = np.unique(gids[:, 0], return_inverse=True)[1]
    parent_means = _means(embeddings, parent)
    for level in range(1, gids.shape[1]):
        child, of_child = np.unique(parent * branching + gids[:, level], return_inverse=True)
        node = child // branching
        is_last = level == gids.shape[1] - 1
        item = np.argsort(of_child) if is_last else None  # the one item of each child
        means = None if is_last else _means(embeddings, of_child)

        def steps(children: slice, item=item, means=means, node=node, parent_means=parent_means) -> np.ndarray:
            rows = embeddings[item[children]] if means is None else means[children]
            return _normed(rows.astype(np.float64) - parent_means[node[children]])

        aligned[:, level] = _deal(steps, node, branching, rng)[of_child]
        parent, parent_means = of_child, means
    return aligned


def _deal(steps: Steps, node: np.ndarray, branching: int, rng: np.random.Generator) -> np.ndarray:
    """A code for each child, int64 (c,), different ones below a node; node int64 (c,), ascending, is the parent's."""
    bounds = np.flatnonzero(np.diff(node, prepend=-1, append=-1))
    nodes = [slice(begin, end) for begin, end in itertools.pairwise(bounds)]
    largest = int(np.diff(bounds).argmax())
    chosen = rng.permutation(len(nodes))[:SAMPLE]
    sample = [steps(nodes[n]) for n in (largest, *chosen[chosen != largest])]
    directions = _normed(rng.standard_normal((branching, sample[0].shape[1])))
    directions[: len(sample[0])] = sample[0]
    for _ in range(ROUNDS):
        codes = np.concatenate([_assign(rows, directions) for rows in sample])
        sums = np.zeros_like(directions)
        np.add.at(sums, codes, np.concatenate(sample))
        used = np.unique(codes)
        directions[used] = _normed(sums[used])
    return np.concatenate([_assign(steps(children), directions) for children in nodes])


def _assign(steps: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """A direction for each row, none twice, with the largest sum of cosines."""
    return linear_sum_assignment(steps @ directions.T, maximize=True)[1]


def _means(embeddings: np.ndarray, group: np.ndarray) -> np.ndarray:
    """float32 (g, d): the mean of each group; group int64 (n,) in 0..g-1, none empty."""
    order, sizes = np.argsort(group, kind="stable"), np.bincount(group)
    ends = np.cumsum(sizes)
    means = np.empty((len(sizes), embeddings.shape[1]), np.float32)
    begin = 0
    while begin < len(sizes):  # float64 for some groups at a time
        first = ends[begin] - sizes[begin]
        end = max(begin + 1, int(np.searchsorted(ends, first + ROWS_AT_ONCE, side="right")))
        rows = embeddings[order[first : ends[end - 1]]].astype(np.float64)
        starts = ends[begin:end] - sizes[begin:end] - first
        means[begin:end] = np.add.reduceat(rows, starts) / sizes[begin:end, None]
        begin = end
    return means


def _normed(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
