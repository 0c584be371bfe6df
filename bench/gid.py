"""Balanced k-means of gid/ against k-means-constrained and plain FAISS k-means, and whole trees, in one run.

    pip install k-means-constrained
    export OMP_NUM_THREADS=1
    python -m bench.gid --sizes 2000,10000,100000,1000000 --embeddings runs/phone/gid/item_embeddings.npy
    python -m bench.gid --tree-sizes 1000000,10000000

Splits: one node into K = 32 clusters, at the capacity of the paper (K^(l-1)) and at a tight one (n / K, 1% to spare),
on a skewed mixture (500 blobs, Zipf sizes, axes of decaying variance) and on --embeddings. k-means-constrained runs
with as many starts as --starts, each alone, up to --package-items; FAISS's k-means knows no capacity: its SSE is the
lower bound. SSE is the sum of squared distances to the cluster's mean; time is CPU time on one thread.

Trees: the whole tree, K = 32, l by gid.slack, with a process per core; wall time, and the peak memory of this process
and of its largest worker, each in processes of their own. Beside it the alignment of its codes, which runs on one core.

Writes bench/results/gid.{json,md}. Rows of other sizes that are there already are kept.
"""

import argparse
import json
import os
import resource
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from contract.artifacts import git_revision
from gid.hierarchy import build_tree, cluster_sse, gid_length, prefix_of
from gid.kmeans import balanced_kmeans

RESULTS = Path(__file__).parent / "results"
BRANCHING, DIM, SLACK, HEADROOM = 32, 64, 1.25, 0.75
SEEDS = 5  # runs of ours and of FAISS, of which the mean is shown


def mixture(num_items: int, seed: int = 0) -> np.ndarray:
    """float32 (n, DIM): blobs of Zipf sizes whose axes have decaying variance, as those of CF embeddings do."""
    rng = np.random.default_rng(seed)
    scale, weight = (1 + np.arange(DIM)) ** -0.5, 1 / (1 + np.arange(500))
    centres = rng.normal(size=(len(weight), DIM))
    x = np.empty((num_items, DIM), np.float32)
    for start in range(0, num_items, 1 << 18):
        blob = rng.choice(len(weight), min(1 << 18, num_items - start), p=weight / weight.sum())
        x[start : start + len(blob)] = (centres[blob] + 0.5 * rng.normal(size=(len(blob), DIM))) * scale
    return x


def ours(x: np.ndarray, capacity: int, seed: int) -> np.ndarray:
    return balanced_kmeans(x, BRANCHING, capacity, seed)


def package(x: np.ndarray, capacity: int, seed: int) -> np.ndarray:
    from k_means_constrained import KMeansConstrained

    model = KMeansConstrained(BRANCHING, size_max=capacity, n_init=1, random_state=seed, n_jobs=1)
    return model.fit_predict(x.astype(np.float64))


def plain_faiss(x: np.ndarray, capacity: int, seed: int) -> np.ndarray:
    import faiss

    model = faiss.Kmeans(x.shape[1], BRANCHING, niter=25, seed=seed + 1, max_points_per_centroid=2048)
    model.train(x)
    return model.index.search(x, 1)[1][:, 0]


