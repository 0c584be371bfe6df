"""Trains ColaRec under DeepSpeed: corpus/ and gid/ -> model/

CPU, two ranks:   DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 \\
                  deepspeed --num_accelerators 2 trainer/main.py --config configs/phone.toml
GPUs, all:        deepspeed trainer/main.py --config configs/phone.toml
One process:      python trainer/main.py --config configs/phone.toml

Ctrl-C or SIGTERM saves a checkpoint; the same command goes on from it.
"""

import contextlib

import numpy as np
import torch
import torch.distributed as dist

from contract import cli
from contract.artifacts import STAGES, open_artifact, stage_output
from contract.cli import RANK, WORLD_SIZE, Progress
from contract.tracking import track
from trainer import checkpoint, distributed, tables
from trainer import model as model_module
from trainer.checkpoint import Checkpoints
from trainer.inputs import read_catalog
from trainer.training import Training


def main(argv: list[str]) -> None:
    config, dry_run = cli.parse(argv, __doc__)
    if dry_run:
        reads = {need: config.work_dir / need for need in STAGES["model"].needs}
        return cli.show_plan(config, reads, config.work_dir / "model") if RANK == 0 else None
    corpus, gid = open_artifact(config, "corpus"), open_artifact(config, "gid")
    with contextlib.ExitStack() as stack:
        # What can be refused is refused before rank 0 joins the others, which the launcher ends while they wait.
        output = stack.enter_context(stage_output(config, "model")) if RANK == 0 else None
        checkpoints = Checkpoints(config, {"corpus": corpus.digest, "gid": gid.digest}, WORLD_SIZE)
        resumed = checkpoints.find()
        run = stack.enter_context(track(config, "train", run_id=resumed))
        rank, world_size, device = stack.enter_context(distributed.process_group())
        torch.manual_seed(config.seed)
        catalog = read_catalog(corpus, gid)
        sizes = model_module.sizes(config, catalog)
        shard = tables.Shard(rank, world_size) if config.train.table_optimizer == "rowwise" else None
        model = model_module.ColaRec(config, sizes, shard)
        if config.model.item_init == "cf" and config.model.item_table == "exact":
            embeddings = np.load(gid.path / "item_embeddings.npy", mmap_mode="r", allow_pickle=False)
            model_module.init_items(model, torch.from_numpy(np.array(embeddings)), config.seed)
        num_parameters = sum(p.numel() for p in model.parameters()) + tables.num_weights(model)
        engine = distributed.initialize(config, model, world_size, device)
        progress = Progress("train")
        progress(
            f"{num_parameters / 1e6:.2f} M parameters on {world_size} x {device.type}, ZeRO {config.train.zero_stage}, "
            f"{'bf16' if distributed.uses_bf16(config, device) else 'fp32'}"
        )
        if not resumed and rank == 0:
            checkpoints.create(run.run_id)
        dist.barrier()
        training = Training(config, corpus, catalog, engine, checkpoints, run, progress)
        if resumed:
            training.state = checkpoints.load(engine)
            progress(f"goes on from step {training.state['step']}")
        training.fit()
        if rank == 0:
            checkpoint.write_model(output.path, checkpoints.best, sizes)
            counts = {"num_parameters": num_parameters, **training.state, "seconds": round(training.seconds())}
            config_train = {"train": vars(config.train), "world_size": world_size, "device": device.type}
            output.commit(counts, {"corpus": corpus.digest, "gid": gid.digest}, training=config_train)
            checkpoints.remove()
            progress(f"wrote {config.work_dir / 'model'}")


if __name__ == "__main__":
    cli.run(main)
