"""GIDs by balanced hierarchical k-means: every node of the K-ary tree is split into K clusters within capacity.

Large nodes are split one by one; what is below a node of at most SUBTREE rows is one piece of work, whose small nodes
below the first levels go through k-means in batches. Pieces run in processes of their own, and which process takes
which piece changes nothing: the random numbers of a piece follow from the seed and the path that leads to it.
"""

import functools
import os
import tempfile
from concurrent.futures import FIRST_COMPLETED, Executor, ProcessPoolExecutor, ThreadPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from contract.disk import save_array, writing
from gid.batch import Batch, lloyd, plus_plus, release
from gid.kmeans import COARSE, cluster, one_thread
from gid.nearest import best_device
from gid.rows import Rows

SUBTREE = 65_536
BATCHED = 2_048  # rows of a node that goes through k-means with others of its size, from one start
# The levels on which all else hangs: their nodes are split one by one, from several starts, however small. With one
# start each, the demo's final Recall@10 was .159 and .164 (two seeds), with several .174.
FINE_LEVELS = 2
BATCH_CELLS = 1 << 19  # float32 numbers of a batch: 2 MB, to stay in the cache
ALONE = 1 << 20  # rows of a node that all threads, or the GPU, split together
WORTH_PROCESSES = 100_000  # items; fewer are done before processes have started


@dataclass(frozen=True)
class Shape:
    """What a tree looks like: K, l, and how full its inner clusters may be."""

    branching: int
    length: int
    headroom: float = 1.0

    def capacity(self, num_items: int, level: int) -> int:
        """Items that a child, at `level`, of a node of `num_items` may hold."""
        return cluster_capacity(num_items, self.branching, self.length - level, self.headroom)


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


def cluster_capacity(num_items: int, branching: int, levels_below: int, headroom: float) -> int:
    """Items that a child of a node of `num_items` may hold when `levels_below` levels lie below the child."""
    most = branching**levels_below
    needed = -(-num_items // branching)
    return min(most, max(int(np.ceil(headroom * most)), needed))


def build_tree(
    embeddings: np.ndarray,
    branching: int,
    length: int,
    headroom: float = 1.0,
    seed: int = 0,
    workers: int | None = None,
    device: str | None = None,
) -> np.ndarray:
    """GIDs by recursive balanced k-means, following section 3.2 of ColaRec: siblings are alike in the CF space.

    A cluster of level t < l holds at most K^(l-t) items, and where that is feasible at most `headroom` of it: a cluster
    filled to the brim forces every leaf below to be full, whatever the data look like. The last code is the position
    in the leaf.

    Args:
        embeddings: float (n, d), finite. A memory-mapped .npy is not copied.
        workers: processes, by default the cores at hand; the GIDs do not depend on it.
        device: where nodes beyond SUBTREE items are searched, by default `gid.nearest.best_device`.

    Returns:
        int16 (n, l), all rows different, codes in 0..K-1.

    Raises:
        ValueError: n > K^l, or an embedding is not finite.
    """
    check_room(len(embeddings), branching, length)
    shape, workers = Shape(branching, length, headroom), workers or len(os.sched_getaffinity(0))
    device = device or (best_device() if len(embeddings) > SUBTREE else "cpu")
    if workers == 1 or len(embeddings) < WORTH_PROCESSES:
        with ThreadPoolExecutor(1) as executor:
            return _grow(embeddings, shape, seed, device, executor, embeddings, threads=1)
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "embeddings.npy")
        with writing(Path(file), "set TMPDIR to a folder with room", embeddings.nbytes):
            save_array(Path(file), embeddings)
        with ProcessPoolExecutor(workers, get_context("spawn")) as executor:
            return _grow(embeddings, shape, seed, device, executor, file, workers)


def _grow(x: np.ndarray, shape: Shape, seed: int, device: str, executor: Executor, source, threads: int) -> np.ndarray:
    """The GIDs of all rows. `source` is what the executor's functions read x from: itself, or its file."""
    gids = np.zeros((len(x), shape.length), np.int16)
    nodes, running = [(np.arange(len(x)), ())], {}
    while nodes or running:
        while nodes:
            members, path = nodes.pop()
            if len(members) > ALONE or (len(members) > SUBTREE and device != "cpu"):
                labels = _split(x, members, path, shape, seed, device, threads)
                nodes += _children(gids, members, path, labels)
            else:
                work = _subtree if len(members) <= SUBTREE else _split
                running[executor.submit(work, source, members, path, shape, seed)] = members, path
        for done in wait(running, return_when=FIRST_COMPLETED).done:
            members, path = running.pop(done)
            if len(members) <= SUBTREE:
                gids[members, len(path) :] = done.result()
            else:
                nodes += _children(gids, members, path, done.result())
    return gids


def _children(gids: np.ndarray, members: np.ndarray, path: tuple[int, ...], labels: np.ndarray) -> list:
    """Writes the codes of a node's members; returns its children as (members, path), items in their order."""
    gids[members, len(path)] = labels
    by_label = members[np.argsort(labels, kind="stable")]
    sizes = np.bincount(labels)
    parts = np.split(by_label, np.cumsum(sizes)[:-1])
    return [(part, (*path, k)) for k, part in enumerate(parts) if len(part)]


def _split(source, members, path, shape: Shape, seed: int, device: str = "cpu", threads: int = 1) -> np.ndarray:
    """Labels of the members of one large node."""
    capacity = shape.capacity(len(members), len(path) + 1)
    rng = np.random.default_rng([seed, len(path), *path])
    return cluster(Rows(_open(source), members), shape.branching, capacity, rng, device, threads)


