"""The K-ary tree whose paths are the GIDs, as tables for constrained decoding; gid/hierarchy.py builds it.

Symbols: K children of a node and codes per level, l levels; a GID is a path z_1 .. z_l. Level t has the distinct
prefixes of length t as its nodes; level 0 is the root, level l the items.
"""

import numpy as np
import torch

from contract.schema import Ragged


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
