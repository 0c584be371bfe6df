import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment
from threadpoolctl import threadpool_limits

from gid import hierarchy, kmeans, rows
from gid.batch import Batch, balance
from gid.kmeans import balanced_kmeans
from gid.rows import Rows


def sse(x, labels):
    return sum(np.square(x[labels == k] - x[labels == k].mean(0)).sum() for k in np.unique(labels))


def mixture(num_rows, dim, num_blobs, spread, seed):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(num_blobs, dim)) * spread
    weights = rng.dirichlet(np.full(num_blobs, 0.5))
    return centres[rng.choice(num_blobs, num_rows, p=weights)] + rng.normal(size=(num_rows, dim))


def exact_balanced_kmeans(x, num_clusters, capacity, starts=5):
    """Lloyd with an exact assignment: each centroid has `capacity` columns in a linear assignment problem."""
    best = np.inf
    for start in range(starts):
        centroids = x[np.random.default_rng(start).choice(len(x), num_clusters, replace=False)]
        for _ in range(50):
            distance = np.square(x[:, None] - centroids).sum(-1)
            labels = linear_sum_assignment(np.repeat(distance, capacity, axis=1))[1] // capacity
            moved = np.stack(
                [x[labels == k].mean(0) if (labels == k).any() else centroids[k] for k in range(num_clusters)]
            )
            if np.allclose(moved, centroids):
                break
            centroids = moved
        best = min(best, sse(x, labels))
    return best


@pytest.mark.parametrize("slack", [1.0, 1.1, 2.0])
def test_is_as_good_as_exact_assignment(slack):
    ratios = []
    for seed in range(6):
        x = mixture(240, 6, 5, 3, seed)
        capacity = int(np.ceil(240 / 8 * slack))
        labels = balanced_kmeans(x, 8, capacity, seed)
        assert np.bincount(labels).max() <= capacity
        ratios.append(sse(x, labels) / exact_balanced_kmeans(x, 8, capacity))
    assert np.mean(ratios) < 1.03
    assert max(ratios) < 1.1


@pytest.mark.parametrize("slack", [1.0, 1.3])
@pytest.mark.parametrize(("spread", "bound"), [(2, 1.03), (10, 1.2)])  # at 10 no rows lie between the blobs
def test_sampling_and_streaming_lose_little_against_all_distances_at_hand(monkeypatch, spread, bound, slack):
    x = mixture(6000, 8, 30, spread, 0).astype(np.float32)
    capacity = int(np.ceil(6000 / 16 * slack))
    whole = sse(x, balanced_kmeans(x, 16, capacity, 0))
    monkeypatch.setattr(kmeans, "MAX_STARTED", 800)
    monkeypatch.setattr(kmeans, "MAX_AT_HAND", 3000)
    monkeypatch.setattr(rows, "CHUNK", 1000)
    ratios = []
    for seed in range(4):
        labels = balanced_kmeans(x, 16, capacity, seed)
        assert np.bincount(labels).max() <= capacity
        ratios.append(sse(x, labels) / whole)
    assert np.mean(ratios) < bound


def test_nearest_two_equals_brute_force(monkeypatch):
    monkeypatch.setattr(rows, "CHUNK", 7)
    rng = np.random.default_rng(0)
    x, centroids, prices = Rows(rng.normal(size=(50, 6))), rng.normal(size=(5, 6)), rng.random(5)
    cost = np.square(x.take(slice(None))[:, None] - centroids).sum(-1) + prices
    best, second, margin = kmeans.nearest_two(x, centroids, prices)
    order = np.argsort(cost, axis=1)
    np.testing.assert_array_equal(best, order[:, 0])
    np.testing.assert_array_equal(second, order[:, 1])
    ranked = np.sort(cost, axis=1)
    np.testing.assert_allclose(margin, ranked[:, 1] - ranked[:, 0], atol=1e-5)


DEGENERATE = {
    "all zero": np.zeros((100, 4)),
    "all the same": np.full((100, 4), 3.7),
    "two points": np.repeat([[0.0, 1.0], [5.0, 5.0]], [99, 1], axis=0),
    "one far away": np.concatenate([np.random.default_rng(0).normal(size=(99, 3)), [[1e12, 0, 0]]]),
    "huge": np.random.default_rng(1).normal(size=(100, 3)).astype(np.float32) * 1e37,
    "tiny": np.random.default_rng(2).normal(size=(100, 3)).astype(np.float32) * 1e-37,
    "one column": np.arange(100.0)[:, None],
}


