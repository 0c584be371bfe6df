"""An engine's state as whole tensors, at every ZeRO stage. `tests/trainer/test_exact.py` has several ranks."""

import math

import deepspeed
import pytest
import torch

from trainer import distributed, engine_state

pytestmark = pytest.mark.usefixtures("group")
STAGES = (0, 1, 2, 3)


def new_engine(stage, bf16=False):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(7, 33), torch.nn.ReLU(), torch.nn.Linear(33, 5), torch.nn.Linear(5, 1))
    model[2].weight.requires_grad_(False)  # as the frozen weights under LoRA
    groups = distributed.parameter_groups(model, 0.1)
    groups = [group | {"params": [p for p in group["params"] if p.requires_grad]} for group in groups]
    settings = {
        "train_batch_size": 4,
        "gradient_clipping": 0.05,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": bf16},
        "steps_per_print": 10**9,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(groups, lr=1e-2), config=settings)
    if stage == 0:
        distributed._clip_and_tell(engine, 0.05)
    engine_state.create(engine, ema=True)
    return engine


def advance(engine, seeds, factor=1.0):
    """Steps on random batches; returns losses and gradient norms."""
    seen = []
    for seed in seeds:
        x = torch.randn(4, 7, generator=torch.Generator().manual_seed(seed))
        loss = engine(x.to(next(engine.module.parameters()).dtype)).float().square().mean() * factor
        engine.backward(loss)
        engine.step()
        seen.append((loss.item(), float(engine.get_global_grad_norm())))
    return seen


def everything(engine):
    return {
        (name, key): engine_state.full(engine, parameter, key).clone()
        for name, parameter in engine.module.named_parameters()
        for key in engine_state.keys(engine, parameter)
    }


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("bf16", [False, True])
def test_what_one_stage_saved_another_goes_on_from(bf16):
    stages = STAGES[1:] if bf16 else STAGES
    first = new_engine(stages[0], bf16)
    fresh = everything(first)
    assert ("2.weight", "weight") in fresh
    assert ("2.weight", "exp_avg") not in fresh
    advance(first, range(3))
    state = everything(first)
    assert all(len(state[key].shape) == len(fresh[key].shape) for key in fresh)
    ends = {}
    for stage in stages:
        engine = new_engine(stage, bf16)
        engine_state.restore(engine, lambda name, key: state[name, key], num_updates=3)
        assert equal(everything(engine), state)
        assert engine_state.num_updates(engine) == 3
        ends[stage] = advance(engine, range(3, 6))
    expected = advance(first, range(3, 6))
    assert ends[stages[0]] == expected  # to the bit
    for stage in stages:
        assert torch.allclose(torch.tensor(ends[stage]), torch.tensor(expected), rtol=1e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_a_gradient_that_is_not_finite_changes_nothing(stage):
    engine, untouched = new_engine(stage), new_engine(stage)
    for one in (engine, untouched):
        advance(one, range(3))
    before = everything(engine)
    [(loss, norm)] = advance(engine, [99], factor=math.nan)
    assert math.isnan(loss)
    assert not math.isfinite(norm)
    assert equal(everything(engine), before)
    assert engine_state.num_updates(engine) == 3
    assert advance(engine, range(3, 6)) == advance(untouched, range(3, 6))


@pytest.mark.parametrize("stage", STAGES)
def test_the_average_follows_its_formula(stage):
    engine = new_engine(stage)
    average = dict(engine_state.full_weights(engine))
    average = {name: weight.clone() for name, weight in average.items()}
    for n in range(1, 6):
        advance(engine, [n])
        engine_state.update_ema(engine, 0.3)
        decay = min(0.3, (1 + n) / (10 + n))
        for name, weight in engine_state.full_weights(engine):
            average[name] = decay * average[name] + (1 - decay) * weight
    for name, found in engine_state.full_weights(engine, engine_state.EMA):
        assert torch.allclose(found, average[name], atol=1e-7), name
        assert not name.startswith("0") or not torch.equal(found, dict(engine_state.full_weights(engine))[name])
