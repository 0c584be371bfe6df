"""k-means whose clusters hold at most `capacity` rows.

Every cluster k has a price p_k >= 0, and a row goes to argmin_k |x - c_k|^2 + p_k. Prices that leave no cluster over
capacity, and are 0 where there is room, make that assignment the cheapest one within capacity: they are the dual
variables of the transportation problem. Lloyd's algorithm then alternates prices and means.

Few rows are solved with all their distances at hand (gid/batch.py), from several starts. Many rows start from the
solution of a sample, and go on with what FAISS finds: the two best clusters of each row, whose difference, the margin,
is all that Newton's method needs.

Equal seeds give equal labels, whatever the number of threads: each works on chunks of its own, alone, and sums are
added in the order of the chunks.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import scipy.sparse as sp
from threadpoolctl import ThreadpoolController

from gid.batch import Batch, Clusters, balance, lloyd, newton_step, plus_plus, release
from gid.nearest import search_for
from gid.rows import Rows

# Of a few rows several starts are tried. At four the cost is that of the best of ten starts of k-means-constrained.
STARTS, MAX_STARTED = 4, 8_192
# Rows, at most, whose distances to all clusters are held; more are sampled first. Fewer when there are many clusters.
MAX_AT_HAND, MAX_CELLS = 65_536, 1 << 24
FULL_ROUNDS = 4
PRICE_STEPS = 12
PRICE_TOLERANCE = 2e-3  # share of the rows that may be misplaced for prices to count as converged
# Lloyd ends when a round lowers the cost by less than this share: on a sample, and on all rows.
COARSE, FINE = 1e-3, 1e-5


def balanced_kmeans(
    x: np.ndarray, num_clusters: int, capacity: int, seed: int, device: str = "cpu", threads: int = 1
) -> np.ndarray:
    """Clusters rows so that none holds more than `capacity`; ends after a bounded number of rounds, whatever the data.

    Args:
        x: float (n, d), finite; may be memory-mapped, as it is read in pieces.
        device: see `gid.nearest.best_device`; rows beyond MAX_AT_HAND are searched there.

    Returns:
        int64 (n,), labels in 0..num_clusters-1. A label may have no rows.

    Raises:
        ValueError: a row is not finite, or n > num_clusters * capacity.
    """
    return cluster(Rows(x), num_clusters, capacity, np.random.default_rng(seed), device, threads)


def cluster(
    rows: Rows, num_clusters: int, capacity: int, rng: np.random.Generator, device: str = "cpu", threads: int = 1
) -> np.ndarray:
    """`balanced_kmeans` of some rows of a matrix."""
    if len(rows) > num_clusters * capacity:
        raise ValueError(f"{len(rows)} rows do not fit into {num_clusters} clusters of at most {capacity}")
    if len(rows) <= num_clusters:
        return np.arange(len(rows))
    if num_clusters == 1:
        return np.zeros(len(rows), np.int64)
    with one_thread():
        return _cluster(rows, num_clusters, capacity, rng, device, threads)


def _cluster(rows: Rows, num_clusters: int, capacity: int, rng, device: str, threads: int) -> np.ndarray:
    at_hand = min(max(MAX_CELLS // num_clusters, 2 * num_clusters), MAX_AT_HAND)
    few = _sample(rows, min(MAX_STARTED, at_hand), rng)
    starts = Batch.of(np.repeat(few.x_BND, STARTS, axis=0), np.repeat(few.size_B, STARTS))
    centroids = plus_plus(starts, num_clusters, rng)
    quota = capacity / len(rows)  # share of the rows that a cluster may hold, of a sample as of all
    found = lloyd(starts, centroids, quota * starts.size_B, np.zeros(centroids.shape[:2]), COARSE)
    many = few if few.size_B[0] == len(rows) else _sample(rows, at_hand, rng)
    found = _polished(many, *found.best(), quota * many.size_B)
    if many.size_B[0] == len(rows):
        labels, centroids, prices = found.labels_BN[0], found.centroids_BKD[0], found.prices_BK[0]
    else:
        with _pool(threads) as each:
            labels, centroids, prices = _stream(rows, many, found, capacity, device, each)

    def priced_distance(index: np.ndarray) -> np.ndarray:
        return Batch.of(rows.take(index)[None], np.array([len(index)])).distances(centroids[None])[0].T + prices

    return release(labels, np.zeros(len(labels), np.int64), np.array([capacity]), num_clusters, priced_distance)


def _sample(rows: Rows, size: int, rng: np.random.Generator) -> Batch:
    num_rows = len(rows)
    drawn = slice(None) if num_rows <= size else np.sort(rng.choice(num_rows, size, replace=False))
    return Batch.of(rows.take(drawn)[None], np.array([min(num_rows, size)]))


def _polished(many: Batch, centroids: np.ndarray, prices: np.ndarray, capacity_B: np.ndarray) -> Clusters:
    return lloyd(many, centroids[None], capacity_B, prices[None], FINE)


def _stream(rows: Rows, many: Batch, found: Clusters, capacity: int, device: str, each: Callable):
    """Lloyd's algorithm on all rows, of which `many` are a sample. Returns (labels, centroids, prices).

    Each round fits the prices to the sample first: wherever the centroids went, they are then nearly right.
    """
    centroids, prices, before = found.centroids_BKD[0], found.prices_BK[0], np.inf
    quota = many.size_B * (capacity / len(rows))
    for _ in range(FULL_ROUNDS):
        prices = balance(many, many.distances(centroids[None]), quota, prices[None])[0]
        prices, labels = _refined_prices(rows, centroids, prices, capacity, device, each)
        means, cost = _means(rows, labels, centroids, each)
        if cost >= before * (1 - FINE):
            break
        centroids, before = means, cost
    return labels, centroids, prices


def _refined_prices(rows: Rows, centroids, prices, capacity: int, device: str, each: Callable):
    """Newton's method with the two best clusters of a row in place of all. Returns (prices, labels).

    A step is kept if fewer rows are misplaced after it; else it is tried again, shorter.
    """
    num_clusters = len(centroids)
    least, trial = np.inf, prices
    for _ in range(PRICE_STEPS):
        best, second, margin = nearest_two(rows, centroids, trial, device, each)
        trial_excess = np.bincount(best, minlength=num_clusters) - capacity
        trial_priced = (trial > 0) | (trial_excess > 0)
        misplaced = np.abs(trial_excess[trial_priced]).sum() / len(rows)
        if misplaced < least:
            prices, labels, excess, priced, least = trial, best, trial_excess, trial_priced, misplaced
            if misplaced <= PRICE_TOLERANCE:
                break
            # As wide a boundary as there are rows to move: far from the solution steps are bold, near it exact.
            temperature = max(float(np.quantile(margin, np.clip(misplaced, 0.01, 0.5))), 1e-9)
            density = 1 / (temperature * (2 + 2 * np.cosh(np.minimum(margin / temperature, 30), dtype=np.float64)))
            edges = np.bincount(best * num_clusters + second, density, num_clusters**2).reshape(num_clusters, -1)
            edges += edges.T
            laplacian, longest = np.diag(edges.sum(1)) - edges, 4 * temperature
        else:
            longest /= 4
        trial = newton_step(prices[None], laplacian[None], excess[None], priced[None], np.array([longest]))[0]
    return prices, labels


def nearest_two(
    rows: Rows, centroids: np.ndarray, prices: np.ndarray, device: str = "cpu", each: Callable = map
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The best cluster of each row under |x - c_k|^2 + p_k, the second best, and by how much it is dearer.

    Returns:
        (best int64 (n,), second int64 (n,), margin float32 (n,) >= 0).
    """
    search = search_for(centroids, prices, device)

    def search_part(part: slice) -> tuple[np.ndarray, np.ndarray]:
        x = rows.take(part)
        return search(np.column_stack([x, np.ones(len(x), np.float32)]))

    nearest, margin = np.empty((2, len(rows)), np.int64), np.empty(len(rows), np.float32)
    results = (each if device == "cpu" else map)(search_part, rows.chunks())  # one stream of work for a GPU
    for part, (similarity, found) in zip(rows.chunks(), results, strict=True):
        nearest[:, part], margin[part] = found.T, similarity[:, 0] - similarity[:, 1]
    return *nearest, margin


