"""The loop: learning rates, validation and what is kept of it, early stopping, steps that are left out."""

import itertools
import json
import math
import shutil
import signal

import numpy as np
import pytest
import safetensors.torch
import torch

from contract import config as config_module
from contract.artifacts import open_artifact
from tests import tiny
from tests.trainer import runs
from trainer import dense, engine_state, loader, samples
from trainer.inputs import read_catalog
from trainer.model import ColaRec
from trainer.neighbours import Neighbours
from trainer.training import SIGNALS, learning_rate
from trainer.validation import OF_NEIGHBOURS, WEIGHTS, validate


@pytest.fixture(scope="module")
def data(tmp_path_factory, group):
    return runs.write_data(tmp_path_factory.mktemp("training") / "data")


@pytest.fixture
def work(data, tmp_path):
    return shutil.copytree(data, tmp_path / "work")


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", [0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]),
        ("constant", [0.5, 1.0, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("cosine", [0.5, 1.0, *((1 + math.cos(math.pi * k / 8)) / 2 for k in range(8))]),
    ],
)
def test_learning_rates(tmp_path, schedule, expected):
    config = tiny.tiny_config(tmp_path, train__schedule=schedule, train__warmup="0.2", train__lr="1")
    assert [learning_rate(config, step, 10) for step in range(10)] == pytest.approx(expected)


def ranks(score, batch):
    """The rank of each user's target, from 0, by the scores (B, 40) of all items but those seen."""
    score = score.clone()
    score[batch["seen_row"], batch["seen_item"] - 1] = -math.inf
    target = score[batch["pair_row"], batch["pair_item"] - 1]
    return (score > target[:, None]).sum(1).tolist()


def ndcg_at_10(ranks):
    return np.mean([(rank < 10) / math.log2(rank + 2) for rank in ranks])


@pytest.fixture
def valid_room(tmp_path, group):
    """A function (**overrides) -> (config, corpus, catalog, an untrained model, valid batches)."""

    def make(**overrides):
        every = {"train__eval_beams": "40", "train__eval_users": "0"}
        config, corpus, catalog, net = tiny.tiny_room(tmp_path / "work", **every, **overrides)
        tiny.move_from_start(net)  # far from uniform, so that ranks do not hang on rounding
        batches = list(loader.eval_batches(config, catalog, corpus, "valid", 7, 0, 1))
        return config, corpus, catalog, net, batches

    return make