@pytest.mark.parametrize("name", DEGENERATE)
@pytest.mark.parametrize("capacity", [10, 13, 100])
@pytest.mark.parametrize("at_hand", [65536, 20])  # all distances at hand; a sample first, then all rows
def test_degenerate_rows_keep_to_capacity(monkeypatch, name, capacity, at_hand):
    monkeypatch.setattr(kmeans, "MAX_AT_HAND", at_hand)
    labels = balanced_kmeans(DEGENERATE[name], 10, capacity, 0)
    assert labels.min() >= 0
    assert np.bincount(labels, minlength=10).max() <= capacity
    assert len(np.bincount(labels, minlength=10)) == 10


def test_few_rows_get_a_cluster_each():
    assert sorted(balanced_kmeans(np.zeros((3, 2)), 8, 1, 0)) == [0, 1, 2]
    assert len(balanced_kmeans(np.zeros((0, 2)), 8, 1, 0)) == 0


@pytest.mark.parametrize("at_hand", [65536, 200])
def test_same_seed_same_labels_for_any_number_of_threads(monkeypatch, at_hand):
    monkeypatch.setattr(kmeans, "MAX_AT_HAND", at_hand)
    monkeypatch.setattr(rows, "CHUNK", 500)
    x = mixture(3000, 16, 7, 1, 0).astype(np.float32)
    with threadpool_limits(1):
        one = balanced_kmeans(x, 12, 260, 5)
    with threadpool_limits(2):
        two = balanced_kmeans(x, 12, 260, 5)
    np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(one, balanced_kmeans(x, 12, 260, 5, threads=3))
    assert (balanced_kmeans(x, 12, 260, 6) != one).any()


@pytest.mark.parametrize("slack", [1.0, 1.2, 3.0])
def test_a_batch_is_as_good_as_each_input_alone(slack):
    rng = np.random.default_rng(0)
    inputs = [mixture(size, 5, 6, 2, size) for size in (40, 55, 90, 91)]
    capacity = np.array([int(np.ceil(len(x) / 8 * slack)) for x in inputs])
    real = np.arange(91) < np.array([[len(x)] for x in inputs])
    padded = np.zeros((4, 91, 5), np.float32)
    padded[real] = np.concatenate(inputs)
    labels = np.split(hierarchy._cluster_batch(padded, real, capacity, 8, rng), np.cumsum(real.sum(1))[:-1])
    ratios = []
    for x, found, most in zip(inputs, labels, capacity, strict=True):
        assert np.bincount(found, minlength=8).max() <= most
        ratios.append(sse(x, found) / exact_balanced_kmeans(x, 8, most))
    assert np.mean(ratios) < 1.08


def test_prices_balance_the_softened_counts_of_every_input():
    rng = np.random.default_rng(1)
    batch = Batch.of(rng.normal(size=(3, 200, 4)).astype(np.float32), np.array([200, 150, 90]))
    batch.x_BND[~batch.mask_BN] = 0
    distance = batch.distances(rng.normal(size=(3, 6, 4)) * [[[0.3]], [[1.0]], [[2.0]]])
    capacity = batch.size_B / 6 * 1.05
    prices = balance(batch, distance, capacity, np.zeros((3, 6)))
    labels = (distance + prices[:, :, None]).argmin(1)
    for b, size in enumerate(batch.size_B):
        count = np.bincount(labels[b, :size], minlength=6)
        assert np.maximum(count - capacity[b], 0).sum() <= 3
        assert (count[prices[b] > 0] > 0.8 * capacity[b]).all()  # no price without need


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda", "faiss-gpu"])
def test_a_gpu_finds_the_same_two_clusters(device):
    if device == "faiss-gpu":
        pytest.importorskip("faiss").StandardGpuResources  # noqa: B018  a CPU build lacks it
    rng = np.random.default_rng(0)
    x, centroids, prices = Rows(rng.normal(size=(5000, 16))), rng.normal(size=(32, 16)), rng.random(32)
    best, second, margin = kmeans.nearest_two(x, centroids, prices, device)
    expected = kmeans.nearest_two(x, centroids, prices)
    np.testing.assert_allclose(margin, expected[2], atol=1e-3)
    clear = expected[2] > 1e-2
    np.testing.assert_array_equal(best[clear], expected[0][clear])
    assert (second == expected[1]).mean() > 0.99


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_refuses_rows_that_are_not_finite(value):
    x = np.zeros((10, 3))
    x[[4, 7], 1] = value
    with pytest.raises(ValueError, match=r"row 4 .* 2 such rows"):
        balanced_kmeans(x, 3, 10, 0)


def test_refuses_more_rows_than_room():
    with pytest.raises(ValueError, match="31 rows do not fit into 3 clusters of at most 10"):
        balanced_kmeans(np.zeros((31, 2)), 3, 10, 0)
