"""Which items the same people take: of each item the most similar ones, for the ranking (trainer/neighbours.py).

I: item ids, K: neighbours of an item.
"""

import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp

from contract.disk import create_array, save_array

ITEMS, WEIGHTS = "neighbours.npy", "neighbour_weights.npy"
# Of BM25; what the baseline item-kNN chooses on the valid users of Phone.
K1, B = 0.1, 0.25


class Neighbours(NamedTuple):
    """Row 0 is padding."""

    item_IK: np.ndarray  # int32 item_idx, the most similar first; 0 where there are no more
    weight_IK: np.ndarray  # float32, above 0; 0 where there are no more


def find(user: np.ndarray, item: np.ndarray, num_users: int, num_items: int, count: int) -> Neighbours:
    """The `count` most similar items of each by `similarity`, of pairs of user_idx and item_idx, int (N,)."""
    train = sp.csr_matrix((np.ones(len(user)), (user, item)), shape=(num_users + 1, num_items + 1))
    found = similarity(train, count + 1, K1, B)  # an item is among the most similar to itself, as a rule
    row = np.repeat(np.arange(num_items + 1), np.diff(found.indptr))
    order = np.lexsort((found.indices, -found.data, row))  # heaviest first, ties by item_idx
    column = np.arange(len(row)) - found.indptr[row]
    row, column, order = (part[column < count] for part in (row, column, order))
    item_IK, weight_IK = np.zeros((num_items + 1, count), np.int32), np.zeros((num_items + 1, count), np.float32)
    item_IK[row, column], weight_IK[row, column] = found.indices[order], found.data[order]
    return Neighbours(item_IK, weight_IK)


def similarity(train: sp.csr_matrix, K: int, K1: float, B: float) -> sp.csr_matrix:
    """float64 (I + 1, I + 1): s(j, i) of the K items i most similar to j, j left out, by BM25 of `implicit`.

        w(u, i) = (K1 + 1) / (K1 (1 - B + B |U_i| / mean |U|) + 1) * log(items / (1 + |I_u|))
        s(j, i) = sum over u of w(u, j) w(u, i)

    that is, an item is a document, its users are the words: those of many items say little, and B takes from the
    weight of popular items.
    """
    import torch  # here: who reads the tables need not have these
    from implicit.nearest_neighbours import BM25Recommender
    from implicit.utils import ParameterWarning

    model = BM25Recommender(K=K, K1=K1, B=B, num_threads=torch.get_num_threads())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ParameterWarning)  # of a conversion within the package
        model.fit(train, show_progress=False)
    found = model.similarity
    found.setdiag(0)
    found.eliminate_zeros()
    return found


def create(folder: Path, num_items: int, count: int) -> Neighbours:
    """Tables of zeros whose files are in `folder`: what is written to them is written there."""
    parts = (ITEMS, np.int32), (WEIGHTS, np.float32)
    shape = num_items + 1, count
    return Neighbours(*(create_array(folder / name, dtype, shape) for name, dtype in parts))


def write(folder: Path, neighbours: Neighbours) -> None:
    save_array(folder / ITEMS, neighbours.item_IK)
    save_array(folder / WEIGHTS, neighbours.weight_IK)


def read(folder: Path) -> Neighbours | None:
    """Of a gid/, memory-mapped, so that the ranks of a machine share it; None where it has none."""
    if not (folder / ITEMS).exists():
        return None
    # What copies on write is writable to torch, which warns of what is not.
    return Neighbours(*(np.load(folder / name, mmap_mode="c", allow_pickle=False) for name in (ITEMS, WEIGHTS)))