@pytest.mark.parametrize("attention", ["full", "causal"])
def test_validation_equals_the_ranking_of_all_items(valid_room, attention):
    config, corpus, catalog, net, batches = valid_room(history__attention=attention)
    found = validate(config, corpus, catalog, net, torch.device("cpu"), lambda: None)
    losses, places = [], []
    for batch in batches:
        log_p = tiny.log_p_of_all_items(config, net, catalog, batch)
        losses += (-log_p[batch["pair_row"], batch["pair_item"] - 1].mean(1)).tolist()
        places += ranks(log_p.sum(-1), batch)
    assert found["num_users"] == len(places) == 60
    assert found["rec"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert found["recall@10"] == pytest.approx(np.mean([rank < 10 for rank in places]))
    assert found["ndcg@10"] == pytest.approx(ndcg_at_10(places))
    assert "hybrid" not in found


def test_validation_chooses_the_weights_that_rank_best(valid_room):
    unset = {"eval__hybrid": "-1", "eval__neighbours": "-1"}
    config, corpus, catalog, net, batches = valid_room(history__attention="causal", **unset)
    table = Neighbours(catalog.neighbours, torch.ones(41, dtype=torch.bool))
    v = dense.item_vectors(config, net, catalog, torch.device("cpu"), np.arange(1, 41), "v")
    ndcg = {}
    for weight, of_neighbours in itertools.product(WEIGHTS, OF_NEIGHBOURS):
        places = []
        for batch in batches:
            h = net.encode(batch["user"])[torch.arange(len(batch["user_idx"])), batch["user"]["eos"]]
            c = table.of(batch["user"]["item"]).scores(torch.arange(1, 41).repeat(len(h), 1))
            log_p = tiny.log_p_of_all_items(config, net, catalog, batch).sum(-1)
            places += ranks((log_p + weight * (h @ v.T)) / (1 + weight) + of_neighbours * c, batch)
        ndcg[weight, of_neighbours] = ndcg_at_10(places)
    best = max(ndcg, key=ndcg.get)
    assert len(set(ndcg.values())) > 10  # the weights matter

    found = validate(config, corpus, catalog, net, torch.device("cpu"), lambda: None)
    assert (found["hybrid"], found["neighbours"]) == best
    assert found["ndcg@10"] == pytest.approx(ndcg[best])
    for mode in ("generative", "dense"):
        alone = config_module.replace(config, {"eval.mode": mode})
        half = validate(alone, corpus, catalog, net, torch.device("cpu"), lambda: None)
        assert found[f"{mode}_ndcg@10"] == pytest.approx(half["ndcg@10"])
        assert not half.keys() & {"hybrid", "neighbours"}
    worst = min((weights for weights in ndcg if any(weights)), key=ndcg.get)  # without any it is no hybrid
    given = config_module.replace(config, {"eval.hybrid": worst[0], "eval.neighbours": worst[1]})  # stand, as set
    found = validate(given, corpus, catalog, net, torch.device("cpu"), lambda: None)
    assert (found["hybrid"], found["neighbours"]) == worst
    assert found["ndcg@10"] == pytest.approx(ndcg[worst])


def test_the_sample_is_the_same_at_any_number_of_ranks(data):
    config = tiny.tiny_config(data, train__eval_users="17")
    corpus = open_artifact(config, "corpus")
    catalog = read_catalog(corpus, open_artifact(config, "gid"))
    sample = loader.eval_sample(config, corpus, "valid")
    seen = []
    for world_size in (1, 2, 5):
        ranks = [
            list(loader.eval_batches(config, catalog, corpus, "valid", 3, rank, world_size, sample))
            for rank in range(world_size)
        ]
        assert len({len(batches) for batches in ranks}) == 1
        users = np.concatenate([batch["user_idx"].numpy() for batches in ranks for batch in batches])
        targets = sum(len(batch["pair_row"]) for batches in ranks for batch in batches)
        seen.append((sorted(users[users > 0]), targets))
    assert seen[0] == seen[1] == seen[2]
    assert len(set(seen[0][0])) == seen[0][1] == 17
    other = loader.eval_sample(tiny.tiny_config(data, train__eval_users="17", seed="2"), corpus, "valid")
    assert not all(np.array_equal(one, two) for one, two in zip(sample, other, strict=True))


@pytest.mark.parametrize("codebooks", ["prefix", "level"])
def test_a_rank_with_fewer_batches_than_another_validates_the_same(valid_room, monkeypatch, codebooks):
    config, corpus, catalog, net, _ = valid_room(history__attention="causal", model__codebooks=codebooks)
    alone = validate(config, corpus, catalog, net, torch.device("cpu"), lambda: None)
    calls, own_batches = [], loader.num_eval_batches
    monkeypatch.setattr(loader, "num_eval_batches", lambda *args: own_batches(*args) + 2)
    assert validate(config, corpus, catalog, net, torch.device("cpu"), lambda: calls.append(1)) == alone
    assert len(calls) == own_batches(corpus, "valid", config.eval.batch, 1, None) + 2


def test_users_are_taken_with_their_events(data):
    config = tiny.tiny_config(data)
    block = samples.read_shard(loader.shard_paths(open_artifact(config, "corpus"), "valid")[1])
    taken = samples.take_users(block, np.array([0, 3, 4]))
    assert taken.user_idx.tolist() == block.user_idx[[0, 3, 4]].tolist()
    for row, source in enumerate([0, 3, 4]):
        part, whole = taken.row == row, block.row == source
        assert taken.item_idx.values[part].tolist() == block.item_idx.values[whole].tolist()
        assert taken.ts[part].tolist() == block.ts[whole].tolist()
        assert taken.is_target[part].tolist() == block.is_target[whole].tolist()


def test_the_best_weights_by_ndcg_are_kept_and_patience_ends_the_run(work):
    settings = {"train.eval_every": "20", "train.patience": "1", "train.max_steps": "900", "train.lr": "1e-2"}
    settings |= {"train.log_every": "50", "history.attention": "causal", "eval.hybrid": "-1"}
    record, training = runs.fit(work, settings)
    ndcg = record["valid/ndcg@10"]
    assert 4 < len(ndcg) < 100
    best = int(np.argmax(ndcg))
    assert len(ndcg) == best + 1 + 1  # validations: of the start, and after each 20 steps
    assert training.state["best"]["step"] == 20 * best
    assert training.state["best"]["ndcg@10"] == max(ndcg)

    # The weights that were kept give what was measured.
    net = ColaRec(training.engine.module.config)
    net.load_state_dict(safetensors.torch.load_file(training.checkpoints.best))
    device = torch.device("cpu")
    again = validate(training.config, training.corpus, training.catalog, net.eval(), device, lambda: None)
    assert again["ndcg@10"] == pytest.approx(max(ndcg))
    assert again["hybrid"] == training.state["best"]["hybrid"] == record["valid/hybrid"][best]


@pytest.mark.parametrize("stage", ["1", "3"])
def test_averaged_weights_are_validated_kept_and_resumed(work, tmp_path, stage):
    settings = {"train.ema": "0.8", "train.zero_stage": stage, "train.best": "loss", "train.eval_every": "5"}
    other = shutil.copytree(work, tmp_path / "other")
    record, training = runs.fit(work, settings)
    assert training.state["best"]["step"] == 20  # the loss falls
    kept = safetensors.torch.load_file(training.checkpoints.best)
    for key, same in ((engine_state.EMA, True), (engine_state.WEIGHT, False)):
        weights = dict(engine_state.full_weights(training.engine, key))
        assert kept.keys() == weights.keys()
        assert torch.equal(kept["code_vectors.1"], weights["code_vectors.1"]) == same
    first, _ = runs.fit(other, settings, stop=7)
    second, _ = runs.fit(other, settings, resume=True)
    assert first["valid/rec"] + second["valid/rec"] == record["valid/rec"]


def test_steps_that_are_not_finite_are_skipped_up_to_a_limit(work, capsys):
    settings = {"train.lr": "1e30", "train.clip": "1e30", "train.non_finite": "skip", "train.max_skipped": "3"}
    with pytest.raises(ValueError, match=r"at step (\d+).*shard train-0.*3 steps were skipped before"):
        runs.fit(work, settings)
    output = capsys.readouterr().out
    assert "loss nan  " not in output  # what was left out is in no mean
    lines = [line for line in output.splitlines() if "skipped: the" in line]
    assert len(lines) == 3
    assert all("rank 0" in line for line in lines)
    with pytest.raises(ValueError, match=r"the weights are as before that step. A lower --train.lr"):
        runs.fit(work, settings | {"train.non_finite": "stop"})


def test_what_is_logged(work):
    record, training = runs.fit(work, {"train.max_steps": "3"})
    assert record["train/lr"] == pytest.approx([3e-3, 3e-3, 1.5e-3])
    names = ("rec", "index", "bpr", "contrastive", "loss", "grad_norm", "memory_gb")
    assert all(min(record[f"train/{name}"]) > 0 for name in names)
    # Counted again from the batches: positions of the encoder that do not pad.
    config, corpus = training.config, training.corpus
    batches = loader.TrainBatches(
        config, training.catalog, training.shards, 0, 1, range(3), loader.steps_per_epoch(config, corpus)
    )
    for (batch,), padding in zip(batches, record["train/padding_share"], strict=True):
        sides = [batch[name] for name in ("user", "item")]
        tokens = sum(int(side["mask"].sum()) for side in sides)
        positions = sum((end - begin) * width for side in sides for begin, end, width in side["groups"])
        assert padding == pytest.approx(1 - tokens / positions)
    assert json.dumps(training.state)  # for state.json and the manifest


def test_signals_are_heeded_in_training_only(work):
    before = [signal.getsignal(number) for number in SIGNALS]
    runs.fit(work, {"train.max_steps": "2"})
    assert [signal.getsignal(number) for number in SIGNALS] == before
