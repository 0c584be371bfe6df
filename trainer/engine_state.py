"""What a DeepSpeed engine holds of each parameter, whole and in float32, whatever the ZeRO stage and number of ranks.

Of a parameter there are the weight (the fp32 master copy), AdamW's two moments, and with `train.ema` the moving
average of the weight. They are created before the first step, so that a checkpoint of step 0 is like any other. The
average lives among the optimizer's states: DeepSpeed then partitions it as it does the moments.
"""

from collections.abc import Callable, Iterator

import deepspeed
import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)

WEIGHT, EMA = "weight", "ema"
_MOMENTS = ("exp_avg", "exp_avg_sq")


def create(engine, ema: bool) -> None:
    """Creates the states of an engine that has not made a step; the average starts at the weights."""
    optimizer = engine.basic_optimizer
    for master in _masters(engine):
        zeros = {key: torch.zeros_like(master) for key in _MOMENTS}
        step = torch.zeros((), device=master.device if optimizer.defaults["fused"] else "cpu")
        optimizer.state[master] |= {"step": step} | zeros | ({EMA: master.detach().clone()} if ema else {})
    if engine.zero_optimization_stage() in (1, 2):
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def keys(engine, parameter: torch.nn.Parameter) -> tuple[str, ...]:
    """What there is of a parameter; a frozen one has a weight only."""
    if not parameter.requires_grad:
        return (WEIGHT,)
    state = engine.basic_optimizer.state[_masters(engine)[0]]
    return (WEIGHT, *_MOMENTS, *([EMA] if EMA in state else []))


@torch.no_grad()
def full(engine, parameter: torch.nn.Parameter, key: str) -> torch.Tensor:
    """The whole tensor in float32, on the engine's device; all ranks must ask for it. Not to be written to."""
    stage = engine.zero_optimization_stage()
    if not parameter.requires_grad:
        with deepspeed.zero.GatheredParameters([parameter], enabled=stage == 3):
            return parameter.detach().float().clone()
    if stage == 0:
        return parameter.detach() if key == WEIGHT else engine.basic_optimizer.state[parameter][key]
    if key == WEIGHT:
        return safe_get_full_fp32_param(parameter)
    return safe_get_full_optimizer_state(parameter, key)


def full_weights(engine, key: str = WEIGHT) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and whole weights (or with EMA their averages), one after another; all ranks must go through them."""
    for name, parameter in engine.module.named_parameters():
        yield name, full(engine, parameter, key if parameter.requires_grad else WEIGHT)


@torch.no_grad()
def restore(engine, read: Callable[[str, str], torch.Tensor], num_updates: int) -> None:
    """Sets everything from `read(name of the parameter, key)`, whole tensors, and AdamW's count of updates."""
    for name, parameter in engine.module.named_parameters():
        for key in keys(engine, parameter):
            _set(engine, parameter, key, read(name, key).to(engine.device))
    for master in _masters(engine):
        engine.basic_optimizer.state[master]["step"].fill_(num_updates)
    stage = engine.zero_optimization_stage()
    if stage in (1, 2):
        engine.optimizer.update_lp_params()
    elif stage == 3:
        engine.optimizer.checkpoint_event_epilogue()


def num_updates(engine) -> int:
    """Steps that AdamW has made."""
    return int(engine.basic_optimizer.state[_masters(engine)[0]]["step"])


@torch.no_grad()
def update_ema(engine, decay: float) -> None:
    """Moves the averages towards the weights. The decay rises to its value as (1 + n) / (10 + n) over the updates n,
    so that the weights of the beginning are soon forgotten."""
    n, masters = num_updates(engine), _masters(engine)
    averages = [engine.basic_optimizer.state[master][EMA] for master in masters]
    torch._foreach_lerp_(averages, masters, 1 - min(decay, (1 + n) / (10 + n)))


def _masters(engine) -> list[torch.Tensor]:
    """The fp32 tensors that AdamW updates on this rank: parameters at stage 0, flat partitions of them above."""
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
    return list(
        engine.optimizer.fp32_partitioned_groups_flat
        if stage == 3
        else engine.optimizer.single_partition_of_fp32_groups
    )


def _set(engine, parameter: torch.nn.Parameter, key: str, value: torch.Tensor) -> None:
    stage = engine.zero_optimization_stage()
    if key != WEIGHT:
        if stage == 0:
            engine.basic_optimizer.state[parameter][key].copy_(value)
        else:
            safe_set_full_optimizer_state(parameter, value, key)
        return
    if stage and parameter.requires_grad:
        safe_set_full_fp32_param(parameter, value)
    if stage in (1, 2) and parameter.requires_grad:
        return  # `restore` copies all masters to the weights at once
    # At stage 3 the rank that modifies a gathered parameter hands it to the others.
    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=stage == 3):
        parameter.copy_(value)
