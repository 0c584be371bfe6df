"""k-means within capacity for many small inputs at once, with all distances at hand.

The inputs, nodes of a tree or starts of one node, are padded to one shape and go through every step together: with
30 rows each, calls would cost more than arithmetic. No step of a node reads another node, so that the labels of a
node do not depend on its company.

Shapes: B inputs, N rows (the largest input), D dimensions, K clusters.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

COLDEST = 0.01  # last temperature, as a share of the median margin
REHEATED = 16  # first temperature from known prices, in coldest ones
NEWTON_STEPS = 5  # per temperature
# Share of the rows that may be misplaced for prices to count as converged; what remains is released row by row.
PRICE_TOLERANCE = 2e-3
# Known prices that end with a larger share misplaced are found anew, from the first temperature on.
LOST = 0.01
LLOYD_ROUNDS = 50
RELEASED_AT_ONCE = 1 << 16  # rows whose distances are held


@dataclass(frozen=True)
class Batch:
    """Rows of B inputs, padded with zeros."""

    x_BND: np.ndarray  # float32
    size_B: np.ndarray  # int64, rows of each input
    mask_BN: np.ndarray  # bool, True where a row is real
    square_BN: np.ndarray  # float32 |x|^2

    @classmethod
    def of(cls, x_BND: np.ndarray, size_B: np.ndarray) -> "Batch":
        mask_BN = np.arange(x_BND.shape[1]) < size_B[:, None]
        return cls(x_BND, size_B, mask_BN, np.square(x_BND).sum(2))

    def take(self, inputs: np.ndarray) -> "Batch":
        if len(inputs) == len(self.size_B):
            return self
        return Batch(self.x_BND[inputs], self.size_B[inputs], self.mask_BN[inputs], self.square_BN[inputs])

    def distances(self, centroids_BKD: np.ndarray) -> np.ndarray:
        """Squared distances, float32 (B, K, N): sums over K then run along memory."""
        centroids_BKD = centroids_BKD.astype(np.float32)
        distance_BKN = np.matmul(-2 * centroids_BKD, self.x_BND.transpose(0, 2, 1))
        distance_BKN += self.square_BN[:, None]
        distance_BKN += np.square(centroids_BKD).sum(2)[:, :, None]
        return np.maximum(distance_BKN, 0, out=distance_BKN)


@dataclass
class Clusters:
    """A solution of each input. Labels go to the cheapest cluster, K marks padding; a few rows may exceed capacity."""

    centroids_BKD: np.ndarray  # float64
    prices_BK: np.ndarray  # float64 >= 0
    labels_BN: np.ndarray  # int64
    cost_B: np.ndarray  # float64, sum of squared distances to the means

    def best(self) -> tuple[np.ndarray, np.ndarray]:
        """(centroids (K, D), prices (K,)) of the cheapest input, for inputs that are starts of the same rows."""
        b = int(self.cost_B.argmin())
        return self.centroids_BKD[b], self.prices_BK[b]


def plus_plus(batch: Batch, num_clusters: int, rng: np.random.Generator) -> np.ndarray:
    """Greedy k-means++ (Arthur and Vassilvitskii 2007): of a few rows drawn by distance, the best is the next seed."""
    num_inputs = len(batch.size_B)
    inputs = np.arange(num_inputs)
    chance = rng.random((num_inputs, num_clusters, 2 + int(np.log(num_clusters))))
    seeds_BK = np.empty((num_inputs, num_clusters), np.int64)
    seeds_BK[:, 0] = chance[:, 0, 0] * batch.size_B
    nearest_BN = batch.distances(batch.x_BND[inputs, seeds_BK[:, 0]][:, None])[:, 0] * batch.mask_BN
    for k in range(1, num_clusters):
        cumulative_BN = np.cumsum(nearest_BN, axis=1, dtype=np.float64)
        drawn_BT = _searchsorted(cumulative_BN, chance[:, k] * cumulative_BN[:, -1:])
        drawn_BT = np.minimum(drawn_BT, batch.size_B[:, None] - 1)  # where all distances are 0
        candidate_BTN = batch.distances(batch.x_BND[inputs[:, None], drawn_BT])
        np.minimum(candidate_BTN, nearest_BN[:, None], out=candidate_BTN)
        candidate_BTN *= batch.mask_BN[:, None]
        best_B = candidate_BTN.sum(2).argmin(1)
        seeds_BK[:, k] = drawn_BT[inputs, best_B]
        nearest_BN = candidate_BTN[inputs, best_B]
    return batch.x_BND[inputs[:, None], seeds_BK].astype(np.float64)


def _searchsorted(sorted_BN: np.ndarray, values_BT: np.ndarray) -> np.ndarray:
    if len(sorted_BN) < 8:
        rows = zip(sorted_BN, values_BT, strict=True)
        return np.stack([np.searchsorted(row, values, side="right") for row, values in rows])
    return (sorted_BN[:, None] <= values_BT[:, :, None]).sum(2)


def lloyd(
    batch: Batch, centroids_BKD: np.ndarray, capacity_B: np.ndarray, prices_BK: np.ndarray, tolerance: float
) -> Clusters:
    """Lloyd's algorithm within capacity; an input is done when a round lowers its cost by less than `tolerance` of it.

    Args:
        capacity_B: float, rows that a cluster may hold. A share of a row counts, as the input may be a sample.
        prices_BK: a first guess, zeros where nothing is known.
    """
    num_clusters = centroids_BKD.shape[1]
    found = Clusters(
        centroids_BKD.copy(),
        prices_BK.copy(),
        np.full(batch.mask_BN.shape, num_clusters),
        np.full(len(capacity_B), np.inf),
    )
    going = np.arange(len(capacity_B))
    for _ in range(LLOYD_ROUNDS):
        part = batch.take(going)
        distance_BKN = part.distances(found.centroids_BKD[going])
        prices = balance(part, distance_BKN, capacity_B[going], found.prices_BK[going])
        labels = cheapest(part, distance_BKN, prices)
        means, cost = _means(part, distance_BKN, labels, num_clusters)
        found.prices_BK[going], found.labels_BN[going] = prices, labels
        better = cost < found.cost_B[going] * (1 - tolerance)
        going = going[better]
        found.centroids_BKD[going], found.cost_B[going] = means[better], cost[better]
        if not len(going):
            break
    return found


def cheapest(batch: Batch, distance_BKN: np.ndarray, prices_BK: np.ndarray) -> np.ndarray:
    """Labels argmin_k distance + price, int64 (B, N); K for padding."""
    labels_BN = (distance_BKN + prices_BK.astype(np.float32)[:, :, None]).argmin(1)
    labels_BN[~batch.mask_BN] = distance_BKN.shape[1]
    return labels_BN


def balance(batch: Batch, distance_BKN: np.ndarray, capacity_B: np.ndarray, guess_BK: np.ndarray) -> np.ndarray:
    """Prices that keep the cheapest clusters to capacity, nearly: 0 where they do so by themselves."""
    prices_BK = np.zeros(guess_BK.shape)
    misplaced_B = _misplaced(batch, distance_BKN, capacity_B, prices_BK)

    def anneal(inputs: np.ndarray, start_BK: np.ndarray) -> None:
        part, distance, capacity = batch.take(inputs), _rows(distance_BKN, inputs), capacity_B[inputs]
        prices_BK[inputs] = _annealed_prices(part, distance, capacity, start_BK[inputs])
        misplaced_B[inputs] = _misplaced(part, distance, capacity, prices_BK[inputs])

    crowded = np.flatnonzero(misplaced_B)
    if len(crowded):
        anneal(crowded, guess_BK)
        is_lost_B = misplaced_B > np.maximum(LOST * batch.size_B, 1 + prices_BK.shape[1] / 8)
        lost = crowded[is_lost_B[crowded] & guess_BK[crowded].any(1)]
        if len(lost):
            anneal(lost, np.zeros_like(guess_BK))
    return prices_BK


def _annealed_prices(batch: Batch, distance_BKN: np.ndarray, capacity_B: np.ndarray, start_BK: np.ndarray):
    """Newton's method on the entropic dual. Returns prices (B, K).

    At temperature T row n belongs to cluster k with share softmax_k(-(D_kn + p_k) / T), and the counts have the
    derivative -(diag(counts) - S S^T) / T in the prices. Halving T from the scale of the distances down to that of
    the margins keeps every step within reach, also across empty space, where rows of small margin are lacking. From
    known prices a few halvings do.
    """
    nearest_BN, margin_BN = _margins(batch, distance_BKN)
    inputs = np.arange(len(batch.size_B))
    hot_B = ((distance_BKN.max(1) - nearest_BN) * batch.mask_BN).sum(1, dtype=np.float64) / batch.size_B
    median_B = np.sort(margin_BN, axis=1)[inputs, batch.size_B // 2]
    coldest_B = np.maximum(COLDEST * median_B, 1e-6 * hot_B) + np.finfo(np.float32).tiny
    temperature_B = np.where(start_BK.any(1), np.minimum(hot_B, REHEATED * coldest_B), hot_B)
    prices_BK, going = start_BK.copy(), inputs
    while len(going):
        temperature_B = np.maximum(temperature_B / 2, coldest_B)
        prices_BK[going] = _newton(
            batch.take(going), _rows(distance_BKN, going), capacity_B[going], prices_BK[going], temperature_B[going]
        )
        going = np.flatnonzero(temperature_B > coldest_B)
    return prices_BK


def _margins(batch: Batch, distance_BKN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distance to the nearest centroid, and by how much the second is further: infinite for padding. Both (B, N)."""
    two_BNK = np.partition(distance_BKN, 1, axis=1)[:, :2]
    return two_BNK[:, 0], np.where(batch.mask_BN, two_BNK[:, 1] - two_BNK[:, 0], np.inf)


