"""One loss curve: whatever the ZeRO stage, the number of ranks, the accumulation, and the interruptions."""

import math
import shutil

import pytest
import torch

from contract.artifacts import open_artifact
from tests import tiny
from tests.trainer import runs
from trainer import loader, model
from trainer.inputs import read_catalog

# 20 AdamW steps in float32; sums are taken in another order. Differences of up to 2e-7 have been seen.
TOLERANCE = {"rel": 5e-5}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with corpus/ and gid/."""
    return runs.write_data(tmp_path_factory.mktemp("exact") / "data")


@pytest.fixture
def new_work(data, tmp_path):
    """A function (name) -> a work folder on the same data."""

    def make(name):
        return shutil.copytree(data, tmp_path / name)

    return make


@pytest.fixture(scope="module")
def expected(data, group):
    """The losses of 20 steps of ZeRO 1 on one rank."""
    return runs.fit(data)[0]["train/loss"]


def plain_losses(data, **settings):
    """The losses of a loop of PyTorch alone, from the same weights and batches."""
    config = tiny.tiny_config(data, train__max_steps="20", **settings)
    corpus = open_artifact(config, "corpus")
    catalog = read_catalog(corpus, open_artifact(config, "gid"))
    torch.manual_seed(config.seed)
    net = model.ColaRec(model.model_config(config, catalog))
    plain = [p for name, p in net.named_parameters() if p.ndim == 2 and "block" in name and "bias" not in name]
    rest = [p for p in net.parameters() if not any(p is q for q in plain)]
    groups = [{"params": plain, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (20 - step) / 19 if step else 1.0)
    shards, epoch_steps = loader.shard_paths(corpus, "train"), loader.steps_per_epoch(config, corpus)
    losses = []
    for (batch,) in loader.TrainBatches(config, catalog, shards, 0, 1, range(20), epoch_steps):
        loss = net(batch)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_plain_pytorch_gives_the_same_losses(data, expected):
    assert len(expected) == 20
    assert plain_losses(data) == pytest.approx(expected, **TOLERANCE)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_zero_stages_give_the_same_losses(new_work, expected, stage):
    record, _ = runs.fit(new_work("stage"), {"train.zero_stage": str(stage)})
    assert record["train/loss"] == pytest.approx(expected, **TOLERANCE)
    assert all(0 < norm < math.inf for norm in record["train/grad_norm"])


def test_accumulation_gives_the_losses_of_the_whole_batch(new_work, expected):
    record, _ = runs.fit(new_work("micro"), {"train.micro_tokens": "150"})
    assert record["train/loss"] == pytest.approx(expected, **TOLERANCE)


def test_two_ranks_and_resuming_anywhere_give_the_same_losses(new_work, expected, tmp_path):
    one = runs.fit(new_work("one"), {"train.zero_stage": "0"}, stop=8)[0]
    assert len(one["train/loss"]) == 8
    for name in ("two", "three", "broken"):
        shutil.copytree(tmp_path / "one", tmp_path / name)
    for stage in ("0", "1", "2", "3"):
        new_work(f"whole-{stage}")
    whole = [{"name": f"whole-{stage}", "set": {"train.zero_stage": stage}} for stage in ("0", "1", "2", "3")]
    rest = [
        {"name": "two", "set": {"train.zero_stage": "2"}, "resume": True},
        {"name": "three", "set": {"train.zero_stage": "3", "train.micro_tokens": "150"}, "resume": True, "stop": 14},
        {"name": "broken", "set": {"train.zero_stage": "1"}, "resume": True, "stop": 14},
        {"name": "broken", "set": {"train.zero_stage": "1"}, "resume": True},
        {"name": "two-unbroken", "set": {"train.zero_stage": "1"}, "resume": True},
    ]
    shutil.copytree(tmp_path / "one", tmp_path / "two-unbroken")
    records = [record["train/loss"] for record in runs.on_ranks(2, tmp_path, whole + rest)]
    for losses in records[:4]:
        assert losses == pytest.approx(expected, **TOLERANCE)
    two, three, broken, mended, unbroken = records[4:]
    assert two == pytest.approx(expected[8:], **TOLERANCE)
    assert three == pytest.approx(expected[8:14], **TOLERANCE)
    assert broken + mended == unbroken  # to the bit, at the same number of ranks
    back, _ = runs.fit(tmp_path / "three", {"train.zero_stage": "1"}, resume=True)
    assert back["train/loss"] == pytest.approx(expected[14:], **TOLERANCE)


def test_causal_attention_has_one_loss_curve_too(data, new_work, tmp_path):
    settings = {"history.attention": "causal"}
    expected = runs.fit(new_work("whole"), settings)[0]["train/loss"]
    assert plain_losses(data, history__attention="causal") == pytest.approx(expected, **TOLERANCE)
    cut = settings | {"train.zero_stage": "3", "train.micro_tokens": "60"}
    first = runs.fit(new_work("cut"), cut, stop=8)[0]["train/loss"]
    new_work("ranks")
    again = [{"name": "ranks", "set": settings}, {"name": "cut", "set": cut, "resume": True}]
    two, rest = (record["train/loss"] for record in runs.on_ranks(2, tmp_path, again))
    assert two == pytest.approx(expected, **TOLERANCE)
    assert len(first) == 8
    assert first + rest == pytest.approx(expected, **TOLERANCE)


def test_the_random_items_of_all_ranks_are_those_of_one_rank(new_work, tmp_path):
    """For the softmax, and for the decoder, which learns from it."""
    settings = {"loss.softmax": "1", "loss.bpr": "0"}
    one, _ = runs.fit(new_work("softmax-1"), settings)
    new_work("softmax-2")
    [two] = runs.on_ranks(2, tmp_path, [{"name": "softmax-2", "set": settings | {"train.zero_stage": "2"}}])
    assert one["train/softmax"][0] > 2
    for name in ("softmax", "rec", "loss", "grad_norm"):
        assert two[f"train/{name}"] == pytest.approx(one[f"train/{name}"], **TOLERANCE), name
