"""Speed of beam search: beside transformers' `generate`, and as beam, GIDs and catalog grow.

    OMP_NUM_THREADS=1 python -m bench.decode
    python -m bench.decode --device cuda --shapes pooled,tokens,official --users 64

Weights, encoder states and trees are random, drawn from a seed: decoding costs the same whatever they say. Both sides
are given the same states and decode the same users one batch after another in the same process; lists of the width of
the beam that differ, as those may whose scores are a rounding apart, are counted. `generate` is asked as one would:
keys and values cached, a prefix tree in Python (bench/decode_peer.py).

On a CPU, time is CPU time of one thread, on a GPU wall time; the least of --repeats, and the load of the machine beside
it. tree MB is the memory of the tree's tables, tree s the CPU time that they took.
Writes bench/results/decode.{json,md}; rows of other devices stay.
"""

import argparse
import json
import os
import time
from collections.abc import Callable

import numpy as np
import torch

from bench.decode_peer import GeneratePeer, PrefixTree, generate
from bench.results import RESULTS, merge, table
from gid.tree import GidTree
from trainer.beam import beam_search
from trainer.model import ColaRec, ColaRecConfig

# Decoder, and positions that the encoder hands to it: 20 items of one position, or the paper's 256 tokens.
SHAPES = {
    "pooled": {"d_model": 64, "d_ff": 256, "d_kv": 16, "num_heads": 4, "num_decoder_layers": 2, "positions": 22},
    "tokens": {"d_model": 64, "d_ff": 256, "d_kv": 16, "num_heads": 4, "num_decoder_layers": 2, "positions": 256},
    "official": {"d_model": 512, "d_ff": 2048, "d_kv": 64, "num_heads": 8, "num_decoder_layers": 6, "positions": 256},
}
BASE = {"shape": "pooled", "codebooks": "prefix", "items": 10_000, "K": 32, "l": 3, "beams": 100}
GROWTH = {
    "beams": [{"beams": n} for n in (10, 50, 100, 200, 500)],
    "l": [{"l": n, "K": 32, "items": 1000} for n in (2, 3, 4, 5)],
    "K": [{"K": n, "l": 3} for n in (32, 64, 128, 256)],
    "items": [
        {"items": 10_000},
        {"items": 100_000, "l": 4},
        {"items": 1_000_000, "l": 5},
        {"items": 10_000_000, "l": 5},
        {"items": 10_000_000, "l": 3, "K": 256},
    ],
}
TITLES = {
    "beams": "the beam grows",
    "l": "GIDs grow longer",
    "K": "the codes of a level grow in number",
    "items": "the catalog grows",
}
KEY = ("device", "growth", "who", "users", *BASE)


def random_gids(num_items: int, branching: int, length: int, seed: int = 0) -> np.ndarray:
    """int64 (I + 1, l): distinct paths in a random order."""
    rng = np.random.default_rng(seed)
    paths = np.zeros(0, np.int64)
    while len(paths) < num_items:
        paths = np.unique(np.concatenate([paths, rng.integers(branching**length, size=num_items)]))
    paths = np.concatenate([[0], rng.permutation(paths)[:num_items]])
    return paths[:, None] // branching ** np.arange(length)[::-1] % branching


def random_model(case: dict) -> tuple[ColaRec, torch.Tensor | None]:
    """A model whose codes differ in probability as those of a trained one do, and v_i where its leaves are items."""
    sizes = {name: size for name, size in SHAPES[case["shape"]].items() if name != "positions"}
    sizes |= {"gid_length": case["l"], "branching": case["K"], "codebooks": case["codebooks"]}
    torch.manual_seed(0)
    model = ColaRec(ColaRecConfig(num_encoder_layers=1, dropout=0.0, **sizes))
    with torch.no_grad():
        for codes in model.parameters_of_codes():
            codes.mul_(30)
        model.start_D.mul_(10)
        model.decoder.final_layer_norm.weight.fill_(1)
    v_ID = torch.randn(case["items"] + 1, sizes["d_model"]) if model.config.leaves_are_items else None
    return model.eval(), v_ID


