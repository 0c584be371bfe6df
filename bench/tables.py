"""Memory and time of one training step of an embedding table at 1M, 10M and 100M ids, on the CPU.

    OMP_NUM_THREADS=1 python -m bench.tables

Exact and hashed tables (the defaults of the config: 1M rows, 2 functions), under AdamW and under the row-wise Adam of
trainer/tables.py, of 64 and 512 values a row. A step looks up a batch of 1024 users x 20 items, whose ids follow Zipf's
law (exponent 1) and are scattered over the table, takes the gradient of a linear loss, and updates: the table alone,
without the layers of a model. Each case runs in a process of its own, on memory that has been written to before.

Memory is the growth of the process's peak RSS over its size before the table; beside it what trainer/tables.py says
that weights, gradients and state take (AdamW on the CPU also needs temporary copies). Time is CPU time, the median of
--steps steps after two others. A case that needs more than --gigabytes is not run: only its formula is given.

Writes bench/results/tables.{json,md}.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import time
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import nn

from contract.artifacts import git_revision
from contract.settings import Model
from trainer import tables
from trainer.tables import Addresses, HashEmbedding, RowwiseEmbedding, Shard, splitmix64

RESULTS = Path(__file__).parent / "results"
IDS, WIDTHS = (1_000_000, 10_000_000, 100_000_000), (64, 512)
USERS, ITEMS, WARM_UP = 1024, 20, 2


def zipf_ids(num_ids: int, generator: torch.Generator) -> torch.Tensor:
    """int64 (USERS, ITEMS) in 1..num_ids: the k-th most frequent with a share of about 1 / k, anywhere in the range."""
    rank = num_ids ** torch.rand(USERS, ITEMS, generator=generator, dtype=torch.double)
    return 1 + (splitmix64(rank.long(), 1) & (2**63 - 1)) % num_ids


def formula(num_rows: int, width: int, optimizer: str) -> int:
    """Bytes of weights, gradients and optimizer state."""
    return 16 * num_rows * width if optimizer == "dense" else 4 * num_rows * (width + 2)


def make_table(addresses: Addresses, width: int, optimizer: str) -> nn.Module:
    """A table of zeros, all of it in memory."""
    if optimizer == "rowwise":
        table = RowwiseEmbedding(addresses, width, 0.0, Shard(0, 1), seed=0)
        for name in table.STATE:
            getattr(table, name).fill_(0)  # fresh zeros take no memory until they are written
        return table
    if addresses.num_functions:
        table = HashEmbedding(addresses, width)
    else:
        table = nn.utils.skip_init(nn.Embedding, addresses.num_rows + 1, width, padding_idx=0)
    nn.init.zeros_(table.weight)
    return table


def measure(addresses: Addresses, num_ids: int, width: int, optimizer: str, steps: int) -> dict:
    """Runs one case; see the module's docstring."""
    before = peak_rss()
    module = nn.ModuleDict({"table": make_table(addresses, width, optimizer)})
    adamw = torch.optim.AdamW(module.parameters(), lr=1e-3) if optimizer == "dense" else None
    generator, seconds, distinct = torch.Generator().manual_seed(0), [], []
    for _ in range(WARM_UP + steps):
        ids = zipf_ids(num_ids, generator)
        slope = torch.randn(*ids.shape, width, generator=generator)
        start = time.process_time()
        (module["table"](ids) * slope).sum().backward()
        if adamw:
            adamw.step()
            adamw.zero_grad(set_to_none=False)
        else:
            tables.step(module, 1e-3, clip=1.0)
        seconds.append(time.process_time() - start)
        distinct.append(len(addresses.rows(ids).unique()))
    return {
        "cpu_seconds": statistics.median(seconds[WARM_UP:]),
        "rss_bytes": peak_rss() - before,
        "rows_of_a_batch": round(statistics.mean(distinct)),
    }


def peak_rss() -> int:
    """Bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def run_alone(*arguments) -> dict:
    """`measure` in a fresh process."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, arguments)


def cases() -> list[dict]:
    found = []
    for width in WIDTHS:
        for num_ids in IDS:
            for kind in ("exact", "hash"):
                for optimizer in ("dense", "rowwise"):
                    num_rows = num_ids if kind == "exact" else Model().hash_rows
                    case = {"ids": num_ids, "width": width, "table": kind, "optimizer": optimizer, "rows": num_rows}
                    found.append(case | {"formula_bytes": formula(num_rows, width, optimizer)})
    return found


def markdown(results: dict) -> str:
    lines = [
        f"One training step of an embedding table, a batch of {USERS} x {ITEMS} Zipf ids; {results['device']}, "
        f"{results['threads']} thread; {results['date']}, revision {results['revision']}",
        "",
        "| ids | D | table | optimizer | rows | formula, GB | peak RSS, GB | step, CPU ms | rows of a batch |",
        "| ---: | ---: | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in results["cases"]:
        cells = [f"{row['ids'] / 1e6:.0f}M", row["width"], row["table"], row["optimizer"], f"{row['rows'] / 1e6:.0f}M"]
        cells.append(f"{row['formula_bytes'] / 1e9:.2f}")
        if "cpu_seconds" in row:
            cells += [f"{row['rss_bytes'] / 1e9:.2f}", f"{1e3 * row['cpu_seconds']:.0f}", f"{row['rows_of_a_batch']:,}"]
        else:
            cells += ["not run", "", ""]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    limit = f"{results['gigabytes']:g} GB"
    lines += ["", f"Formula: weights, gradients and state, computed. Not run: needs more than {limit}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=7, help="steps that are timed")
    parser.add_argument("--gigabytes", type=float, default=8.0, help="the most that a case may need by its formula")
    args = parser.parse_args()
    results = {
        "device": f"CPU, {platform.machine()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d"),
        "revision": git_revision(),
        "gigabytes": args.gigabytes,
        "cases": [],
    }
    for case in cases():
        if case["formula_bytes"] <= args.gigabytes * 1e9:
            addresses = Addresses(case["rows"], Model().hash_functions if case["table"] == "hash" else 0)
            case |= run_alone(addresses, case["ids"], case["width"], case["optimizer"], args.steps)
            case["load"] = os.getloadavg()[0]
        results["cases"].append(case)
        print(case, flush=True)
    (RESULTS / "tables.json").write_text(json.dumps(results, indent=1) + "\n")
    (RESULTS / "tables.md").write_text(markdown(results))
    print(markdown(results))


if __name__ == "__main__":
    main()