def _newton(batch: Batch, distance_BKN, capacity_B, prices_BK, temperature_B) -> np.ndarray:
    """NEWTON_STEPS at one temperature of each input. Returns prices (B, K)."""
    coldness = (-1 / temperature_B).astype(np.float32)[:, None, None]
    for _ in range(NEWTON_STEPS):
        share_BKN = distance_BKN + prices_BK.astype(np.float32)[:, :, None]
        share_BKN *= coldness
        share_BKN -= share_BKN.max(1, keepdims=True)
        np.exp(share_BKN, out=share_BKN)
        share_BKN *= (batch.mask_BN / share_BKN.sum(1))[:, None].astype(np.float32)
        count_BK = share_BKN.sum(2, dtype=np.float64)
        excess_BK = count_BK - capacity_B[:, None]
        priced_BK = (prices_BK > 0) | (excess_BK > 0)
        goes_on_B = np.where(priced_BK, np.abs(excess_BK), 0).sum(1) > PRICE_TOLERANCE * batch.size_B
        if not goes_on_B.any():
            break
        laplacian_BKK = np.eye(count_BK.shape[1]) * count_BK[:, :, None] - share_BKN @ share_BKN.transpose(0, 2, 1)
        laplacian_BKK /= temperature_B[:, None, None]
        moved_BK = newton_step(prices_BK, laplacian_BKK, excess_BK, priced_BK, 4 * temperature_B)
        prices_BK = np.where(goes_on_B[:, None], moved_BK, prices_BK)
    return prices_BK


