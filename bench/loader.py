"""The loader alone: training samples per second, and the padding of its batches, by encoding, batch and workers.

    OMP_NUM_THREADS=1 python -m bench.loader --config configs/phone.toml configs/beauty.toml

Reads <work>/corpus and <work>/gid of each config (--runs: the folder of the work folders, if not as configured). The
batches are those of one rank that has the whole global batch, as torch's DataLoader hands them out, on the CPU and not
pinned. 'causal' is the defaults, where a sample is a history with a target after every item; in the others it is a set
of items and its one target, with the items that the losses of the paper take, and two users for each of these: 'pooled'
has a position for each of 20 items, 'tokens' is the shape of the paper: 10 history items, 256 positions at most, 8
length groups.

samples/s goes by the clock. samples/CPU-s goes by the CPU time of all processes of the loader, the start of the workers
and the reading of their first shards included; on a busy machine it is the figure to trust. Padding is the share of
encoder positions, users and items together, that hold no token; of one group is what it would be if every row were as
wide as the longest of its batch. Writes bench/results/loader.{json,md}.
"""

import argparse
import json
import os
import resource
import time
from pathlib import Path

import torch

from bench.train import PAPER, TOKENS
from contract import config as config_module
from contract.artifacts import git_revision, open_artifact
from contract.settings import Config
from trainer import loader, packing
from trainer.inputs import Catalog, read_catalog

RESULTS = Path(__file__).parent / "results"
ENCODINGS = {
    "causal": {},
    "pooled": PAPER | {"history.encoding": "pooled"},
    "tokens": TOKENS | {"train.length_groups": "8"},
}
BATCHES, WORKERS = (128, 1024), (0, 1, 2)


def cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def measure(
    name: str, config: Config, shards: list[str], catalog: Catalog, epoch_steps: int, workers: int, samples: int
) -> dict:
    num_steps = -(-samples // config.train.global_batch)
    data = loader.TrainBatches(config, catalog, shards, 0, 1, range(num_steps), epoch_steps)
    steps = torch.utils.data.DataLoader(data, batch_size=None, collate_fn=packing.pack, num_workers=workers)
    cpu, batches = cpu_seconds(), (packing.unpack(step, torch.device("cpu")) for step in steps)
    next(batches)  # shards are open and workers run
    start = time.monotonic()
    counts = [(b["num_tokens"], b["num_positions"], rectangle(b)) for micros in batches for b in micros]
    seconds = time.monotonic() - start
    del batches  # joins the workers, so that their time is known
    cpu = cpu_seconds() - cpu
    num_tokens, num_positions, unsorted = (sum(column) for column in zip(*counts, strict=True))
    share = (num_steps - 1) / num_steps
    return {
        "config": config.name,
        "encoding": name,
        "batch": config.train.global_batch,
        "workers": workers,
        "samples/s": share * num_steps * config.train.global_batch / seconds,
        "samples/CPU-s": num_steps * config.train.global_batch / cpu,
        "tokens/CPU-s": num_tokens / share / cpu,
        "padding": 1 - num_tokens / num_positions,
        "padding of one group": 1 - num_tokens / unsorted,
    }


def rectangle(batch: dict) -> int:
    """Positions of a batch whose rows are all as wide as the longest of their side."""
    return sum(batch[side]["mask"].numel() for side in ("user", "item"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", nargs="+", required=True)
    parser.add_argument("--runs", default="", help="folder that holds a work folder by the name of each config")
    parser.add_argument("--samples", type=int, default=100_000, help="of each measurement")
    args = parser.parse_args()
    rows = []
    for path in args.config:
        for name, encoding in ENCODINGS.items():
            for batch in BATCHES:
                changes = encoding | {"train.global_batch": str(batch), "train.micro_tokens": "0"}
                changes |= {"work": f"{args.runs}/{Path(path).stem}"} if args.runs else {}
                config = config_module.load(path, changes)
                corpus, gid = open_artifact(config, "corpus"), open_artifact(config, "gid")
                shards, catalog = loader.shard_paths(corpus, "train"), read_catalog(corpus, gid)
                epoch_steps = loader.steps_per_epoch(config, corpus)
                for workers in WORKERS:
                    rows.append(measure(name, config, shards, catalog, epoch_steps, workers, args.samples))
                    print(rows[-1], flush=True)
    report(rows)


def report(rows: list[dict]) -> None:
    names = list(rows[0])
    lines = [
        f"The loader alone, see bench/loader.py; {os.cpu_count()} cores, threads a process: {torch.get_num_threads()}; "
        f"revision {git_revision()}",
        "",
        "| " + " | ".join(names) + " |",
        "|" + "---|" * len(names),
    ]
    for row in rows:
        cells = [f"{value:.1%}" if "padding" in name else _number(value) for name, value in row.items()]
        lines.append("| " + " | ".join(cells) + " |")
    text = "\n".join(lines) + "\n"
    (RESULTS / "loader.md").write_text(text)
    (RESULTS / "loader.json").write_text(json.dumps({"revision": git_revision(), "rows": rows}, indent=1) + "\n")
    print(text)


def _number(value) -> str:
    return f"{value:,.0f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
