"""k-means whose clusters hold at most `capacity` rows.

Every cluster k has a price p_k >= 0, and a row goes to argmin_k |x - c_k|^2 + p_k. Prices that leave no cluster over
capacity, and are 0 where there is room, make that assignment the cheapest one within capacity: they are the dual
variables of the transportation problem. Lloyd's algorithm then alternates prices and means.

Few rows are solved with all their distances at hand. Many rows start from the solution of a sample, and go on with
what FAISS finds: the two best clusters of each row, whose difference, the margin, is all that Newton's method needs.

Equal seeds give equal labels, whatever the number of threads: a call computes on one thread and adds in a fixed
order. To use more cores, cluster different nodes of a tree in different processes.
"""

import numpy as np
import scipy.sparse as sp
from threadpoolctl import threadpool_limits

# Rows, at most, whose distances to all clusters are held; more are sampled first.
MAX_ANNEALED = 8_192
# Lloyd then runs on a sample of so many rows; the last rounds see all of them.
MAX_SAMPLE = 65_536
CHUNK = 65_536
LLOYD_ROUNDS, FULL_ROUNDS = 30, 4
COLDEST = 0.01  # last temperature, as a share of the median margin
NEWTON_STEPS = 5  # per temperature
PRICE_STEPS = 20  # without temperatures
# Share of the rows that may be misplaced for prices to count as converged; what remains is released row by row.
PRICE_TOLERANCE = 2e-3
# Lloyd ends when a round lowers the cost by less than this share.
LLOYD_TOLERANCE = 1e-4


def balanced_kmeans(x: np.ndarray, num_clusters: int, capacity: int, seed: int) -> np.ndarray:
    """Clusters rows so that none holds more than `capacity`; ends after a bounded number of rounds, whatever the data.

    Args:
        x: float (n, d), finite.

    Returns:
        int64 (n,), labels in 0..num_clusters-1. A label may have no rows.

    Raises:
        ValueError: a row is not finite, or n > num_clusters * capacity.
    """
    num_rows = len(x)
    finite = np.isfinite(x).all(axis=1)
    if not finite.all():
        raise ValueError(
            f"row {np.flatnonzero(~finite)[0]} of the embeddings is not finite; {(~finite).sum()} such rows"
        )
    if num_rows > num_clusters * capacity:
        raise ValueError(f"{num_rows} rows do not fit into {num_clusters} clusters of at most {capacity}")
    if num_rows <= num_clusters:
        return np.arange(num_rows)
    if num_clusters == 1:
        return np.zeros(num_rows, np.int64)
    x = _standardised(x)
    rng = np.random.default_rng(seed)
    with threadpool_limits(1):  # matrix products of another number of threads round otherwise
        return _cluster(x, num_clusters, capacity, rng)


def _cluster(x: np.ndarray, num_clusters: int, capacity: int, rng: np.random.Generator) -> np.ndarray:
    num_rows = len(x)

    def sample(size: int) -> np.ndarray:
        return x if num_rows <= size else x[np.sort(rng.choice(num_rows, size, replace=False))]

    few = sample(MAX_ANNEALED)
    quota = capacity / num_rows  # share of the rows that a cluster may hold, of a sample as of all
    centroids, prices, labels = _anneal(few, _plus_plus(few, num_clusters, rng), quota * len(few))
    if few is not x:
        many = sample(MAX_SAMPLE)
        centroids, prices, labels = _lloyd(many, few, centroids, quota, LLOYD_ROUNDS)
        if many is not x:
            centroids, prices, labels = _lloyd(x, few, centroids, quota, FULL_ROUNDS)
    return _release(x, labels, centroids, prices, capacity)


def _standardised(x: np.ndarray) -> np.ndarray:
    """Centred and scaled as a whole: float32 then holds the differences, and no square overflows."""
    centred = x - x.mean(axis=0, dtype=np.float64)
    return np.ascontiguousarray(centred / (np.abs(centred).max() or 1), dtype=np.float32)