def newton_step(prices_BK, laplacian_BKK, excess_BK, priced_BK, longest_B) -> np.ndarray:
    """Solves laplacian @ change = excess for the priced clusters; no price moves further than `longest`, or below 0."""
    matrix_BKK = np.where(priced_BK[:, :, None] & priced_BK[:, None], laplacian_BKK, 0)
    # Moving all prices by the same amount changes no count; a little of the identity makes the solution unique.
    trace_B = np.trace(matrix_BKK, axis1=1, axis2=2)
    ridge_B = 1e-6 * trace_B / np.maximum(priced_BK.sum(1), 1) + 1e-12
    matrix_BKK += np.eye(prices_BK.shape[1]) * np.where(priced_BK, ridge_B[:, None], 1)[:, :, None]
    change_BK = np.linalg.solve(matrix_BKK, np.where(priced_BK, excess_BK, 0)[:, :, None])[:, :, 0]
    change_BK = np.clip(change_BK, -longest_B[:, None], longest_B[:, None])
    return np.where(priced_BK, np.maximum(prices_BK + change_BK, 0), prices_BK)


def _misplaced(batch: Batch, distance_BKN, capacity_B, prices_BK) -> np.ndarray:
    """Rows above capacity, and below it where a price keeps rows away. float64 (B,)."""
    excess_BK = counts(cheapest(batch, distance_BKN, prices_BK), prices_BK.shape[1]) - capacity_B[:, None]
    return np.where((prices_BK > 0) | (excess_BK > 0), np.abs(excess_BK), 0).sum(1)


