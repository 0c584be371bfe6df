"""Ranks, devices, and the DeepSpeed settings that follow from the config."""

import contextlib
import os
import socket
import warnings
from collections.abc import Iterator
from datetime import timedelta

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import logger as deepspeed_logger

from contract.settings import Config
from trainer import engine_state
from trainer.launcher import heed_launcher
from trainer.watch import Watch


@contextlib.contextmanager
def process_group(timeout: int = 1800) -> Iterator[tuple[int, int, torch.device]]:
    """Joins the ranks that the launcher started; without a launcher this process is the only one.

    Yields (rank, world_size, device). NCCL where there are GPUs, gloo otherwise. A collective that one of the ranks
    has not joined after `timeout` seconds fails.

    Raises:
        ConnectionError: another rank died or failed; the message says which and why. Or the launcher is gone.
    """
    heed_launcher()
    deepspeed_logger.setLevel("WARNING")
    # DeepSpeed calls collectives that torch has renamed; its users can do nothing about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        alone = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({key: str(value) for key, value in alone.items()})
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        # The shared-memory kernels are compiled at first use (minutes) and leave segments behind; gloo does.
        os.environ.pop("LOCAL_SIZE", None)
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    else:
        accelerator.set_device(int(os.environ["LOCAL_RANK"]))
        # cuDNN's attention, which torch prefers on Hopper, is planned anew, for tenths of a second, at each new shape;
        # batches cut by length have hundreds (pytorch/pytorch#155958).
        torch.backends.cuda.enable_cudnn_sdp(False)
    joined_before = dist.is_initialized()  # then the group is the caller's to leave
    backend = "gloo" if accelerator.device_name() == "cpu" else "nccl"
    deepspeed.init_distributed(
        dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=timedelta(seconds=timeout)
    )
    device = torch.device(accelerator.current_device_name())
    group = dist.get_rank(), dist.get_world_size(), device
    if joined_before:
        yield group
        return
    with Watch(*group):
        yield group
    dist.destroy_process_group()


def uses_bf16(config: Config, device: torch.device) -> bool:
    if config.train.precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported()
    return config.train.precision == "bf16"


def deepspeed_config(config: Config, world_size: int, bf16: bool) -> dict:
    train = config.train
    if bf16 and train.zero_stage == 0:
        raise ValueError("train.precision bf16 needs train.zero_stage 1 or more: stage 0 keeps no fp32 weights")
    return {
        # One pass as far as DeepSpeed knows: the loop cuts it by length, weighs the parts and says which is the last.
        "train_batch_size": train.global_batch,
        "train_micro_batch_size_per_gpu": train.global_batch // world_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": train.clip,
        "zero_optimization": {"stage": train.zero_stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": bf16},
        "steps_per_print": 10**9,
    }


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Weight decay for the matrices of the layers, none for norms, embeddings and codebooks."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.ndim == 2 and id(p) not in embeddings]
    ids = {id(p) for p in decayed}
    rest = [p for p in trained if id(p) not in ids]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


def initialize(config: Config, model: torch.nn.Module, world_size: int, device: torch.device):
    """The DeepSpeed engine. AdamW is torch's: DeepSpeed's own is compiled at first use."""
    optimizer = torch.optim.AdamW(
        parameter_groups(model, config.train.weight_decay), lr=config.train.lr, fused=device.type == "cuda"
    )
    settings = deepspeed_config(config, world_size, uses_bf16(config, device))
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    if config.train.zero_stage == 0:
        _clip_and_tell(engine, config.train.clip)
    engine_state.create(engine, ema=config.train.ema > 0)
    return engine


def _clip_and_tell(engine, max_norm: float) -> None:
    """Gives stage 0 what the other stages have: the gradient norm, and no step when it is not finite."""

    def clip() -> None:
        norm = torch.nn.utils.clip_grad_norm_(engine.module.parameters(), max_norm)
        engine._global_grad_norm = norm.item()
        if not norm.isfinite():
            engine.zero_grad()  # AdamW passes over parameters without a gradient

    engine.clip_fp32_gradients = clip
