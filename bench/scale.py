"""What cluster/plan.py needs to know and no other bench has: a step of LightGCN, and the decoding of a user.

    OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu python -m bench.scale --work runs/phone --config configs/phone.toml

CPU seconds on one thread. LightGCN: forward, backward and Adam's step on random graphs, 3 layers. Decoding: encoder and
beam search for users of <work>/corpus by a model that has not been trained, which takes as long; and h(X_i) of items.
Writes bench/results/scale.json; rows of other shapes that are there already are kept.
"""

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import torch

from bench.train import SHAPES
from contract import config as config_module
from contract.artifacts import git_revision, open_artifact
from contract.config import Cf, Config
from gid.lightgcn import Adjacency, bpr_loss
from gid.tree import GidTree
from trainer import loader
from trainer.beam import beam_search
from trainer.inputs import item_inputs, read_catalog
from trainer.model import ColaRec, model_config

FILE = Path(__file__).parent / "results" / "scale.json"
# Users, items, interactions. The first two fit a CPU's cache.
GRAPHS = [
    (20_000, 10_000, 150_000),
    (20_000, 10_000, 1_000_000),
    (200_000, 50_000, 1_000_000),
    (100_000, 50_000, 4_000_000),
    (300_000, 100_000, 2_000_000),
]
CASES = [("tiny", 100, 256), ("tiny", 20, 512), ("small", 100, 128), ("small", 20, 128)]  # shape, beams, users
STEPS, ITEMS = 5, 1024


def lightgcn_row(num_users: int, num_items: int, num_events: int) -> dict:
    """CPU seconds of a step, the mean of STEPS after one that does not count."""
    cf, rng = Cf(), np.random.default_rng(0)
    pair = np.unique(rng.integers(num_users, size=num_events) * num_items + rng.integers(num_items, size=num_events))
    user, item = pair // num_items, pair % num_items
    adjacency = Adjacency(user, item, num_users, num_items, torch.device("cpu"))
    e0 = (torch.randn(num_users + num_items, cf.dim) * 0.1).requires_grad_()
    optimizer = torch.optim.Adam([e0], lr=cf.lr, fused=True)
    rows = [torch.from_numpy(rng.choice(len(user), cf.batch)) for _ in range(STEPS + 1)]
    for number, row in enumerate(rows):
        if number == 1:
            begin = time.process_time()
        users, positives = torch.from_numpy(user)[row], torch.from_numpy(item)[row]
        triples = torch.stack([users, positives, torch.from_numpy(rng.integers(num_items, size=cf.batch))])
        loss = bpr_loss(adjacency, e0, triples, num_users, cf)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    seconds = (time.process_time() - begin) / STEPS
    return {
        "what": "lightgcn step", "users": num_users, "items": num_items, "events": len(user), "dim": cf.dim,
        "layers": cf.num_layers, "batch": cf.batch, "cpu_seconds": seconds,
    }  # fmt: skip


@torch.no_grad()
def decode_row(config: Config, shape: str, beams: int, num_users: int) -> dict:
    """CPU seconds of a user's beam search and of an item's vector, and the encoder positions of both."""
    corpus, gid = open_artifact(config, "corpus"), open_artifact(config, "gid")
    catalog = read_catalog(corpus, gid)
    torch.manual_seed(config.seed)
    model = ColaRec(model_config(config, catalog)).eval()
    tree = GidTree(catalog.gids, config.gid.branching)
    batches = loader.eval_batches(config, catalog, corpus, "test", config.eval.batch, 0, 1)
    users, positions, begin = 0, 0, time.process_time()
    for batch in batches:
        beam_search(model, tree, batch["user"], beams, 20, batch["seen_row"], batch["seen_item"])
        users, positions = users + len(batch["user_idx"]), positions + int(batch["user"]["mask"].sum())
        if users >= num_users:
            break
    seconds = time.process_time() - begin
    inputs = loader.to_tensors(item_inputs(config, catalog, np.arange(1, ITEMS + 1), key=1))
    begin = time.process_time()
    model.encode(inputs)
    item_seconds = (time.process_time() - begin) / ITEMS
    names = ("d_model", "d_ff", "d_kv", "num_heads", "num_encoder_layers", "num_decoder_layers")
    sizes = {name: getattr(model.config, name) for name in (*names, "gid_length", "branching")}
    return {
        "what": "decode", "data": config.name, "shape": shape, "model": sizes, "beams": beams, "users": users,
        "positions_per_user": positions / users, "cpu_seconds_per_user": seconds / users,
        "positions_per_item": int(inputs["mask"].sum()) / ITEMS, "cpu_seconds_per_item": item_seconds,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--work", required=True, help="folder with corpus/ and gid/")
    args = parser.parse_args()
    rows = [lightgcn_row(*graph) for graph in GRAPHS]
    for shape, beams, users in CASES:
        overrides = {"work": args.work, "eval.batch": "128"} | SHAPES[shape]
        rows.append(decode_row(config_module.load(args.config, overrides), shape, beams, users))
    save(rows)


def save(rows: list[dict]) -> None:
    """Merges the rows into scale.json."""
    stamp = {"load": os.getloadavg()[0], "date": time.strftime("%Y-%m-%d"), "revision": git_revision()}
    old = json.loads(FILE.read_text()) if FILE.exists() else []
    merged = {_key(row): row for row in old} | {_key(row): row | stamp for row in rows}
    print(*rows, sep="\n")
    FILE.write_text(json.dumps([merged[key] for key in sorted(merged)], indent=1) + "\n")


def _key(row: dict) -> tuple[str, ...]:
    names = ("what", "users", "items", "events") if "dim" in row else ("what", "data", "shape", "beams")
    return tuple(str(row[name]) for name in names)


if __name__ == "__main__":
    main()
