"""Scores a trained model beside its baselines: corpus/, gid/ and model/ -> eval/

CPU, two ranks:   DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 \\
                  deepspeed --num_accelerators 2 eval/main.py --config configs/phone.toml
GPUs, all:        deepspeed eval/main.py --config configs/phone.toml
One process:      python eval/main.py --config configs/phone.toml

All users of the split are scored, none is sampled; the numbers are the same at any number of ranks.
Writes metrics.json, table.md, recommendations.parquet, and report.html for people.
"""

import contextlib
import platform
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist

from contract import cli, disk, schema
from contract.artifacts import ELSEWHERE, STAGES, Artifact, Output, lock, open_artifact, stage_output
from contract.cli import RANK, Progress
from contract.settings import Config
from contract.tracking import track
from eval import explain, report, scoring, table
from eval.users import read_eval_users
from trainer import loader
from trainer.distributed import process_group
from trainer.recommender import Recommender, load


def main(argv: list[str]) -> None:
    config, dry_run = cli.parse(argv, __doc__)
    if dry_run:
        reads = {need: config.work_dir / need for need in STAGES["eval"].needs}
        return cli.show_plan(config, reads, config.work_dir / "eval") if RANK == 0 else None
    inputs = {need: open_artifact(config, need) for need in STAGES["eval"].needs}
    refuse_unfinished(config)
    progress = Progress("eval")
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(stage_output(config, "eval")) if RANK == 0 else None
        run = stack.enter_context(track(config, "eval"))
        parts = Output(config, "eval").path  # of rank 0, for the lists of all
        with process_group() as (rank, world_size, device):
            recommender = load(config, inputs, device)
            lists = recommend(recommender, inputs["corpus"], rank, world_size, progress)
            dist.barrier()  # the folder is there
            with disk.writing(parts, ELSEWHERE, sum(array.nbytes for array in lists.values())):
                np.savez(parts / f".rank-{rank}.npz", **lists)
            dist.barrier()
        if RANK > 0:
            return
        recommended = collect(parts, world_size)
        users = read_eval_users(inputs["corpus"], config.eval.split)
        if not np.array_equal(users.user_idx, recommended["user_idx"]):
            raise AssertionError("the ranks together did not score every user once")
        device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {platform.machine()}"
        results = scoring.score(
            recommender.config, inputs, users, recommended, f"{world_size} x {device_name}", progress
        )
        write_recommendations(inputs["corpus"], recommended, output.path / "recommendations.parquet")
        table.write(results, output.path / "metrics.json")
        (output.path / "table.md").write_text(table.markdown(results))
        rows = explain.choose_users(users, recommended["item_idx"], config.seed)
        people = explain.explain(recommender, inputs["corpus"], users, recommended["item_idx"], rows)
        names = report.read_names(inputs["corpus"], inputs["gid"], people)
        report.write_report(output.path / "report.html", results, people, names)
        run.metrics(table.numbers(results))
        for file in ("table.md", "metrics.json", "report.html"):
            run.artifact(output.path / file)
        output.commit({"num_users": len(users)}, {name: artifact.digest for name, artifact in inputs.items()})
        progress(f"wrote {config.work_dir / 'eval'}\n\n{table.terminal(results)}")


def refuse_unfinished(config: Config) -> None:
    """Refuses a model that is being trained anew: a chain came here without the one that it waits for.

    Raises:
        BlockingIOError: a training is writing model/.
        ValueError: one was interrupted.
    """
    if RANK == 0:
        with lock(config, "model"):
            pass
    checkpoints = config.work_dir / "checkpoints"
    if checkpoints.exists():
        raise ValueError(
            f"{config.work_dir / 'model'} is being trained anew, and {checkpoints} holds how far that came; go on with "
            f"it: {STAGES['model'].command}, or delete the checkpoints to evaluate the model that is there"
        )


def recommend(
    recommender: Recommender, corpus: Artifact, rank: int, world_size: int, progress: Progress
) -> dict[str, np.ndarray]:
    """The lists of this rank's users, N of them.

    Returns:
        user_idx int64 (N,); item_idx int32 (N, k) and score float32 (N, k), what ColaRec recommends; of the hybrid
        also what its parts would recommend, int32 (N, k), see `Recommender.recommend`.
    """
    config, catalog, split = recommender.config, recommender.catalog, recommender.config.eval.split
    num_batches = loader.num_eval_batches(corpus, split, config.eval.batch, world_size)
    batches = loader.eval_batches(config, catalog, corpus, split, config.eval.batch, rank, world_size)
    lists = []
    for number, batch in enumerate(batches, 1):
        real = batch["user_idx"].numpy() > 0  # the rest only fills up
        names = ("user", "seen_row", "seen_item") if config.eval.mask_seen else ("user",)
        found = recommender.recommend({name: batch[name] for name in names}, max(config.eval.cutoffs))
        found["user_idx"] = batch["user_idx"]
        lists.append({name: values.cpu().numpy()[real] for name, values in found.items()})
        if number % max(1, num_batches // 8) == 0 or number == num_batches:
            progress(
                f"decoded {number}/{num_batches} batches of {config.eval.batch} users on each of {world_size} ranks"
            )
    return {name: np.concatenate([part[name] for part in lists]) for name in lists[0]}


def collect(parts: Path, world_size: int) -> dict[str, np.ndarray]:
    """The lists of all ranks in ascending order of user_idx; the ranks' files are removed."""
    files = [parts / f".rank-{rank}.npz" for rank in range(world_size)]
    loaded = [dict(np.load(file, allow_pickle=False)) for file in files]
    together = {name: np.concatenate([part[name] for part in loaded]) for name in loaded[0]}
    order = np.argsort(together["user_idx"])
    for file in files:
        file.unlink()
    return {name: array[order] for name, array in together.items()}


def write_recommendations(corpus: Artifact, recommended: dict[str, np.ndarray], file: Path) -> None:
    """A row per user: user_idx, and best first item_idx, item_id and score (see trainer/recommender.py)."""
    item_ids = pa.array(schema.read_items(corpus.path).item_ids)
    found = recommended["item_idx"] > 0
    offsets = pa.array(np.concatenate([[0], np.cumsum(found.sum(1))]).astype(np.int32))
    items = pa.array(recommended["item_idx"][found])
    columns = {
        "user_idx": recommended["user_idx"],
        "item_idx": pa.ListArray.from_arrays(offsets, items),
        "item_id": pa.ListArray.from_arrays(offsets, item_ids.take(items)),
        "score": pa.ListArray.from_arrays(offsets, pa.array(recommended["score"][found])),
    }
    pq.write_table(pa.table(columns), file)


if __name__ == "__main__":
    cli.run(main)
