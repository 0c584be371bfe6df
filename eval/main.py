"""Scores a trained model beside its baselines: corpus/, gid/ and model/ -> eval/

CPU, two ranks:   DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 \\
                  deepspeed --num_accelerators 2 eval/main.py --config configs/phone.toml
GPUs, all:        deepspeed eval/main.py --config configs/phone.toml
One process:      python eval/main.py --config configs/phone.toml

All users of the split are scored, none is sampled; the numbers are the same at any number of ranks.
Writes metrics.json, table.md and recommendations.parquet.
"""

import contextlib
import dataclasses
import platform
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist

from contract import cli, schema
from contract.artifacts import STAGES, Artifact, Output, open_artifact, stage_output
from contract.cli import RANK, Progress
from contract.config import Config, Train
from contract.tracking import track
from eval import baselines, metrics, table
from eval.users import EvalUsers, read_eval_users
from trainer import loader
from trainer.distributed import process_group
from trainer.recommender import load


def main(argv: list[str]) -> None:
    config, dry_run = cli.parse(argv, __doc__)
    if dry_run:
        reads = {need: config.work_dir / need for need in STAGES["eval"].needs}
        return cli.show_plan(config, reads, config.work_dir / "eval") if RANK == 0 else None
    inputs = {need: open_artifact(config, need) for need in STAGES["eval"].needs}
    progress = Progress("eval")
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(stage_output(config, "eval")) if RANK == 0 else None
        run = stack.enter_context(track(config, "eval"))
        parts = Output(config, "eval").path  # of rank 0, for the lists of all
        with process_group() as (rank, world_size, device):
            dist.barrier()  # the folder is there
            np.savez(parts / f".rank-{rank}.npz", **recommend(config, inputs, rank, world_size, device, progress))
            dist.barrier()
        if RANK > 0:
            return
        recommended = collect(parts, world_size)
        users = read_eval_users(inputs["corpus"], config.eval.split)
        if not np.array_equal(users.user_idx, recommended["user_idx"]):
            raise AssertionError("the ranks together did not score every user once")
        device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {platform.machine()}"
        results = score(config, inputs, users, recommended, f"{world_size} x {device_name}", progress)
        write_recommendations(inputs["corpus"], recommended, output.path / "recommendations.parquet")
        table.write(results, output.path / "metrics.json")
        (output.path / "table.md").write_text(table.markdown(results))
        for model, values in results.models.items():
            prefix = "" if model == "ColaRec" else f"{model}/"
            run.metrics({f"{prefix}{name}": estimate["mean"] for name, estimate in values.items()})
        run.artifact(output.path / "table.md")
        run.artifact(output.path / "metrics.json")
        output.commit({"num_users": len(users)}, {name: artifact.digest for name, artifact in inputs.items()})
        progress(f"wrote {config.work_dir / 'eval'}\n\n{table.terminal(results)}")


def recommend(
    config: Config, inputs: dict[str, Artifact], rank: int, world_size: int, device: torch.device, progress: Progress
) -> dict[str, np.ndarray]:
    """The lists of this rank's users, N of them.

    Returns:
        user_idx int64 (N,); item_idx int32 (N, k) and score float32 (N, k), what ColaRec recommends; of the hybrid
        also what its halves would recommend alone, generative and dense int32 (N, k).
    """
    recommender, k = load(config, inputs, device), max(config.eval.cutoffs)
    num_batches = loader.num_eval_batches(inputs["corpus"], config.eval.split, config.eval.batch, world_size)
    batches = loader.eval_batches(
        config, recommender.catalog, inputs["corpus"], config.eval.split, config.eval.batch, rank, world_size
    )
    lists = []
    for number, batch in enumerate(batches, 1):
        real = batch["user_idx"].numpy() > 0  # the rest only fills up
        names = ("user", "seen_row", "seen_item") if config.eval.mask_seen else ("user",)
        found = recommender.recommend({name: batch[name] for name in names}, k)
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


def score(
    config: Config, inputs: dict[str, Artifact], users: EvalUsers, recommended: dict, device: str, progress: Progress
) -> table.Results:
    """Metrics of ColaRec and of the baselines over the same users."""
    k, num_items = max(config.eval.cutoffs), inputs["corpus"].counts["num_items"]
    rankings = {"ColaRec": recommended["item_idx"]}
    rankings |= {f"ColaRec, {half}": recommended[half] for half in ("generative", "dense") if half in recommended}
    fit = baselines.read_fit(inputs["corpus"], inputs["gid"], config, progress)
    others, facts = baselines.rank_all(fit, users, k, config.eval.mask_seen)
    rankings |= others
    models, lead = metrics.compare(rankings, users.targets, config.eval.cutoffs, num_items, config.seed)
    trained = inputs["model"]
    # What the model was trained with, which the settings of [train] may no longer say.
    as_trained = dataclasses.replace(config, train=Train(**trained.manifest["training"]["train"]))
    facts["trained"] = (
        f"{trained.counts['seconds'] / 60:.0f} min on {trained.manifest['training']['world_size']} x "
        f"{trained.manifest['training']['device']}, {trained.counts['step']} steps; "
        f"best valid {'loss' if as_trained.train.best == 'loss' else 'ndcg@10'} after epoch "
        f"{trained.counts['best_epoch']:g}"
    )
    protocol = table.protocol(as_trained, len(users), num_items, device, **facts)
    return table.Results(config.name, protocol, models, lead)


def write_recommendations(corpus: Artifact, recommended: dict[str, np.ndarray], file: Path) -> None:
    """A row per user: user_idx, and best first item_idx, item_id and score (see eval/decode.py)."""
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