def random_users(shape: str, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Encoder states (B, L, D) and their mask, histories from half to full length."""
    generator = torch.Generator().manual_seed(1)
    positions, width = SHAPES[shape]["positions"], SHAPES[shape]["d_model"]
    lengths = torch.randint(positions // 2, positions + 1, (count, 1), generator=generator)
    return torch.randn(count, positions, width, generator=generator), torch.arange(positions) < lengths


def seconds(decode: Callable, device: torch.device, repeats: int) -> tuple[torch.Tensor, float]:
    """What it returns, and the least time that it took, after once for nothing."""
    clock = time.process_time if device.type == "cpu" else time.monotonic
    best = float("inf")
    for turn in range(1 + repeats):
        begin = clock()
        found = decode()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, clock() - begin) if turn else best
    return found, best


@torch.no_grad()
def measure(case: dict, users: int, device: torch.device, repeats: int, peer: bool) -> list[dict]:
    """A row of ours and, with `peer`, one of `generate`."""
    gids = random_gids(case["items"], case["K"], case["l"])
    begin = time.process_time()
    tree = GidTree(gids, case["K"])
    facts = {"tree_seconds": time.process_time() - begin, "tree_bytes": tree.num_bytes}
    tree, (model, v) = tree.to(device), random_model(case)
    model, v = model.to(device), None if v is None else v.to(device)
    states, mask = (tensor.to(device) for tensor in random_users(case["shape"], users))
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} thread"
    row = case | {"device": name, "users": users}

    def ours() -> torch.Tensor:
        return beam_search(model, tree, {"mask": mask}, case["beams"], case["beams"], states_BLD=states, v_ID=v)[0]

    items, taken = seconds(ours, device, repeats)
    rows = [row | facts | {"who": "ours", "seconds": taken / users, "load": os.getloadavg()[0]}]
    if peer:
        like, prefixes = GeneratePeer(model, gids, v), PrefixTree(gids)
        theirs, taken = seconds(lambda: generate(like, prefixes, states, mask, case["beams"]), device, repeats)
        differ = int((items.cpu() != theirs).any(1).sum())
        rows.append(row | {"who": "generate", "seconds": taken / users, "load": os.getloadavg()[0], "differ": differ})
    return rows


def markdown(rows: list[dict]) -> str:
    def milliseconds(row: dict) -> str:
        return f"{1e3 * row['seconds']:.3g}"

    text = "# Speed of decoding\n\nCommand, meaning of the columns: bench/decode.py.\n\n"
    text += "Beside transformers' `generate`, the same lists:\n\n"
    cells = []
    pairs = {tuple(row.get(part) for part in KEY if part != "who"): row for row in rows if row["who"] == "generate"}
    for row in rows:
        peer = pairs.get(tuple(row.get(part) for part in KEY if part != "who"))
        if row["who"] == "ours" and peer:
            sizes = [row["shape"], SHAPES[row["shape"]]["positions"], row["codebooks"], f"{row['items']:,}"]
            sizes += [row["beams"], row["users"]]
            speed = [f"{1 / row['seconds']:.3g}", milliseconds(row), milliseconds(peer)]
            cells.append(
                [
                    *(row["device"], *sizes, *speed, f"{peer['seconds'] / row['seconds']:.1f}"),
                    *(peer.get("differ", 0), f"{row['load']:.0f}"),
                ]
            )
    head = ["device", "shape", "positions", "codebooks", "items", "beams", "users", "users/s", "ms/user"]
    text += table([*head, "its ms/user", "ratio", "lists that differ", "load"], cells)
    for what in GROWTH:
        cells = []
        for row in rows:
            if row["growth"] == what:
                sizes = [row["shape"], row["codebooks"], row["users"], row["beams"], row["l"], row["K"]]
                sizes += [f"{row['items']:,}"]
                tree = [f"{row['tree_bytes'] / 1e6:,.1f}", f"{row['tree_seconds']:.2f}"]
                cells.append([row["device"], *sizes, milliseconds(row), *tree, f"{row['load']:.0f}"])
        head = ["device", "shape", "codebooks", "users", "beams", "l", "K", "items", "ms/user", "tree MB", "tree s"]
        text += f"\nAs {TITLES[what]}:\n\n" + table([*head, "load"], cells)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--shapes", default="pooled,tokens", help=f"beside generate: of {', '.join(SHAPES)}, or none")
    parser.add_argument("--growth", default=",".join(GROWTH), help=f"of {', '.join(GROWTH)}, or none")
    parser.add_argument("--users", type=int, default=16, help="decoded at once")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max-items", type=int, default=10_000_000, help="larger catalogs are left out")
    args = parser.parse_args()
    device = torch.device(args.device)
    shapes = [shape for shape in args.shapes.split(",") if shape != "none"]
    cases = [("", {"shape": shape, "codebooks": kind}) for shape in shapes for kind in ("prefix", "level")]
    cases += [(what, change) for what in args.growth.split(",") if what != "none" for change in GROWTH[what]]
    for what, change in cases:
        case = BASE | change | {"growth": what}
        if case["items"] <= args.max_items:
            rows = measure(case, args.users, device, args.repeats, peer=not what)
            print(json.dumps(rows[-1]), flush=True)
            merge("decode", rows, KEY, markdown)
            if rows[-1].get("differ", 0) > 0.1 * args.users:  # more than rounding does
                raise AssertionError(f"{rows[-1]['differ']} of {args.users} lists differ")
    print((RESULTS / "decode.md").read_text())


if __name__ == "__main__":
    main()
