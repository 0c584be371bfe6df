"""New items in an existing tree: no old GID changes, and no cluster outgrows what its subtree can hold.

A new item descends to the nearest child with room, level by level. Where capacity kept it from the nearest child it
is displaced; many such items say that the tree should be rebuilt.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from contract.schema import Items, read_gids, read_item_ids
from contract.settings import Config
from gid import cold


def extend_tree(gids: np.ndarray, x: np.ndarray, new_x: np.ndarray, branching: int) -> tuple[np.ndarray, np.ndarray]:
    """GIDs for new items beside those of the old ones.

    Args:
        gids: int (n, l), the old items; x: float (n, d), their embeddings; new_x: float (m, d).

    Returns:
        (int16 (m, l), differing from each other and from the old ones; bool (m,), True where displaced).

    Raises:
        ValueError: the tree has fewer free paths than there are new items.
    """
    length, free = gids.shape[1], branching ** gids.shape[1] - len(gids)
    if len(new_x) > free:
        raise ValueError(
            f"{len(new_x)} new items do not fit: {branching}^{length} paths hold {len(gids)} items already, "
            f"{free} are free; build the tree anew, without --extend"
        )
    new_gids, displaced = np.zeros((len(new_x), length), np.int16), np.zeros(len(new_x), bool)
    nodes = [(np.arange(len(gids)), np.arange(len(new_x)))]
    for level in range(length):
        nodes = [
            child
            for old, new in nodes
            for child in _descend(gids, x, new_x, old, new, level, branching, new_gids, displaced)
        ]
    return new_gids, displaced


def _descend(gids, x, new_x, old, new, level: int, branching: int, new_gids, displaced) -> list:
    """Gives a node's new items their code of the level; returns the children that got some, as (old, new)."""
    counts = np.bincount(gids[old, level], minlength=branching)
    room = branching ** (gids.shape[1] - 1 - level) - counts
    if level == gids.shape[1] - 1:
        codes = np.flatnonzero(room)[: len(new)]  # a leaf: any free place
    else:
        codes, is_displaced = _nearest_with_room(_centroids(x[old], gids[old, level], counts), counts, room, new_x[new])
        displaced[new] |= is_displaced
    new_gids[new, level] = codes
    return [(old[gids[old, level] == code], new[codes == code]) for code in np.unique(codes)]


def _centroids(x: np.ndarray, codes: np.ndarray, counts: np.ndarray) -> np.ndarray:
    sums = np.zeros((len(counts), x.shape[1]))
    np.add.at(sums, codes, x)
    return sums / np.maximum(counts, 1)[:, None]


def _nearest_with_room(centroids, counts, room, x) -> tuple[np.ndarray, np.ndarray]:
    """Codes (m,), and whether they are not the nearest. Who is nearest to a child that fills up stays in it.

    Children without items are opened, lowest code first, when all the others are full.
    """
    x = x.astype(np.float64)
    cost = np.square(x).sum(1)[:, None] + np.square(centroids).sum(1) - 2 * (x @ centroids.T)
    closed = cost.max(initial=0) + 1 + np.arange(len(room))  # dearer than all children with items, in their order
    cost = np.where(counts > 0, cost, closed)
    nearest = cost.argmin(1)
    codes, left, room = np.full(len(x), -1), np.arange(len(x)), room.copy()
    while len(left):  # every round fills a child or places all
        wanted = np.where(room > 0, cost[left], np.inf).argmin(1)
        order = np.lexsort((cost[left, wanted], wanted))
        sizes = np.bincount(wanted, minlength=len(room))
        rank = np.arange(len(left)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        enters = order[rank < room[wanted[order]]]
        codes[left[enters]] = wanted[enters]
        room -= np.bincount(wanted[enters], minlength=len(room))
        left = np.delete(left, enters)
    return codes, (codes != nearest) & (counts[nearest] > 0)


@dataclass(frozen=True)
class Grown:
    """A tree with the items of a later corpus; row 0 of the embeddings is padding."""

    gids: np.ndarray  # int16 (I, l)
    items: np.ndarray  # float32 (I + 1, d)
    tree: np.ndarray  # float32 (I + 1, d'), the same array where the tree clusters the item embeddings
    num_kept: int
    num_added: int
    num_removed: int
    num_displaced: int


def grow(config: Config, older: Path, items: Items) -> Grown:
    """Carries an older gid/ over to the items of a corpus.

    An item is the same when its item_id is. What the older tree knows keeps its GID and embeddings; the others get
    embeddings from their content, fitted on those that are kept. Paths of items that are gone are free again.

    Raises:
        ValueError: the older tree is random, no item is in both, or there is no room.
    """
    if config.gid.method == "random":
        raise ValueError('gid.method = "random": no item is near another; build the tree anew, without --extend')
    old_row = {item_id: row for row, item_id in enumerate(read_item_ids(older)) if row}
    row = np.array([old_row.get(item_id, 0) for item_id in items.item_ids[1:]])
    is_new = row == 0
    if is_new.all():
        raise ValueError(f"{older} knows none of the {len(row)} items; build the tree anew, without --extend")
    old_gids = read_gids(older)
    tables = {}
    for name in ("item_embeddings.npy", "tree_embeddings.npy"):
        if (older / name).exists():
            filled = cold.fill(np.load(older / name, allow_pickle=False)[row], items.tokens, is_new, config.seed)
            tables[name] = np.concatenate([np.zeros_like(filled[:1]), filled])
    item_rows = tables["item_embeddings.npy"]
    tree_rows = tables.get("tree_embeddings.npy", item_rows)
    gids = old_gids[row].astype(np.int16)
    x = tree_rows[1:]
    gids[is_new], displaced = extend_tree(gids[~is_new], x[~is_new], x[is_new], config.gid.branching)
    num_kept = int((~is_new).sum())
    return Grown(
        gids, item_rows, tree_rows, num_kept, int(is_new.sum()), len(old_gids) - 1 - num_kept, int(displaced.sum())
    )
