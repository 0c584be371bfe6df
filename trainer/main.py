"""Trains ColaRec under DeepSpeed: corpus/ and gid/ -> model/

CPU, two ranks:   DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 \\
                  deepspeed --num_accelerators 2 trainer/main.py --config configs/phone.toml
GPUs, all:        deepspeed trainer/main.py --config configs/phone.toml
One process:      python trainer/main.py --config configs/phone.toml

Ctrl-C, SIGTERM and SIGUSR1 end the step and save a checkpoint; the same command goes on from it. The exit status is
130 after Ctrl-C and 75 after the others, which a scheduler sends: to be queued again.
"""

import contextlib

import numpy as np
import safetensors
import torch
import torch.distributed as dist

from contract import cli
from contract.artifacts import STAGES, Artifact, open_artifact, stage_output
from contract.cli import RANK, Progress
from contract.settings import Config
from contract.tracking import track
from trainer import distributed, pretrained, tables
from trainer.checkpoint import Checkpoints
from trainer.export import CARD, MODEL_FILES, model_card, write_model
from trainer.initial import init_codes, init_items
from trainer.inputs import Catalog, read_catalog
from trainer.model import ColaRec, model_config
from trainer.training import Training

FEW_STEPS = 2000  # with 1,825 the demo's log was learned clearly worse than with twice as many (docs/experiments.md)


def main(argv: list[str]) -> None:
    config, dry_run = cli.parse(argv, __doc__)
    if dry_run:
        reads = {need: config.work_dir / need for need in STAGES["model"].needs}
        return cli.show_plan(config, reads, config.work_dir / "model") if RANK == 0 else None
    corpus, gid = open_artifact(config, "corpus"), open_artifact(config, "gid")
    with contextlib.ExitStack() as stack:
        # What can be refused is refused before rank 0 joins the others, which the launcher ends while they wait.
        output = stack.enter_context(stage_output(config, "model")) if RANK == 0 else None
        checkpoints = Checkpoints(config, {"corpus": corpus.digest, "gid": gid.digest})
        resumed = checkpoints.find()
        run = stack.enter_context(track(config, "train", run_id=resumed))
        rank, world_size, device = stack.enter_context(distributed.process_group(config.train.timeout))
        torch.manual_seed(config.seed)
        progress = Progress("train")
        catalog = read_catalog(corpus, gid)
        model = build_model(config, catalog, gid, tables.Shard(rank, world_size), progress)
        num_parameters = sum(p.numel() for p in model.parameters()) + tables.num_weights(model)
        engine = distributed.initialize(config, model, world_size, device)
        progress(
            f"{num_parameters / 1e6:.2f} M parameters on {world_size} x {device.type}, ZeRO {config.train.zero_stage}, "
            f"{'bf16' if distributed.uses_bf16(config, device) else 'fp32'}"
        )
        if not resumed and rank == 0:
            checkpoints.create(run.run_id)
        dist.barrier()
        training = Training(config, corpus, catalog, engine, checkpoints, run, progress)
        progress(
            f"{training.num_steps} steps of {config.train.global_batch}"
            + ", which are few: more epochs or a smaller train.global_batch make more"
            * (training.num_steps < FEW_STEPS and not config.train.max_steps)
        )
        if resumed:
            training.resume()
        training.fit()
        if rank == 0:
            counts = {"num_parameters": num_parameters, **training.state, "seconds": round(training.seconds())}
            card = model_card(config, corpus, model.config, training.facts(), num_parameters)
            weights = pretrained.merged(checkpoints.best_weights())
            try:
                write_model(output.path, weights, model.config, card)
            except safetensors.SafetensorError as error:
                num_bytes = sum(weight.nbytes for weight in weights.values())
                raise ValueError(
                    f"the model cannot be written to {output.path} ({num_bytes:,} bytes): {error}; make room, and the "
                    "same command goes on from the last checkpoint"
                ) from None
            for file in MODEL_FILES if config.tracking.log_model else (CARD,):
                run.artifact(output.path / file, "model")
            config_train = {"train": vars(config.train), "world_size": world_size, "device": device.type}
            output.commit(counts, {"corpus": corpus.digest, "gid": gid.digest}, training=config_train)
            checkpoints.remove()
            progress(f"wrote {config.work_dir / 'model'}")


def build_model(config: Config, catalog: Catalog, gid: Artifact, shard: tables.Shard, progress: Progress) -> ColaRec:
    """The model as its first step finds it."""
    shard = shard if config.train.table_optimizer == "rowwise" else None
    model = ColaRec(model_config(config, catalog), shard, config.seed)
    vectors = None
    if config.model.item_init == "cf" and config.model.item_table == "exact":
        embeddings = np.load(gid.path / "item_embeddings.npy", mmap_mode="r", allow_pickle=False)
        vectors = init_items(model, torch.from_numpy(np.array(embeddings)), config.seed)
    if model.config.leaves_are_items:
        init_codes(model, torch.from_numpy(catalog.gids), vectors, config.seed)
    if config.model.init:
        progress(f"starts from {pretrained.init_from_t5(model, config)}")
    if config.model.lora_rank:
        pretrained.add_lora(model, config)
    if config.train.recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if config.train.compile:
        model.compile_layers()
    return model


if __name__ == "__main__":
    cli.run(main)
