"""Speed of training: samples/s, tokens/s, MFU, memory and loader share per ZeRO stage and precision, beside a peer.

    OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu python -m bench.train --work runs/phone --config configs/phone.toml
    python -m bench.train --work runs/phone --config configs/phone.toml --shapes official,base --peer --steps 50

Reads <work>/corpus and <work>/gid. Every row is a process of its own, one after the other, on one device. `--peer` is
the official training loop (bench/train_peer.py), in float32 as that trains, beside the shapes that train what it does:
a sample is a set of items and its one target, attention goes both ways, losses and user slots are the paper's. The
shape 'default' is the config as it is, where a sample is a whole history with a target after every item, so that it has
no peer; targets/s compares it with the others.

Seconds are wall time; on a CPU that others use as well, look at what is per CPU second, and at the load average beside
it. Tokens are encoder positions without padding. MFU is of the peak that trainer/flops.py lists; on a CPU, whose peak
nobody states, of the matrix product measured in the same process.
Writes bench/results/train.{json,md}; rows of other devices and shapes that are there already are kept.
"""

import argparse
import dataclasses
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from multiprocessing import get_context
from pathlib import Path

import torch

from contract import config as config_module
from contract.artifacts import git_revision, open_artifact
from contract.cli import Progress
from contract.settings import Config
from contract.tracking import Run

RESULTS = Path(__file__).parent / "results"
PAPER = {
    "model.codebooks": "level",
    "history.attention": "full",
    "history.order": "set",
    "history.user_slots": "2",
    "loss.rec": "0.08",
    "loss.index": "0.08",
    "loss.bpr": "1",
    "loss.softmax": "0",
    "loss.contrastive": "0.1",
}
TOKENS = PAPER | {"history.encoding": "tokens", "history.max_tokens": "256", "history.train_items": "10"}
LAYERS = ("d_model", "d_ff", "d_kv", "num_heads", "num_encoder_layers", "num_decoder_layers")
SHAPES = {
    "default": {},
    "tiny": PAPER | {"history.encoding": "pooled"},
    "small": TOKENS | {f"model.{k}": v for k, v in zip(LAYERS, ("128", "512", "32", "4", "4", "4"), strict=True)},
    "official": TOKENS | {f"model.{k}": v for k, v in zip(LAYERS, ("512", "2048", "64", "8", "6", "6"), strict=True)},
    "base": TOKENS | {f"model.{k}": v for k, v in zip(LAYERS, ("768", "3072", "64", "12", "12", "12"), strict=True)},
}


def measure_ours(config: Config, num_steps: int) -> dict:
    """Steps of the trainer itself, after one that does not count."""
    from trainer import distributed
    from trainer.checkpoint import Checkpoints
    from trainer.inputs import read_catalog
    from trainer.main import build_model
    from trainer.tables import Shard
    from trainer.training import Training, Window

    corpus, gid = open_artifact(config, "corpus"), open_artifact(config, "gid")
    catalog, progress = read_catalog(corpus, gid), Progress("bench")
    with distributed.process_group() as (_, world_size, device):
        torch.manual_seed(config.seed)
        model = build_model(config, catalog, gid, Shard(0, world_size), progress)
        engine = distributed.initialize(config, model, world_size, device)
        with tempfile.TemporaryDirectory() as folder:
            checkpoints = Checkpoints(dataclasses.replace(config, work=folder), {})
            training = Training(config, corpus, catalog, engine, checkpoints, Run(), progress)
        num_targets = []  # of each step
        batches = _counting_targets(training.batches(), num_targets)
        training.step(batches, Window(device))
        window, cpu = Window(device), time.process_time()
        _synchronize(device)
        window.start = time.monotonic()
        for _ in range(num_steps):
            training.step(batches, window)
        _synchronize(device)
        seconds, cpu = window.seconds(), time.process_time() - cpu
        means = window.means()
        flops = means["flops"] / seconds
        return _row(config, device, num_steps, seconds, cpu) | {
            "targets_per_s": sum(num_targets[1:]) / seconds,
            "tokens_per_s": means["tokens"] / seconds,
            "padding": 1 - means["tokens"] / means["positions"],
            "loader_share": means["loader_seconds"] / seconds,
            "tflops": flops / 1e12,
            "mfu": flops / _peak(device, distributed.uses_bf16(config, device), seconds / cpu),
        }