def measure(name: str, x: np.ndarray, cluster: Callable, capacity: int, starts: int) -> dict:
    """Starts of one method: SSEs and CPU seconds of each, and the peak memory above that of the data."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    row = {"method": name, "sse": [], "seconds": []}
    for seed in range(starts):
        begin = time.process_time()
        labels = cluster(x, capacity, seed)
        row["seconds"].append(time.process_time() - begin)
        row["sse"].append(cluster_sse(x, labels[:, None], 1))
    row["peak_mb"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    row["largest"] = int(np.bincount(labels).max())
    return row


def split_rows(data: str, x: np.ndarray, package_items: int, starts: int) -> list[dict]:
    """All methods at both capacities, each in a process of its own, for its memory."""
    length = gid_length(len(x), BRANCHING, 1)
    rows = []
    for kind, capacity in {
        "paper": BRANCHING ** (length - 1),
        "tight": int(np.ceil(1.01 * len(x) / BRANCHING)),
    }.items():
        methods = {"ours": (ours, SEEDS), "FAISS, no capacity": (plain_faiss, SEEDS)}
        if len(x) <= package_items:
            methods["k-means-constrained"] = (package, starts)
        for name, (cluster, times) in methods.items():
            with get_context("spawn").Pool(1) as alone:
                row = alone.apply(measure, (name, x, cluster, capacity, times))
            rows.append({"data": data, "items": len(x), "capacity": capacity, "kind": kind} | row)
            print({k: v for k, v in rows[-1].items() if k not in ("sse", "seconds")}, np.mean(row["sse"]), flush=True)
    return rows


def tree_row(num_items: int, device: str) -> dict:
    """A whole tree, measured in a process of its own."""
    x = mixture(num_items)
    data_gb = x.nbytes / 2**30
    length, begin, cpu = gid_length(num_items, BRANCHING, SLACK), time.monotonic(), sum(os.times()[:4])
    gids = build_tree(x, BRANCHING, length, HEADROOM, seed=0, device=device)
    seconds, cpu = time.monotonic() - begin, sum(os.times()[:4]) - cpu
    peak = [resource.getrusage(who).ru_maxrss / 2**20 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    sizes = [np.bincount(prefix_of(gids, level)) for level in range(1, length + 1)]
    assert len(sizes[-1]) == num_items
    return {
        "items": num_items,
        "device": device_name(device),
        "length": length,
        "seconds": seconds,
        "cpu_seconds": cpu,
        "embeddings_gb": data_gb,
        "peak_gb": peak[0],
        "worker_peak_gb": peak[1],
        "largest": [int(s.max()) for s in sizes[:-1]],
        "load": os.getloadavg()[0],
        "cores": len(os.sched_getaffinity(0)),
    }


def device_name(device: str) -> str:
    """What searches the large nodes, in words."""
    if device == "cpu":
        return "CPU"
    import torch

    return f"{torch.cuda.get_device_name()}, {'FAISS' if device == 'faiss-gpu' else 'torch'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--embeddings", default="", help=".npy, float (I + 1, d); row 0 is padding")
    parser.add_argument("--sizes", default="", help="items of the mixtures to split, separated by commas")
    parser.add_argument("--tree-sizes", default="", help="items of the trees, separated by commas")
    parser.add_argument("--tree-devices", default="cpu", help="of cpu, cuda (torch), faiss-gpu, separated by commas")
    parser.add_argument("--package-items", type=int, default=10_500, help="k-means-constrained sees at most so many")
    parser.add_argument("--starts", type=int, default=10, help="starts of k-means-constrained")
    args = parser.parse_args()
    if args.embeddings:
        x = np.load(args.embeddings, allow_pickle=False)[1:]
        save(split_rows(Path(args.embeddings).parents[1].name, x, args.package_items, args.starts), [])
    for size in filter(None, args.sizes.split(",")):
        save(split_rows("mixture", mixture(int(size)), args.package_items, args.starts), [])
    for size in filter(None, args.tree_sizes.split(",")):
        for device in args.tree_devices.split(","):
            row = _alone(tree_row, int(size), device)
            print(row, flush=True)
            save([], [row])
    print((RESULTS / "gid.md").read_text())


def _alone(work: Callable, *arguments):
    """Runs in a process that may have processes of its own, unlike those of a Pool."""
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, work, arguments))
    process.start()
    sender.close()
    result = receiver.recv()
    process.join()
    return result


def _send(sender, work: Callable, arguments: tuple) -> None:
    sender.send(work(*arguments))


def save(splits: list[dict], trees: list[dict]) -> None:
    """Merges the rows into gid.json and writes gid.md from it."""
    file = RESULTS / "gid.json"
    old = json.loads(file.read_text()) if file.exists() else {"splits": [], "trees": []}
    names = ("data", "items", "capacity", "method", "device", "cores")
    key = lambda row: tuple(row.get(name, 0 if name in ("capacity", "cores") else "") for name in names)  # noqa: E731
    for name, rows in {"splits": splits, "trees": trees}.items():
        for row in rows:
            row["revision"] = git_revision()
        merged = {key(row): row for row in old[name]} | {key(row): row for row in rows}
        old[name] = [merged[k] for k in sorted(merged)]
    file.write_text(json.dumps(old, indent=1) + "\n")
    (RESULTS / "gid.md").write_text(markdown(**old))


def markdown(splits: list[dict], trees: list[dict]) -> str:
    lines = ["# Balanced k-means", "", "One node into 32 clusters; SSE over that of k-means-constrained.", ""]
    lines += ["| data | items | capacity | method | SSE | / its mean | / its best | CPU s | its starts / s | MB |"]
    lines += ["|---" * 10 + "|"]
    peers = {_case(row): row for row in splits if row["method"] == "k-means-constrained"}
    for row in splits:
        peer, sse, seconds = peers.get(_case(row)), np.mean(row["sse"]), np.mean(row["seconds"])
        ratios = ["", "", ""]
        if peer:
            ratios = [f"{sse / np.mean(peer['sse']):.4f}", f"{sse / min(peer['sse']):.4f}"]
            ratios.append("" if row is peer else f"{sum(peer['seconds']) / seconds:.0f}")
        cells = [row["data"], f"{row['items']:,}", f"{row['capacity']:,}", row["method"], f"{sse:.6g}", *ratios[:2]]
        cells += [f"{seconds:.3g}", ratios[2], f"{row['peak_mb']:.0f}" if "peak_mb" in row else ""]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "Its starts / s: CPU seconds of all its starts (10) over ours. MB: peak above that of the data.", ""]
    lines += [
        "# Whole trees, K = 32",
        "",
        "| items | large nodes on | l | s | CPU s | embeddings GB | peak GB | worker's peak GB | load | cores |",
    ]
    lines += ["|---" * 10 + "|"]
    for row in trees:
        cells = [
            f"{row['items']:,}",
            row.get("device", "CPU"),
            row["length"],
            f"{row['seconds']:.1f}",
            f"{row['cpu_seconds']:.1f}",
            f"{row['embeddings_gb']:.2f}",
        ]
        cells += [f"{row['peak_gb']:.2f}", f"{row['worker_peak_gb']:.2f}", f"{row['load']:.1f}", row["cores"]]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def _case(row: dict) -> tuple:
    return row["data"], row["items"], row["capacity"]


if __name__ == "__main__":
    main()