def _plus_plus(x: np.ndarray, num_clusters: int, rng: np.random.Generator) -> np.ndarray:
    """Greedy k-means++ (Arthur and Vassilvitskii 2007): of a few rows drawn by distance, the best is the next seed."""
    seeds = [int(rng.integers(len(x)))]
    distance = _distances(x, x[seeds])[:, 0]
    for _ in range(num_clusters - 1):
        total = distance.sum(dtype=np.float64)
        drawn = rng.choice(len(x), 2 + int(np.log(num_clusters)), p=distance / total if total > 0 else None)
        candidates = np.minimum(distance[:, None], _distances(x, x[drawn]))
        best = int(candidates.sum(0).argmin())
        seeds.append(int(drawn[best]))
        distance = candidates[:, best]
    return x[seeds].astype(np.float64)


def _distances(x: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Squared distances, float32 (n, K)."""
    centroids = centroids.astype(np.float32)
    norms = np.square(x).sum(1)[:, None] + np.square(centroids).sum(1)
    return np.maximum(norms - 2 * (x @ centroids.T), 0)


def _anneal(x, centroids, capacity: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lloyd's algorithm on few rows. Returns (centroids, prices, labels)."""
    before = np.inf
    for _ in range(LLOYD_ROUNDS):
        distance = _distances(x, centroids)
        prices = _annealed_prices(distance, capacity)
        labels = (distance + prices).argmin(1)
        means, cost = _means(x, labels, centroids)
        if cost >= before * (1 - LLOYD_TOLERANCE):
            break
        centroids, before = means, cost
    return centroids, prices, labels


def _annealed_prices(distance: np.ndarray, capacity: float) -> np.ndarray:
    """Prices for which the assignment keeps to capacity, by Newton's method on the entropic dual.

    At temperature T row n belongs to cluster k with share softmax_k(-(D_nk + p_k) / T), and the counts have the
    derivative -(diag(counts) - S^T S) / T in the prices. Halving T from the scale of the distances down to that of
    the margins keeps every step within reach, also across empty space, where rows of small margin are lacking.
    """
    num_rows, num_clusters = distance.shape
    prices = np.zeros(num_clusters)
    temperature = float(np.ptp(distance, axis=1).mean())
    nearest = np.partition(distance, 1, axis=1)
    coldest = max(COLDEST * float(np.median(nearest[:, 1] - nearest[:, 0])), 1e-6 * temperature)
    while temperature > coldest:
        temperature /= 2
        for _ in range(NEWTON_STEPS):
            logits = (distance + prices.astype(np.float32)) * np.float32(-1 / temperature)
            logits -= logits.max(1, keepdims=True)
            share = np.exp(logits, out=logits)
            share /= share.sum(1, keepdims=True)
            counts = share.sum(0, dtype=np.float64)
            excess = counts - capacity
            priced = (prices > 0) | (excess > 0)
            if np.abs(excess[priced]).sum() <= PRICE_TOLERANCE * num_rows:
                break
            laplacian = (np.diag(counts) - share.T @ share) / temperature
            prices = _newton_step(prices, laplacian, excess, priced, 4 * temperature)
    return prices


def _newton_step(prices, laplacian, excess, priced, longest: float) -> np.ndarray:
    """Solves laplacian @ change = excess for the priced clusters; no price moves further than `longest`, or below 0."""
    laplacian = laplacian[np.ix_(priced, priced)]
    # Moving all prices by the same amount changes no count; a little of the identity makes the solution unique.
    laplacian[np.diag_indices_from(laplacian)] += 1e-6 * np.trace(laplacian) / len(laplacian) + 1e-12
    prices = prices.copy()
    change = np.linalg.solve(laplacian, excess[priced])
    prices[priced] = np.maximum(prices[priced] + np.clip(change, -longest, longest), 0)
    return prices


def _lloyd(x, few, centroids, quota: float, max_rounds: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lloyd's algorithm on many rows, of which `few` are a sample. Returns (centroids, prices, labels).

    Each round fits the prices to the sample first: wherever the centroids went, they are then nearly right.
    """
    before = np.inf
    for _ in range(max_rounds):
        prices = _annealed_prices(_distances(few, centroids), quota * len(few))
        prices, labels = _refined_prices(x, centroids, prices, quota * len(x))
        means, cost = _means(x, labels, centroids)
        if cost >= before * (1 - LLOYD_TOLERANCE):
            break
        centroids, before = means, cost
    return centroids, prices, labels


def _refined_prices(x, centroids, prices, capacity: float) -> tuple[np.ndarray, np.ndarray]:
    """Newton's method as above, with the two best clusters of a row in place of all. Returns (prices, labels).

    A step is kept if fewer rows are misplaced after it; else it is tried again, shorter.
    """
    num_clusters = len(centroids)
    least, trial = np.inf, prices
    for _ in range(PRICE_STEPS):
        best, second, margin = nearest_two(x, centroids, trial)
        trial_excess = np.bincount(best, minlength=num_clusters) - capacity
        trial_priced = (trial > 0) | (trial_excess > 0)
        misplaced = np.abs(trial_excess[trial_priced]).sum() / len(x)
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
        trial = _newton_step(prices, laplacian, excess, priced, longest)
    return prices, labels


def nearest_two(x: np.ndarray, centroids: np.ndarray, prices: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The best cluster of each row under |x - c_k|^2 + p_k, the second best, and by how much it is dearer.

    A search by inner product: that of [x, 1] and [2c, -(|c|^2 + p)] is |x|^2 minus the priced distance. This is all
    that large inputs ask of a backend.

    Returns:
        (best int64 (n,), second int64 (n,), margin float32 (n,) >= 0).
    """
    import faiss  # here, because trainer and eval import the tree where FAISS may not be installed

    index = faiss.IndexFlatIP(x.shape[1] + 1)
    index.add(np.column_stack([2 * centroids, -(np.square(centroids).sum(1) + prices)]).astype(np.float32))
    found = []
    for start in range(0, len(x), CHUNK):
        chunk = x[start : start + CHUNK]
        found.append(index.search(np.column_stack([chunk, np.ones(len(chunk), np.float32)]), 2))
    similarity, nearest = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return nearest[:, 0], nearest[:, 1], similarity[:, 0] - similarity[:, 1]


def _means(x, labels, centroids) -> tuple[np.ndarray, float]:
    """Means, summed as float64 in row order, and the cost; an empty cluster moves to the row that fits worst."""
    num_clusters = len(centroids)
    sums, squares = np.zeros(centroids.shape), 0.0
    for start in range(0, len(x), CHUNK):
        chunk = x[start : start + CHUNK].astype(np.float64)
        members = (np.ones(len(chunk)), (labels[start : start + CHUNK], np.arange(len(chunk))))
        sums += sp.csr_matrix(members, (num_clusters, len(chunk))) @ chunk
        squares += np.square(chunk).sum()
    counts = np.bincount(labels, minlength=num_clusters)
    means = sums / np.maximum(counts, 1)[:, None]
    cost = squares - (np.square(sums).sum(1) / np.maximum(counts, 1)).sum()
    if empty := np.flatnonzero(counts == 0).tolist():
        fit = np.square(x - means[labels]).sum(1)
        means[empty] = x[np.argsort(-fit, kind="stable")[: len(empty)]]
    return means, float(cost)


def _release(x, labels, centroids, prices, capacity: int) -> np.ndarray:
    """Over-full clusters release the rows that lose least, to the best cluster with room.

    Each round fills a cluster or ends the excess, so there are at most K.
    """
    num_clusters, labels = len(centroids), labels.copy()
    for _ in range(num_clusters):
        counts = np.bincount(labels, minlength=num_clusters)
        excess, room = np.maximum(counts - capacity, 0), np.maximum(capacity - counts, 0)
        if not excess.any():
            break
        rows, roomy = np.flatnonzero(excess[labels]), np.flatnonzero(room)
        target, regret = np.empty(len(rows), np.int64), np.empty(len(rows))
        for start in range(0, len(rows), CHUNK):
            part = rows[start : start + CHUNK]
            cost = _distances(x[part], centroids) + prices
            chosen = roomy[cost[:, roomy].argmin(1)]
            place = np.arange(len(part))
            target[start : start + CHUNK] = chosen
            regret[start : start + CHUNK] = cost[place, chosen] - cost[place, labels[part]]
        leaving = _least(regret, labels[rows], excess)
        entering = leaving[_least(regret[leaving], target[leaving], room)]
        labels[rows[entering]] = target[entering]
    return labels


def _least(values: np.ndarray, group: np.ndarray, quota: np.ndarray) -> np.ndarray:
    """Positions of the quota[g] least values of every group g."""
    order = np.lexsort((values, group))
    sizes = np.bincount(group, minlength=len(quota))
    rank = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return order[rank < quota[group[order]]]