def _counting_targets(steps: Iterable, num_targets: list[int]) -> Iterator:
    for packed in steps:
        num_targets.append(sum(micro["lengths"]["decoded user"][0] for micro in packed.layout))
        yield packed


def measure_peer(config: Config, num_steps: int) -> dict:
    from bench.train_peer import Peer, PeerBatches
    from trainer.inputs import read_catalog
    from trainer.model import model_config

    corpus, gid = open_artifact(config, "corpus"), open_artifact(config, "gid")
    catalog = read_catalog(corpus, gid)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(config.seed)
    model = Peer(model_config(config, catalog)).to(device)
    optimizer, batches = torch.optim.AdamW(model.parameters(), lr=5e-4), iter(PeerBatches(config, corpus, catalog))
    weights, counts = config.loss.weights, torch.zeros(2)

    def step() -> None:
        batch = next(batches)
        masks = [part["mask"] for name, part in batch.items() if name != "gid"]
        counts.add_(torch.tensor([sum(int(mask.sum()) for mask in masks), sum(mask.numel() for mask in masks)]))
        batch = {name: {k: v.to(device) for k, v in part.items()} for name, part in batch.items()}
        optimizer.zero_grad()
        model(batch, weights).backward()
        optimizer.step()

    step()
    _synchronize(device)
    counts.zero_()
    begin, cpu = time.monotonic(), time.process_time()
    for _ in range(num_steps):
        step()
    _synchronize(device)
    seconds, cpu = time.monotonic() - begin, time.process_time() - cpu
    tokens, positions = counts.tolist()
    row = _row(config, device, num_steps, seconds, cpu)
    return row | {"tokens_per_s": tokens / seconds, "padding": 1 - tokens / positions}


