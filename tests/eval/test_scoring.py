"""The scoring half, on the tiny corpus and lists that are made up."""

import dataclasses

import numpy as np
import pytest

from contract.artifacts import Artifact, open_artifact
from contract.cli import Progress
from eval import scoring
from eval.users import read_eval_users
from tests import tiny

NUM_ITEMS = 40


@pytest.fixture
def score(tmp_path):
    """Called with settings: (results, users, lists) of random lists that hold the target of user_idx 1 at rank 3."""

    def with_settings(**overrides):
        config = tiny.tiny_config(tmp_path / "work", eval__baselines="popularity", **overrides)
        tiny.write_corpus(config)
        tiny.write_gids(config)
        counts = {"seconds": 60, "step": 7, "best_epoch": 1}
        training = {"train": dataclasses.asdict(config.train), "world_size": 1, "device": "cpu"}
        model = Artifact(tmp_path, {"counts": counts, "training": training})
        inputs = {name: open_artifact(config, name) for name in ("corpus", "gid")} | {"model": model}
        users = read_eval_users(inputs["corpus"], config.eval.split)
        rng = np.random.default_rng(0)
        lists = 1 + np.argsort(rng.random((len(users), NUM_ITEMS)), axis=1)[:, : max(config.eval.cutoffs)]
        lists[0][lists[0] == users.targets.row(0)[0]] = lists[0, 2]
        lists[0, 2] = users.targets.row(0)[0]
        recommended = {"item_idx": lists.astype(np.int32), "dense": lists[:, ::-1].astype(np.int32)}
        return scoring.score(config, inputs, users, recommended, "1 x CPU", Progress("eval")), users, lists

    return with_settings


def test_everything_is_measured_of_every_model(score):
    results, users, lists = score()
    names = [f"{family}@{k}" for family in ("recall", "ndcg", "mrr", "arp") for k in (5, 10, 20)]
    assert list(results.models) == ["ColaRec", "ColaRec, dense", "popularity"]
    for of in results.models.values():
        assert list(of) == [*names, "coverage@5", "coverage@10", "coverage@20"]
    hits = [users.targets.row(i)[0] in lists[i, :10] for i in range(len(users))]
    assert results.models["ColaRec"]["recall@10"]["mean"] == pytest.approx(np.mean(hits))
    assert results.num_users == 60
    assert list(results.lead) == names[:9]
    assert len(results.curves["popularity"]) == 20
    assert results.curves["ColaRec"][9] == pytest.approx(np.mean(hits))
    assert {one["kind"] for one in results.slices} == {"history", "activity", "popularity", "event"}
    for kind in ("history", "activity", "popularity", "event"):
        of_kind = [one for one in results.slices if one["kind"] == kind]
        assert sum(one["num_targets"] for one in of_kind) == 60
        total = sum(one["num_users"] * one["models"]["ColaRec"]["recall@10"]["mean"] for one in of_kind)
        assert total == pytest.approx(np.sum(hits))
    assert results.protocol["targets"].startswith("60; a user's have ")


def test_ottos_metric_is_there_for_ottos_split_alone(score):
    results, users, lists = score(etl__split="otto", etl__events="view,purchase")
    is_view = users.target_event == 1
    hits = np.array([users.targets.row(i)[0] in lists[i] for i in range(len(users))])
    assert results.models["ColaRec"]["otto_view@20"]["mean"] == pytest.approx(hits[is_view].mean())
    assert results.models["ColaRec"]["otto_purchase@20"]["mean"] == pytest.approx(hits[~is_view].mean())
    assert results.lead["otto_view@20"]["over"] == "popularity"
    assert not [name for name in score()[0].models["ColaRec"] if name.startswith("otto")]


def test_lists_too_short_for_ottos_metric_are_said_to_be(score, capsys):
    results, *_ = score(etl__split="otto", etl__events="view,purchase", eval__cutoffs="5")
    assert not [name for name in results.models["ColaRec"] if name.startswith("otto")]
    assert "OTTO's metric is left out: it takes lists of 20" in capsys.readouterr().out
    assert "recall@5" in results.slices[0]["models"]["ColaRec"]
