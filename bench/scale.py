"""What cluster/plan.py needs to know and no other bench has.

    OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu python -m bench.scale --work runs/phone --config configs/phone.toml
    OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu python -m bench.scale --work runs/demo --config configs/demo.toml --only train

CPU seconds on one thread. LightGCN: forward, backward and Adam's step on random graphs, 3 layers. Training: steps of
the trainer's own loop with the config as it is, and in variants. Decoding: encoder and beam search for users of
<work>/corpus by a model that has not been trained, which takes as long; and h(X_i) of items. Hybrid: all that ranks the
items of a user, likewise. Vectors, all random: exact search for the nearest items.
Neighbours, of random interactions: in memory, and by Spark, with all of its processes (nothing else should run there).
Writes bench/results/scale.json; rows of other data and shapes that are there already are kept.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from bench.etl import cpu_seconds, process_tree
from bench.train import SHAPES, measure_ours
from contract import config as config_module
from contract import schema
from contract.artifacts import git_revision, open_artifact
from contract.settings import Cf, Config
from contract.spark import spark_session
from gid import cooccurrence, neighbours
from gid.lightgcn import Adjacency, bpr_loss
from gid.tree import GidTree
from trainer import dense, loader, packing
from trainer.beam import beam_search
from trainer.inputs import item_inputs, read_catalog
from trainer.model import ColaRec, model_config
from trainer.recommender import Recommender

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
PARTS = ("lightgcn", "train", "decode", "hybrid", "vectors", "neighbours")
# Settings of training beside the config's own; steps of each.
FULL = {"history.attention": "full", "history.user_slots": "2", "loss.contrastive": "0.1"}
TRAININGS = {"as it is": {}, "large batch": {"train.global_batch": "1024"}, "full": FULL}
TRAIN_STEPS = 20


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


def search_row(num_items: int, num_users: int = 256, width: int = 64, count: int = 120) -> dict:
    """CPU seconds of the exact search for the `count` items nearest to each user."""
    rng = np.random.default_rng(0)
    items, users = (rng.standard_normal((n, width), dtype=np.float32) for n in (num_items, num_users))
    index = dense.Index(torch.from_numpy(items), np.arange(1, num_items + 1), num_items)
    begin = time.process_time()
    index.search(torch.from_numpy(users), count)
    seconds = time.process_time() - begin
    return {"what": "search", "items": num_items, "users": num_users, "width": width, "cpu_seconds": seconds}


def neighbours_rows(num_users: int, num_items: int, mean: int) -> list[dict]:
    """CPU seconds of finding 100 neighbours of each item, in memory and by Spark; items have a Zipf popularity.
    `entries`, what Spark multiplies: for each user that is drawn for an item, the items of the user."""
    rng = np.random.default_rng(0)
    popularity = 1 / np.arange(10, num_items + 10)
    item = rng.choice(num_items, num_users * mean, p=popularity / popularity.sum())
    pair = np.unique(rng.integers(num_users, size=len(item)) * num_items + item)
    user, item = pair // num_items + 1, pair % num_items + 1
    row = {"what": "neighbours", "users": num_users, "items": num_items, "events": len(user)}
    begin = time.process_time()
    neighbours.find(user, item, num_users, num_items, 100)
    rows = [row | {"who": "memory", "cpu_seconds": time.process_time() - begin}]
    of_user, of_item = np.bincount(user), np.bincount(item)
    share = np.minimum(1, cooccurrence.MAX_USERS / np.maximum(of_item, 1))[item]
    entries = float((share * np.minimum(of_user, cooccurrence.MAX_ITEMS)[user]).sum())
    with tempfile.TemporaryDirectory() as folder, spark_session("bench", "contract", "gid") as spark:
        corpus = Path(folder)
        (corpus / "interactions").mkdir()
        zeros = np.zeros(len(user), np.int8)
        columns = dict(zip(schema.INTERACTIONS.names, [user, item, zeros, zeros, zeros + schema.TRAIN], strict=True))
        table = pa.table(columns, schema.INTERACTIONS)
        pq.write_table(table, corpus / "interactions" / "part-0.parquet", row_group_size=1 << 18)
        before = _tree_seconds()
        cooccurrence.write(spark, corpus, num_items, 100, corpus)
        seconds = _tree_seconds() - before
    return [*rows, row | {"who": "spark", "entries": entries, "cpu_seconds": seconds}]


def _tree_seconds() -> float:
    return sum(map(cpu_seconds, process_tree(os.getpid())))


def train_row(file: str, work: str, variant: str) -> dict:
    """CPU seconds of a step of training, its encoder positions and FLOPs, and the memory of its process."""
    with get_context("spawn").Pool(1) as alone:
        return alone.apply(_train_row, (file, {"work": work} | TRAININGS[variant], variant))


def _train_row(file: str, overrides: dict[str, str], variant: str) -> dict:
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for the life of the process)
    config = config_module.load(file, overrides)
    row, batch = measure_ours(config, TRAIN_STEPS), config.train.global_batch
    counts = open_artifact(config, "corpus").counts
    settings = config_module.section(config, "history", "model", "loss")
    settings |= {"train.global_batch": batch, "train.negatives": config.train.negatives}
    return {
        "what": "train", "data": config.name, "variant": variant, "settings": settings, "users": counts["num_users"],
        "items": counts["num_items"], "events": counts["num_train"], "steps": TRAIN_STEPS,
        "cpu_seconds": batch / row["samples_per_cpu_s"],
        "positions": row["tokens_per_s"] / row["samples_per_s"] * batch, "padding": row["padding"],
        "flops": row["tflops"] * 1e12 / row["samples_per_s"] * batch, "peak_gb": row["peak_gb"],
    }  # fmt: skip


@torch.no_grad()
def decode_row(config: Config, shape: str, beams: int, num_users: int) -> dict:
    """CPU seconds of a user's beam search and of an item's vector, and the encoder positions of both."""
    corpus, gid = open_artifact(config, "corpus"), open_artifact(config, "gid")
    catalog = read_catalog(corpus, gid)
    torch.manual_seed(config.seed)
    model = ColaRec(model_config(config, catalog)).eval()
    tree, v_ID = GidTree(catalog.gids, config.gid.branching), None
    if model.config.leaves_are_items:
        every = np.arange(catalog.num_items + 1)
        v_ID = dense.item_vectors(config, model, catalog, torch.device("cpu"), every, "v")
    batches = loader.eval_batches(config, catalog, corpus, "test", config.eval.batch, 0, 1)
    users, positions, begin = 0, 0, time.process_time()
    for batch in batches:
        beam_search(model, tree, batch["user"], beams, 20, batch["seen_row"], batch["seen_item"], v_ID=v_ID)
        users, positions = users + len(batch["user_idx"]), positions + int(batch["user"]["mask"].sum())
        if users >= num_users:
            break
    seconds = time.process_time() - begin
    inputs = packing.to_tensors(item_inputs(config, catalog, np.arange(1, ITEMS + 1), key=1))
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


@torch.no_grad()
def hybrid_row(config: Config, num_users: int = 512) -> dict:
    """CPU seconds of ranking a user's items by the hybrid, with the config as it is."""
    corpus, gid = open_artifact(config, "corpus"), open_artifact(config, "gid")
    catalog = read_catalog(corpus, gid)
    torch.manual_seed(config.seed)
    model = ColaRec(model_config(config, catalog)).eval()
    recommender = Recommender(config, catalog, model, torch.device("cpu"))
    users, begin = 0, time.process_time()
    for batch in loader.eval_batches(config, catalog, corpus, "test", config.eval.batch, 0, 1):
        recommender.recommend(batch, max(config.eval.cutoffs))
        users += len(batch["user_idx"])
        if users >= num_users:
            break
    seconds = (time.process_time() - begin) / users
    return {
        "what": "hybrid", "data": config.name, "neighbours": config.eval.neighbours,
        "beams": config.eval.beams, "users": corpus.counts["num_users"],
        "items": catalog.num_items, "events": corpus.counts["num_train"], "cpu_seconds_per_user": seconds,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--work", required=True, help="folder with corpus/ and gid/")
    parser.add_argument("--only", choices=PARTS, help="one of these")
    args = parser.parse_args()
    rows = []
    if args.only in (None, "lightgcn"):
        rows += [lightgcn_row(*graph) for graph in GRAPHS]
    if args.only in (None, "train"):
        rows += [train_row(args.config, args.work, variant) for variant in TRAININGS]
    if args.only in (None, "decode"):
        for shape, beams, users in CASES:
            overrides = {"work": args.work, "eval.batch": "128"} | SHAPES[shape]
            rows.append(decode_row(config_module.load(args.config, overrides), shape, beams, users))
    if args.only in (None, "hybrid"):
        rows.append(
            hybrid_row(config_module.load(args.config, {"work": args.work, "eval.hybrid": "1", "eval.neighbours": "1"}))
        )
    if args.only in (None, "vectors"):
        rows += [search_row(1_000_000)]
    if args.only in (None, "neighbours"):
        rows += neighbours_rows(200_000, 20_000, 20)
    save(rows)


def save(rows: list[dict]) -> None:
    """Merges the rows into scale.json."""
    stamp = {"load": os.getloadavg()[0], "date": time.strftime("%Y-%m-%d"), "revision": git_revision()}
    old = json.loads(FILE.read_text()) if FILE.exists() else []
    merged = {_key(row): row for row in old} | {_key(row): row | stamp for row in rows}
    print(*rows, sep="\n")
    FILE.write_text(json.dumps([merged[key] for key in sorted(merged)], indent=1) + "\n")


def _key(row: dict) -> tuple[str, ...]:
    names = {"train": ("data", "variant"), "decode": ("data", "shape", "beams")}
    names |= {
        "lightgcn step": ("users", "items", "events"),
        "search": ("items",),
        "neighbours": ("who", "users", "items"),
        "hybrid": ("data",),
    }
    return (row["what"], *(str(row[name]) for name in names[row["what"]]))


if __name__ == "__main__":
    main()