def _row(config: Config, device: torch.device, num_steps: int, seconds: float, cpu: float) -> dict:
    on_gpu = device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    num_samples = num_steps * config.train.global_batch
    return {
        "device": torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} thread",
        "batch": config.train.global_batch,
        "samples_per_s": num_samples / seconds,
        "samples_per_cpu_s": num_samples / cpu,
        "peak_gb": peak / 1e9,
        "load": os.getloadavg()[0],
    }


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _peak(device: torch.device, bf16: bool, wall_per_cpu: float) -> float:
    """FLOP/s: the listed peak of a GPU; of a CPU that of a large product, at the share of it that this process got."""
    from trainer.flops import peak_flops

    if listed := peak_flops(device):
        return listed
    a = torch.randn(2048, 2048, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
    a @ a
    _synchronize(device)
    begin, cpu = time.monotonic(), time.process_time()
    for _ in range(10):
        a @ a
    _synchronize(device)
    busy = time.process_time() - cpu if device.type == "cpu" else time.monotonic() - begin
    return 10 * 2 * 2048**3 / busy / (wall_per_cpu if device.type == "cpu" else 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--work", required=True, help="folder with corpus/ and gid/")
    parser.add_argument("--shapes", default="tiny", help=f"of {', '.join(SHAPES)}, separated by commas")
    parser.add_argument("--stages", default="1", help="ZeRO stages, separated by commas")
    parser.add_argument("--precisions", default="fp32,bf16", help="separated by commas")
    parser.add_argument("--steps", type=int, default=3, help="steps that count")
    parser.add_argument("--batch", type=int, default=128, help="samples per step")
    parser.add_argument("--peer", action="store_true", help="the official training loop as well, where it is one")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of ours")
    args = parser.parse_args()
    for shape in args.shapes.split(","):
        if args.peer and shape != "default":
            save([_alone(args, shape, "peer", {})])
        for stage in args.stages.split(","):
            for precision in args.precisions.split(","):
                if (stage, precision) != ("0", "bf16"):
                    save([_alone(args, shape, "ours", {"train.zero_stage": stage, "train.precision": precision})])
    print((RESULTS / "train.md").read_text())


def _alone(args: argparse.Namespace, shape: str, who: str, settings: dict[str, str]) -> dict:
    """One row, in a process of its own for its memory."""
    given = dict(text.split("=", 1) for text in args.set) if who == "ours" else {}
    overrides = {"work": args.work, "train.global_batch": str(args.batch)} | SHAPES[shape] | settings | given
    with get_context("spawn").Pool(1) as alone:
        row = alone.apply(_measure, (args.config, overrides, who, args.steps))
    row = {"shape": shape, "who": who} | settings | {"set": " ".join(args.set) if given else ""} | row
    print(json.dumps(row), flush=True)
    return row


def _measure(file: str, overrides: dict[str, str], who: str, num_steps: int) -> dict:
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for the life of the process)
    config = config_module.load(file, overrides)
    return (measure_peer if who == "peer" else measure_ours)(config, num_steps)


def save(rows: list[dict]) -> None:
    """Merges the rows into train.json and writes train.md from it."""
    file = RESULTS / "train.json"
    old = json.loads(file.read_text()) if file.exists() else []
    stamp = {"revision": git_revision(), "date": time.strftime("%Y-%m-%d")}
    merged = {_key(row): row for row in old} | {_key(row): row | stamp for row in rows}
    rows = [merged[key] for key in sorted(merged)]
    file.write_text(json.dumps(rows, indent=1) + "\n")
    (RESULTS / "train.md").write_text(markdown(rows))


def _key(row: dict) -> tuple[str, ...]:
    names = ("device", "shape", "batch", "who", "train.zero_stage", "train.precision", "set")
    return tuple(str(row.get(name, "")) for name in names)


def markdown(rows: list[dict]) -> str:
    lines = ["# Speed of training", "", "Command, meaning of the columns: bench/train.py.", ""]
    head = ["device", "shape", "batch", "loop", "samples/s", "targets/s", "samples/CPU-s", "targets/CPU-s"]
    head += ["over the peer", "tokens/s", "padding", "MFU", "peak GB", "loader share", "load", "date"]
    lines += ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    peers = {_case(row): row for row in rows if row["who"] == "peer"}
    for row in rows:
        peer, on_gpu = peers.get(_case(row)), not row["device"].startswith("CPU")
        unit = "samples_per_s" if on_gpu else "samples_per_cpu_s"
        loop = "official" if row["who"] == "peer" else f"ZeRO {row['train.zero_stage']}, {row['train.precision']}"
        targets = row.get("targets_per_s", row["samples_per_s"])  # a sample of the peer is a target
        per_sample = targets / row["samples_per_s"]
        cells = [row["device"], row["shape"], row["batch"], f"{loop} {row['set']}".strip()]
        cells += [f"{row['samples_per_s']:.4g}", f"{targets:.4g}"]
        cells += ["", ""] if on_gpu else [f"{row['samples_per_cpu_s'] * n:.4g}" for n in (1, per_sample)]
        cells += [f"{row[unit] / peer[unit]:.2f}" if peer else ""]
        cells += [f"{row['tokens_per_s']:.4g}", f"{row['padding']:.1%}"]
        cells += [f"{row['mfu']:.1%}" if "mfu" in row else "", f"{row['peak_gb']:.1f}"]
        cells += [f"{row['loader_share']:.1%}" if "loader_share" in row else ""]
        cells += [f"{row['load']:.1f}" if "load" in row else "", row["date"]]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def _case(row: dict) -> tuple:
    return row["device"], row["shape"], row["batch"]


if __name__ == "__main__":
    main()
