"""The K-ary tree whose paths are the GIDs, as tables for constrained decoding; gid/hierarchy.py builds it.

Symbols: K children of a node and codes per level, l levels; a GID is a path z_1 .. z_l. Level t has the distinct
prefixes of length t as its nodes; level 0 is the root, level l the items.
"""

import numpy as np
import torch

from contract.schema import Ragged


class GidTree:
    """The tree as tables. Nodes of a level are numbered from 0 in the lexicographic order of their prefixes.

    So the children of a node are neighbours on the next level, and a table of a level is two arrays: where the
    children of each node begin, and by which code each child is reached. That is 14 bytes an item and 10 a node,
    however few of its K codes a node uses.

    Args:
        gids: int (I + 1, l), row item_idx; row 0 is padding and no part of the tree.
        branching: K; by default the largest code + 1.
        only: item_idx of the items that paths may lead to; by default all. The others stay in the tree, as what an item
            is compared with is to be the same, but `codes` leads to none of them.

    Raises:
        ValueError: two items share a GID, or a code is out of range.
    """

    def __init__(self, gids: np.ndarray, branching: int | None = None, only: np.ndarray | None = None):
        items = np.arange(1, len(gids))
        codes = np.asarray(gids)[1:]
        self.num_items, self.length = codes.shape
        self.branching = int(branching or codes.max(initial=0) + 1)
        if codes.size and not 0 <= codes.min() <= codes.max() < self.branching:
            raise ValueError(f"GIDs hold codes {codes.min()}..{codes.max()}, not within 0..{self.branching - 1}")
        order = np.lexsort(codes.T[::-1])
        codes, items = codes[order], items[order]
        # Sorted rows that differ from the one before in their first t codes begin the nodes of level t.
        begins, differs = [np.zeros(1, np.int64)], np.zeros(len(items) - 1, bool)
        for level in range(self.length):
            differs |= codes[1:, level] != codes[:-1, level]
            begins.append(np.concatenate([begins[0], 1 + np.flatnonzero(differs)]))
        if not differs.all():
            twin = int(np.flatnonzero(~differs)[0])
            raise ValueError(f"items {items[twin]} and {items[twin + 1]} share the GID {tuple(map(int, codes[twin]))}")
        self.nodes_per_level = [len(begin) for begin in begins]
        self._first, self._code, self._most = [], [], []
        self._lost = []  # where not all are kept: of each level, the nodes that lead to none
        for level in range(self.length):
            first = np.append(np.searchsorted(begins[level + 1], begins[level]), len(begins[level + 1]))
            self._first.append(torch.from_numpy(first))
            self._code.append(torch.from_numpy(codes[begins[level + 1], level].astype(np.int16)))
            self._most.append(int(np.diff(first).max(initial=0)))
            if only is not None:
                self._lost.append(torch.from_numpy(~np.logical_or.reduceat(np.isin(items, only), begins[level + 1])))
        self.leaf_item = torch.from_numpy(items)
        sizes = np.diff(begins[self.length - 1], append=len(items))
        group = np.zeros(self.num_items + 1, np.int32)
        group[items] = np.repeat(np.arange(1, len(sizes) + 1), sizes)
        self.group = torch.from_numpy(group)

    @property
    def num_bytes(self) -> int:
        """Of the tables that `to` moves."""
        return sum(table.nbytes for table in (*self._first, *self._code, *self._lost, self.leaf_item, self.group))

    def codes(self, level: int, node: torch.Tensor) -> torch.Tensor:
        """int64 (..., C): the codes that lead on from nodes (...) of `level`, ascending, -1 where there are no more and
        where a code leads to no item that is kept.

        C is the largest number of children that a node of the level has.
        """
        child, is_none = self._children(level, node)
        is_none = is_none | self._lost[level][child] if self._lost else is_none
        return self._code[level][child].long().masked_fill(is_none, -1)

    def items(self, node: torch.Tensor) -> torch.Tensor:
        """item_idx int64 (..., C) of all items below nodes (...) of level l-1, kept or not, in the columns of `codes`;
        0 where there are no more."""
        child, is_none = self._children(self.length - 1, node)
        return self.leaf_item[child].masked_fill(is_none, 0)

    def parent(self, item: torch.Tensor) -> torch.Tensor:
        """The nodes of level l-1 that items (...) are below."""
        return self.group[item].long() - 1

    def _children(self, level: int, node: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Nodes of level + 1, (..., C), and where there are none."""
        first = self._first[level]
        child = first[node][..., None] + torch.arange(self._most[level], device=node.device)
        return child.clamp_max(self.nodes_per_level[level + 1] - 1), child >= first[node + 1][..., None]

    def child(self, level: int, node: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        """The nodes of level + 1 that the codes in `column` of `codes(level, node)` lead to.

        Where there is no such code it is some node, which the caller is to keep at probability 0.
        """
        return (self._first[level][node] + column).clamp_max(self.nodes_per_level[level + 1] - 1)

    def siblings(self) -> Ragged:
        """item_idx (int64, ascending) by l-1 prefix; row `group[item_idx]` holds the item. Row 0 is empty: padding."""
        group = self.group.numpy()
        order = np.argsort(group, kind="stable")[1:]
        sizes = np.bincount(group[order], minlength=1)
        return Ragged(order, np.concatenate([[0], np.cumsum(sizes)]))

    def to(self, device: torch.device | str) -> "GidTree":
        """Moves the tables in place, as a module would; returns itself."""
        lists = (self._first, self._code, self._lost)
        self._first, self._code, self._lost = ([table.to(device) for table in tables] for tables in lists)
        self.leaf_item, self.group = self.leaf_item.to(device), self.group.to(device)
        return self