def _means(rows: Rows, labels: np.ndarray, centroids: np.ndarray, each: Callable) -> tuple[np.ndarray, float]:
    """Means, summed as float64 in the order of the rows, and the cost; an empty cluster stays where it is."""
    num_clusters = len(centroids)

    def add_part(part: slice) -> tuple[np.ndarray, float]:
        x = rows.take(part).astype(np.float64)
        members = sp.csr_matrix((np.ones(len(x)), (labels[part], np.arange(len(x)))), (num_clusters, len(x)))
        return members @ x, float(np.square(x).sum())

    sums, squares = np.zeros(centroids.shape), 0.0
    for part_sums, part_squares in each(add_part, rows.chunks()):
        sums += part_sums
        squares += part_squares
    counts = np.bincount(labels, minlength=num_clusters)[:, None]
    means = np.where(counts, sums / np.maximum(counts, 1), centroids)
    return means, squares - float((np.square(sums) / np.maximum(counts, 1)).sum())


@contextlib.contextmanager
def _pool(threads: int) -> Iterator[Callable]:
    """A map whose calls run on so many threads, each of them without threads of its own; results come in order."""
    if threads == 1:
        yield map
        return
    import faiss

    with ThreadPoolExecutor(threads, initializer=lambda: faiss.omp_set_num_threads(1)) as executor:
        yield executor.map


def one_thread():
    """Keeps BLAS and OpenMP to one thread: matrix products of another number of threads round otherwise."""
    return _controller().limit(limits=1)


@functools.cache
def _controller() -> ThreadpoolController:
    import faiss  # noqa: F401  its libraries are among those that are limited

    return ThreadpoolController()  # a millisecond, more than a small node takes