def _subtree(source, members: np.ndarray, path: tuple[int, ...], shape: Shape, seed: int) -> np.ndarray:
    """All further codes of a node's members, int16 (m, l - len(path))."""
    x = Rows(_open(source), members).take(slice(None))
    rng = np.random.default_rng([seed, len(path), *path])
    codes = np.zeros((len(members), shape.length - len(path)), np.int16)
    node = np.zeros(len(members), np.int64)
    with one_thread():
        for level in range(len(path) + 1, shape.length):
            labels = _split_all(x, node, level, shape, rng)
            codes[:, level - len(path) - 1] = labels
            node = np.unique(node * shape.branching + labels, return_inverse=True)[1]
    order, starts, sizes = _groups(node)
    codes[order, -1] = np.arange(len(order)) - np.repeat(starts, sizes)
    return codes


def _split_all(x: np.ndarray, node: np.ndarray, level: int, shape: Shape, rng: np.random.Generator) -> np.ndarray:
    """Labels within the children, at `level`, of all nodes; node (n,) numbers the node of a row from 0."""
    order, starts, sizes = _groups(node)
    labels = np.zeros(len(x), np.int64)
    labels[order] = np.arange(len(order)) - np.repeat(starts, sizes)  # as many rows as clusters, or fewer
    split = np.flatnonzero(sizes > shape.branching)
    is_alone = (sizes[split] > BATCHED) | (level <= FINE_LEVELS)
    for n in split[is_alone]:
        members = order[starts[n] : starts[n] + sizes[n]]
        labels[members] = cluster(Rows(x, members), shape.branching, shape.capacity(sizes[n], level), rng)
    small = split[~is_alone]
    small = small[np.argsort(-sizes[small], kind="stable")]
    while len(small):
        width = sizes[small[0]]
        many = max(1, BATCH_CELLS // (width * max(x.shape[1], shape.branching)))
        taken, small = small[:many], small[many:]
        place = np.arange(width)
        is_real = place < sizes[taken][:, None]
        members = order[np.where(is_real, starts[taken][:, None] + place, 0)]
        capacity = np.array([shape.capacity(size, level) for size in sizes[taken]])
        labels[members[is_real]] = _cluster_batch(x[members], is_real, capacity, shape.branching, rng)
    return labels


def _cluster_batch(x_BND: np.ndarray, is_real_BN: np.ndarray, capacity_B: np.ndarray, num_clusters: int, rng):
    """Labels of the real rows, one node after another."""
    size_B = is_real_BN.sum(1)
    x_BND[~is_real_BN] = 0
    x_BND -= x_BND.sum(1, keepdims=True, dtype=np.float64).astype(np.float32) / size_B[:, None, None].astype(np.float32)
    x_BND[~is_real_BN] = 0
    scale_B = np.abs(x_BND).max((1, 2))
    x_BND /= np.where(scale_B > 0, scale_B, 1)[:, None, None]
    batch = Batch.of(x_BND, size_B)
    first = plus_plus(batch, num_clusters, rng)
    found = lloyd(batch, first, capacity_B.astype(float), np.zeros(first.shape[:2]), COARSE)
    cost_BKN = batch.distances(found.centroids_BKD) + found.prices_BK[:, :, None]
    owner, place = np.nonzero(is_real_BN)

    def cost_of(rows: np.ndarray) -> np.ndarray:
        return cost_BKN[owner[rows], :, place[rows]]

    return release(found.labels_BN[is_real_BN], owner, capacity_B, num_clusters, cost_of)


def _groups(node: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(rows by node, in their order; first position of each node; rows of each node)."""
    sizes = np.bincount(node)
    return np.argsort(node, kind="stable"), np.cumsum(sizes) - sizes, sizes


@functools.lru_cache(maxsize=1)
def _opened(file: str) -> np.ndarray:
    return np.load(file, mmap_mode="r", allow_pickle=False)


def _open(source: np.ndarray | str) -> np.ndarray:
    return _opened(source) if isinstance(source, str) else source


def random_tree(num_items: int, branching: int, length: int, seed: int = 0) -> np.ndarray:
    """GIDs without meaning: a random order of the items, spread evenly over all paths. int16 (n, l)."""
    path = np.random.default_rng(seed).permutation(num_items).astype(object) * branching**length // num_items
    return np.stack([path // branching**t % branching for t in range(length)][::-1], axis=1).astype(np.int16)


def leaf_sse(embeddings: np.ndarray, gids: np.ndarray) -> float:
    """Sum of squared distances to the mean of the leaf, the items of one l-1 prefix. float64."""
    return cluster_sse(embeddings, gids, gids.shape[1] - 1)


def cluster_sse(embeddings: np.ndarray, gids: np.ndarray, level: int) -> float:
    """Sum of squared distances to the mean of the items that share a prefix of `level` codes. float64."""
    order, starts, sizes = _groups(prefix_of(gids, level))
    total = 0.0
    for part in np.array_split(np.arange(len(sizes)), -(-len(order) // SUBTREE)):  # float64 for a part at a time
        if len(part):
            begin = starts[part[0]]
            x = embeddings[order[begin : begin + sizes[part].sum()]].astype(np.float64)
            sums = np.add.reduceat(x, starts[part] - begin)
            total += np.square(x).sum() - (np.square(sums).sum(1) / sizes[part]).sum()
    return float(total)


def prefix_of(gids: np.ndarray, level: int) -> np.ndarray:
    """The number, int64 (n,), of each item's prefix of `level` codes, from 0 in the order of the prefixes."""
    number = np.zeros(len(gids), np.int64)
    for codes in gids.T[:level]:
        number = np.unique(number * (int(codes.max()) + 1) + codes, return_inverse=True)[1]
    return number
