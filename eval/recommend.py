"""Recommends items: to the users of corpus/, into a Parquet file, or to a person described in words, on the terminal.

CPU, two ranks:   DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 \\
                  deepspeed --num_accelerators 2 eval/recommend.py --config configs/demo.toml --out recs.parquet
GPUs, all:        deepspeed eval/recommend.py --config F --users ids.txt --out recs.parquet
SLURM:            srun python eval/recommend.py ..., with RANK, WORLD_SIZE and MASTER_* set as cluster/ does
A person:         python eval/recommend.py --config F --history "B000142FVW, red nail polish"

A user's history is everything that is known: train, valid and test events. Stopped, the same command goes on.
"""

import argparse
import contextlib
import hashlib
import math
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist

from contract import cli, disk
from contract import config as config_module
from contract.artifacts import STAGES, Artifact, exclusively, open_artifact
from contract.cli import RANK, Progress
from contract.settings import Config
from eval import people
from eval.items import ItemNames, choose, read_names
from eval.known import Histories, find_users
from eval.parts import OTHER_OUT, Parts
from trainer import loader
from trainer.distributed import process_group
from trainer.recommender import Recommender, load

USAGE = "[--users FILE] [--out FILE] | --history WORDS, and [-k K] [--only IDS] [--exclude IDS]"
# Parts are to be so many that ranks end together, and so large that a hundred million users make few files.
NUM_PARTS, MAX_USERS_PER_PART = 64, 16_384


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("recommendations")
    group.add_argument(
        "--users", metavar="FILE", help="a user_id per line, or .csv or .parquet with a column user_id; default: all"
    )
    group.add_argument(
        "--out", metavar="FILE", type=Path, help="Parquet file to write; default: <work>/recommendations.parquet"
    )
    group.add_argument("--titles", action="store_true", help="write the beginning of the items' texts as well")
    group.add_argument(
        "--history",
        metavar="WORDS",
        action="append",
        help="recommend to a person who is no user: item ids or free text, oldest first, separated by commas or given "
        "again; prints a table",
    )
    group.add_argument("-k", type=int, metavar="K", help="items for each; default: the largest of eval.cutoffs")
    ids = "items, as ids separated by commas or a file with one a line"
    group.add_argument("--only", metavar="IDS", help=f"recommend only these {ids}")
    group.add_argument("--exclude", metavar="IDS", help=f"never recommend these {ids}")


