"""Balanced k-means of gid/kmeans.py against the package k-means-constrained, in one process on one thread.

    pip install k-means-constrained
    OMP_NUM_THREADS=1 python bench/kmeans.py runs/phone/gid/item_embeddings.npy --capacity 1024

Level 1 is one call with K clusters of at most --capacity items. Leaf means that each of those is split once more,
into K leaves of at most K items, as in a tree of length 3. SSE is the sum of squared distances to the cluster's mean;
ratios below 1 are in favour of gid/kmeans.py.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np

from gid.kmeans import balanced_kmeans


def package_kmeans(x: np.ndarray, num_clusters: int, capacity: int, seed: int) -> np.ndarray:
    from k_means_constrained import KMeansConstrained

    if len(x) <= num_clusters:
        return np.arange(len(x))
    model = KMeansConstrained(num_clusters, size_max=capacity, n_init=1, random_state=seed, n_jobs=1)
    return model.fit_predict(x.astype(np.float64))


def sse(x: np.ndarray, labels: np.ndarray) -> float:
    return sum(float(np.square(x[labels == k] - x[labels == k].mean(0)).sum()) for k in np.unique(labels))


def measure(cluster: Callable, x: np.ndarray, num_clusters: int, capacity: int, seed: int) -> dict[str, float]:
    """{"level 1" and "leaf": SSE, "level 1 s" and "leaf s": seconds} of one seed."""
    start = time.perf_counter()
    labels = cluster(x, num_clusters, capacity, seed)
    first = time.perf_counter() - start
    result = {"level 1": sse(x, labels), "level 1 s": first, "leaf": 0.0, "leaf s": 0.0}
    for k in np.unique(labels):
        members = x[labels == k]
        start = time.perf_counter()
        leaves = cluster(members, num_clusters, num_clusters, seed)
        result["leaf s"] += time.perf_counter() - start
        result["leaf"] += sse(members, leaves)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("embeddings", help=".npy, float (I + 1, d); row 0 is padding")
    parser.add_argument("--branching", type=int, default=32, help="K")
    parser.add_argument("--capacity", type=int, default=1024, help="items in a cluster of level 1, at most")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each")
    args = parser.parse_args()
    x = np.load(args.embeddings, allow_pickle=False)[1:].astype(np.float64)
    if not -(-len(x) // args.branching) <= args.capacity <= args.branching**2:
        parser.error(f"--capacity must be between {-(-len(x) // args.branching)} and {args.branching**2}")
    print(f"{len(x)} x {x.shape[1]}, K = {args.branching}, capacity {args.capacity}, mean of {args.seeds} seeds")
    rows = {
        name: [measure(cluster, x, args.branching, args.capacity, seed) for seed in range(args.seeds)]
        for name, cluster in {"gid/kmeans.py": balanced_kmeans, "package": package_kmeans}.items()
    }
    means = {name: {key: np.mean([run[key] for run in runs]) for key in runs[0]} for name, runs in rows.items()}
    means["ratio"] = {key: means["gid/kmeans.py"][key] / means["package"][key] for key in means["package"]}
    print(f"{'':<14}" + "".join(f"{key:>12}" for key in means["ratio"]))
    for name, row in means.items():
        print(f"{name:<14}" + "".join(f"{value:>12.4g}" for value in row.values()))


if __name__ == "__main__":
    main()