def counts(labels_BN: np.ndarray, num_clusters: int) -> np.ndarray:
    """Rows per cluster, int64 (B, K); label K is padding."""
    num_inputs = len(labels_BN)
    flat = labels_BN + np.arange(num_inputs)[:, None] * (num_clusters + 1)
    tallies = np.bincount(flat.ravel(), minlength=num_inputs * (num_clusters + 1))
    return tallies.reshape(num_inputs, num_clusters + 1)[:, :num_clusters]


def _means(batch: Batch, distance_BKN, labels_BN, num_clusters: int) -> tuple[np.ndarray, np.ndarray]:
    """Means (B, K, D) and cost (B,); an empty cluster moves to the row that fits worst."""
    member_BKN = (labels_BN[:, None] == np.arange(num_clusters)[:, None]).astype(np.float32)
    sums_BKD = (member_BKN @ batch.x_BND).astype(np.float64)
    count_BK = counts(labels_BN, num_clusters)
    at_least_1 = np.maximum(count_BK, 1)
    means_BKD = sums_BKD / at_least_1[:, :, None]
    squares_B = batch.square_BN.sum(1, dtype=np.float64)
    cost_B = squares_B - (np.square(sums_BKD).sum(2) / at_least_1).sum(1)
    inputs, clusters = np.nonzero(count_BK == 0)
    if len(inputs):
        own = np.minimum(labels_BN, num_clusters - 1)
        fit_BN = np.where(batch.mask_BN, np.take_along_axis(distance_BKN, own[:, None], axis=1)[:, 0], -np.inf)
        rank = (np.cumsum(count_BK == 0, axis=1) - 1)[inputs, clusters]
        means_BKD[inputs, clusters] = batch.x_BND[inputs, np.argsort(-fit_BN, axis=1, kind="stable")[inputs, rank]]
    return means_BKD, cost_B


def release(
    labels: np.ndarray, owner: np.ndarray, capacity_B: np.ndarray, num_clusters: int, cost_of: Callable
) -> np.ndarray:
    """Over-full clusters release the rows that lose least, to the best cluster of their input with room.

    Each round fills a cluster or ends the excess, so there are at most K.

    Args:
        labels: int64 (R,) rows of all inputs, one after another; owner: int64 (R,) the input of a row.
        capacity_B: int; cost_of: row numbers (M,) -> priced distances (M, K).

    Returns:
        Labels within capacity.
    """
    labels = labels.copy()
    for _ in range(num_clusters):
        cluster = owner * num_clusters + labels
        count_BK = np.bincount(cluster, minlength=len(capacity_B) * num_clusters).reshape(-1, num_clusters)
        excess_BK, room_BK = (
            np.maximum(count_BK - capacity_B[:, None], 0),
            np.maximum(capacity_B[:, None] - count_BK, 0),
        )
        rows = np.flatnonzero(excess_BK.ravel()[cluster])
        if not len(rows):
            break
        target, regret = np.empty(len(rows), np.int64), np.empty(len(rows))
        for start in range(0, len(rows), RELEASED_AT_ONCE):
            part = slice(start, start + RELEASED_AT_ONCE)
            cost, place = cost_of(rows[part]), np.arange(len(rows[part]))
            target[part] = np.where(room_BK[owner[rows[part]]] > 0, cost, np.inf).argmin(1)
            regret[part] = cost[place, target[part]] - cost[place, labels[rows[part]]]
        leaving = _least(regret, cluster[rows], excess_BK.ravel())
        wanted = owner[rows[leaving]] * num_clusters + target[leaving]
        entering = leaving[_least(regret[leaving], wanted, room_BK.ravel())]
        labels[rows[entering]] = target[entering]
    return labels


def _least(values: np.ndarray, group: np.ndarray, quota: np.ndarray) -> np.ndarray:
    """Positions of the quota[g] least values of every group g."""
    order = np.lexsort((values, group))
    sizes = np.bincount(group, minlength=len(quota))
    rank = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return order[rank < quota[group[order]]]


def _rows(array: np.ndarray, inputs: np.ndarray) -> np.ndarray:
    """array[inputs], without a copy when that is all of it."""
    return array if len(inputs) == len(array) else array[inputs]