def main(argv: list[str]) -> None:
    config, given = cli.parse_more(argv, __doc__, USAGE, add_arguments)
    k = max(config.eval.cutoffs) if given.k is None else given.k
    if not 1 <= k <= config.eval.beams:
        raise ValueError(f"-k {k}: must be 1 or more, and at most eval.beams = {config.eval.beams}")
    if given.history and (given.users or given.out or given.titles):
        raise ValueError("--history is of a person who is no user: it goes without --users, --out and --titles")
    parts = Parts((given.out or config.work_dir / "recommendations.parquet").absolute())
    if given.dry_run:
        reads = {need: config.work_dir / need for need in STAGES["eval"].needs}
        reads |= {"users": given.users} if given.users else {}
        return cli.show_plan(config, reads, parts.output) if RANK == 0 else None
    inputs = {need: open_artifact(config, need) for need in STAGES["eval"].needs}
    names = read_names(inputs["corpus"].path)
    candidates = choose(names, given.only, given.exclude)
    if given.history:
        if RANK == 0:
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            recommender = load(config, inputs, device, candidates)
            reader = people.Reader(config, inputs["corpus"], recommender.catalog, names)
            people.show(recommender, reader, given.history, k)
        return None
    progress = Progress("recommend")
    with contextlib.ExitStack() as stack:
        if RANK == 0:
            stack.enter_context(exclusively(parts.output, "--out"))
            begin(config, inputs, parts, given, candidates, k, progress)
        rank, world_size, device = stack.enter_context(process_group())
        dist.barrier()  # what rank 0 has begun is there
        if not parts.folder.exists():
            return
        users = parts.keys()
        size = min(MAX_USERS_PER_PART, max(config.eval.batch, math.ceil(len(users) / NUM_PARTS)))
        slices = [users[begin : begin + size] for begin in range(0, len(users), size)]
        missing = [part for part in range(len(slices)) if not parts.is_whole(part)]
        if len(missing) < len(slices):
            progress(f"goes on: {len(slices) - len(missing)} of {len(slices)} parts are there")
        dist.barrier()  # all ranks have seen the same parts
        recommender, histories = load(config, inputs, device, candidates), Histories(inputs["corpus"].path)
        mine, start, num_done = missing[rank::world_size], time.monotonic(), 0
        try:
            for number, part in enumerate(mine, 1):
                user_ids, block = histories.read(np.array(slices[part]))
                found = recommend(recommender, block, k)
                parts.write(part, table(names, user_ids, block.user_idx, found, given.titles))
                num_done += len(block.user_idx)
                rate = num_done / (time.monotonic() - start)
                told = f"{number} of the {len(mine)} parts of this rank, {rate:,.0f} users/s"
                (progress if number % max(1, len(mine) // 8) == 0 or number == len(mine) else progress.status)(told)
        except KeyboardInterrupt:
            kept = sum(parts.file(part).exists() for part in range(len(slices)))
            progress(f"{kept} of {len(slices)} parts are kept in {parts.folder}; the same command goes on")
            raise
        dist.barrier()
        if rank == 0:
            progress(f"wrote {parts.output}: {parts.finish(len(slices)):,} users")


def begin(
    config: Config,
    inputs: dict[str, Artifact],
    parts: Parts,
    given: argparse.Namespace,
    candidates: np.ndarray | None,
    k: int,
    progress: Progress,
) -> None:
    """Looks up the users, says which are unknown, and makes the folder of parts ready. On rank 0 alone."""
    num_users, unknown_file = inputs["corpus"].counts["num_users"], parts.output.with_suffix(".unknown.txt")
    users = np.arange(1, num_users + 1)
    with disk.writing(unknown_file, OTHER_OUT):
        unknown_file.unlink(missing_ok=True)
    if given.users:
        asked = find_users(inputs["corpus"].path, num_users, Path(given.users), unknown_file)
        users, num_again = asked.user_idx, asked.num_ids - asked.num_unknown - len(asked.user_idx)
        if asked.num_unknown:
            first = ", ".join(asked.first_unknown) + (", ..." if asked.num_unknown > len(asked.first_unknown) else "")
            progress(
                f"{asked.num_unknown:,} of {asked.num_ids:,} ids are of no user: {first}; all are in {unknown_file}"
            )
        if num_again:
            progress(f"{num_again:,} ids are there again; every user gets one row")
    origin = {name: artifact.digest for name, artifact in inputs.items()}
    origin |= {"users": _named(users), "candidates": "all" if candidates is None else _named(candidates)}
    origin |= {"k": k, "titles": given.titles, **config_module.section(config, "seed", "eval")}
    if not parts.begin(origin, users):
        progress(f"{parts.output} is there already, from the same model, users and settings; delete it to make it anew")


def _named(values: np.ndarray) -> str:
    """What differs when the values do."""
    return f"{len(values):,}, {hashlib.sha256(np.ascontiguousarray(values)).hexdigest()[:16]}"


def recommend(recommender: Recommender, block: loader.Block, k: int) -> dict[str, np.ndarray]:
    """item_idx int32 (N, k), 0 where there are no more, and score float32 (N, k) of the users of a block."""
    config, num_users = recommender.config, len(block.user_idx)
    item_idx, score = np.zeros((num_users, k), np.int32), np.zeros((num_users, k), np.float32)
    for batch in loader.user_batches(config, recommender.catalog, block, config.eval.batch, int(block.user_idx[0])):
        found = recommender.recommend(batch if config.eval.mask_seen else {"user": batch["user"]}, k)
        rows = np.searchsorted(block.user_idx, batch["user_idx"].numpy())
        item_idx[rows], score[rows] = found["item_idx"].cpu().numpy(), found["score"].cpu().numpy()
    return {"item_idx": item_idx, "score": score}


def table(
    names: ItemNames, user_ids: pa.Array, user_idx: np.ndarray, found: dict[str, np.ndarray], titles: bool
) -> pa.Table:
    """A row per user: user_id, user_idx, and best first lists of item_id, item_idx, score and, if asked for, title."""
    filled = found["item_idx"] > 0
    offsets = pa.array(np.concatenate([[0], np.cumsum(filled.sum(1))]).astype(np.int32))
    items = pa.array(found["item_idx"][filled])
    lists = {"item_id": names.item_id.take(items), "item_idx": items, "score": pa.array(found["score"][filled])}
    lists |= {"title": names.title.take(items)} if titles else {}
    columns = {name: pa.ListArray.from_arrays(offsets, values) for name, values in lists.items()}
    return pa.table({"user_id": user_ids, "user_idx": user_idx, **columns})


if __name__ == "__main__":
    cli.run(main)
