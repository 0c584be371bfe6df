"""The K-ary tree whose paths are the GIDs: built by balanced hierarchical k-means, read back for constrained decoding.

Symbols: K children of a node and codes per level, l levels; a GID is a path z_1 .. z_l. Level t has the distinct
prefixes of length t as its nodes; level 0 is the root, level l the items.
"""

import numpy as np
import torch

from contract.schema import Ragged
from gid.kmeans import balanced_kmeans


def gid_length(num_items: int, branching: int, slack: float) -> int:
    """The least l with K^l >= num_items * slack."""
    length = 1
    while branching**length < num_items * slack:
        length += 1
    return length


def check_room(num_items: int, branching: int, length: int) -> None:
    """Raises ValueError when there are more items than paths."""
    if num_items > branching**length:
        raise ValueError(
            f"{num_items} items do not fit into a tree of length {length} with branching {branching} "
            f"({branching}^{length} = {branching**length}); "
            f"set gid.length = {gid_length(num_items, branching, 1)} or more"
        )


def build_tree(embeddings: np.ndarray, branching: int, length: int, headroom: float = 1.0, seed: int = 0) -> np.ndarray:
    """GIDs by recursive balanced k-means, following section 3.2 of ColaRec: siblings are alike in the CF space.

    A cluster of level t < l holds at most K^(l-t) items, and where that is feasible at most `headroom` of it: a cluster
    filled to the brim forces every leaf below to be full, whatever the data look like. The last code is the position
    in the leaf.

    Args:
        embeddings: float (n, d), finite.

    Returns:
        int16 (n, l), all rows different, codes in 0..K-1.

    Raises:
        ValueError: n > K^l, or an embedding is not finite.
    """
    num_items = len(embeddings)
    check_room(num_items, branching, length)
    gids = np.zeros((num_items, length), np.int16)
    nodes = [np.arange(num_items)]
    for level in range(1, length):
        children = []
        for number, members in enumerate(nodes):
            capacity = cluster_capacity(len(members), branching, length - level, headroom)
            node_seed = np.random.SeedSequence([seed, level, number]).generate_state(1)[0]
            labels = balanced_kmeans(embeddings[members], branching, capacity, int(node_seed))
            gids[members, level - 1] = labels
            # stable, so that items keep their order within a node
            by_label = members[np.argsort(labels, kind="stable")]
            children += [c for c in np.split(by_label, np.cumsum(np.bincount(labels))[:-1]) if len(c)]
        nodes = children
    for members in nodes:
        gids[members, -1] = np.arange(len(members))
    return gids


def random_tree(num_items: int, branching: int, length: int, seed: int = 0) -> np.ndarray:
    """GIDs without meaning: a random order of the items, spread evenly over all paths. int16 (n, l)."""
    rank = np.random.default_rng(seed).permutation(num_items)
    path = [int(r) * branching**length // num_items for r in rank]
    return np.array([[p // branching**t % branching for t in range(length)][::-1] for p in path], np.int16)


def cluster_capacity(num_items: int, branching: int, levels_below: int, headroom: float) -> int:
    """Items that a child of a node of `num_items` may hold when `levels_below` levels lie below the child."""
    most = branching**levels_below
    needed = -(-num_items // branching)
    return min(most, max(int(np.ceil(headroom * most)), needed))


def leaf_sse(embeddings: np.ndarray, gids: np.ndarray) -> float:
    """Sum of squared distances to the mean of the leaf, the items of one l-1 prefix. float64."""
    prefix = gids[:, :-1].astype(np.int64) @ (int(gids.max()) + 1) ** np.arange(gids.shape[1] - 1)
    _, leaf = np.unique(prefix, return_inverse=True)
    x = embeddings[np.argsort(leaf, kind="stable")].astype(np.float64)
    sizes = np.bincount(leaf)
    sums = np.add.reduceat(x, np.cumsum(sizes) - sizes)
    return float(np.square(x).sum() - (np.square(sums).sum(1) / sizes).sum())


class GidTree:
    """The tree as tables. Nodes of a level are numbered from 0 in the lexicographic order of their prefixes.

    Args:
        gids: int (I + 1, l), row item_idx; row 0 is padding and no part of the tree.
        branching: K; by default the largest code + 1.

    Raises:
        ValueError: two items share a GID, or a code is out of range.
    """

    def __init__(self, gids: np.ndarray, branching: int | None = None):
        codes = np.asarray(gids[1:], np.int64)
        self.num_items, self.length = codes.shape
        self.branching = int(branching or codes.max(initial=0) + 1)
        if codes.size and not 0 <= codes.min() <= codes.max() < self.branching:
            raise ValueError(f"GIDs hold codes {codes.min()}..{codes.max()}, not within 0..{self.branching - 1}")
        order = np.lexsort(codes.T[::-1])
        codes = codes[order]
        # starts[t, r]: sorted row r differs from row r - 1 in its first t codes, and so begins a node of level t
        differs = np.ones((self.length + 1, self.num_items), bool)
        differs[:, 1:] = np.logical_or.accumulate(
            np.concatenate([np.zeros((1, self.num_items - 1), bool), (codes[1:] != codes[:-1]).T])
        )
        if not differs[self.length].all():
            twin = int(np.flatnonzero(~differs[self.length])[0])
            raise ValueError(
                f"items {order[twin - 1] + 1} and {order[twin] + 1} share the GID {tuple(map(int, codes[twin]))}"
            )
        node = np.cumsum(differs, axis=1) - 1
        self.nodes_per_level = [int(n) for n in differs.sum(1)]
        self._children = []
        for level in range(self.length):
            first = differs[level + 1]
            table = np.full((self.nodes_per_level[level], self.branching), -1)
            table[node[level, first], codes[first, level]] = node[level + 1, first]
            self._children.append(torch.from_numpy(table))
        self.leaf_item = torch.from_numpy(order + 1)
        self.group = np.zeros(self.num_items + 1, np.int64)
        self.group[order + 1] = node[self.length - 1] + 1

    def child_table(self, level: int) -> torch.Tensor:
        """int64 (num_nodes of `level`, K): the node of level + 1 that a code leads to, -1 where there is none.

        For nodes int64 (B, beams) of the level, `child_table(level)[nodes]` is (B, beams, K).
        """
        return self._children[level]

    def siblings(self) -> Ragged:
        """item_idx (int64, ascending) by l-1 prefix; row `group[item_idx]` holds the item. Row 0 is empty: padding."""
        order = np.argsort(self.group[1:], kind="stable") + 1
        sizes = np.bincount(self.group[1:], minlength=1)
        return Ragged(order, np.concatenate([[0], np.cumsum(sizes)]))

    def to(self, device: torch.device | str) -> "GidTree":
        """Moves the tables in place, as a module would; returns itself."""
        self._children = [table.to(device) for table in self._children]
        self.leaf_item = self.leaf_item.to(device)
        return self
