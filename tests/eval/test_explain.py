"""The reasons of a recommendation, against histories that are written out."""

import numpy as np
import pytest
import torch

from contract.artifacts import open_artifact, stage_output
from contract.schema import Ragged
from eval import explain
from eval.users import EvalUsers, read_eval_users
from tests import tiny
from tests.eval.rows import ragged
from trainer import inputs, loader, packing, samples
from trainer.export import write_model
from trainer.recommender import Recommender, load

NUM_ITEMS = 8  # recommended to each user


def room(work, order: str):
    """(recommender, corpus, users, what is recommended to all) of an untrained model."""
    config, corpus, _, model = tiny.tiny_room(work, eval__hybrid="0.5", history__order=order)
    with stage_output(config, "model") as output:
        write_model(output.path, model.state_dict(), model.config, "")
        digests = {name: open_artifact(config, name).digest for name in ("corpus", "gid")}
        output.commit({}, digests)
    artifacts = {name: open_artifact(config, name) for name in ("corpus", "gid", "model")}
    recommender = load(config, artifacts, torch.device("cpu"))
    users = read_eval_users(corpus, "test")
    lists = np.zeros((len(users), NUM_ITEMS), np.int32)
    for batch in loader.eval_batches(config, recommender.catalog, corpus, "test", 7, 0, 1):
        found = recommender.recommend({"user": batch["user"]}, NUM_ITEMS)["item_idx"].numpy()
        real = batch["user_idx"].numpy() > 0
        lists[np.searchsorted(users.user_idx, batch["user_idx"].numpy()[real])] = found[real]
    return recommender, corpus, users, lists


@pytest.fixture(scope="module")
def by_time(tmp_path_factory):
    return room(tmp_path_factory.mktemp("time") / "work", "time")


def score(recommender: Recommender, events: list[tuple[int, int, int]], item_idx: int) -> float:
    """Of an item for a history of (item, ts, event), read from a shard as any other would be."""
    items, ts, event = (np.array(values, np.int64) for values in zip(*events, strict=True))
    one = Ragged(items, np.array([0, len(items)]))
    block = samples.Block(np.array([1]), one, ts, event, np.zeros(len(items), bool), "")
    rng = np.random.default_rng(0)
    history = samples.eval_histories(recommender.config, recommender.catalog, block, rng)
    user = packing.to_tensors(inputs.user_inputs(recommender.config, recommender.catalog, history))
    return float(recommender.score({"user": user}, torch.tensor([[item_idx]]))[0, 0])


def test_a_reason_is_the_score_minus_that_of_a_history_without_the_item(by_time):
    recommender, corpus, users, lists = by_time
    rows = np.array([17, 3])
    people = explain.explain(recommender, corpus, users, lists, rows)
    for row, person in zip(rows, people, strict=True):
        known = users.history.row(row)
        assert person.num_known == len(known)
        events = [(event.item_idx, event.ts, event.event) for event in person.history]
        assert [item for item, _, _ in events] == known[-5:].tolist()  # history.eval_items
        assert [(event.item_idx, rank) for event, rank in person.targets] == [
            (target, 1 + lists[row].tolist().index(target) if target in lists[row] else 0)
            for target in users.targets.row(row).tolist()
        ]
        assert [item.item_idx for item in person.recommended] == lists[row].tolist()
        for item in person.recommended:
            assert item.is_target == (item.item_idx in users.targets.row(row))
            whole = score(recommender, events, item.item_idx)
            assert item.score == pytest.approx(whole, abs=1e-4)
            moved = [
                whole - score(recommender, events[:j] + events[j + 1 :], item.item_idx) for j in range(len(events))
            ]
            largest = sorted(range(len(events)), key=lambda j: -abs(moved[j]))[:3]
            assert [change for _, change in item.reasons] == pytest.approx([moved[j] for j in largest], abs=1e-4)
            assert max(abs(change) for _, change in item.reasons) > 1e-3


def test_of_a_set_the_sample_that_was_decoded_is_explained(tmp_path):
    recommender, corpus, users, lists = room(tmp_path / "work", "set")
    rows = np.arange(20)
    people = explain.explain(recommender, corpus, users, lists, rows)
    catalog, config = recommender.catalog, recommender.config
    for batch in loader.eval_batches(config, catalog, corpus, "test", 60, 0, 1):
        for row, user_idx in enumerate(batch["user_idx"].tolist()):
            if user_idx in users.user_idx[rows]:
                seen = batch["user"]["item"][row]
                shown = people[int(user_idx) - 1].history
                assert [event.item_idx for event in shown] == seen[seen > 0].tolist()
    history = explain.without_each(config, catalog, *explain._visible(config, catalog, corpus, np.array([1]))[1])
    first = [event.item_idx for event in people[0].history]
    assert history.item_idx[0].tolist() == first
    assert history.item_idx[2].tolist() == [first[0], *first[2:], 0]
    assert not history.recency.any()


def test_a_user_without_a_history_has_no_reasons(by_time):
    recommender, *_ = by_time
    nothing = np.zeros(0, np.int64)
    block = samples.Block(np.array([1]), ragged([[5]]), nothing, nothing, np.array([True]), "")
    (only,) = explain._reasons(recommender, block, nothing, np.array([5], np.int32), {5})
    assert only.reasons == []
    assert only.is_target


def test_half_of_the_chosen_users_were_hit():
    num = 200
    users = EvalUsers(np.arange(num), ragged([[]] * num), ragged([[2]] * num))
    lists = np.full((num, 12), 1)
    lists[:20, 3], lists[20:40, 11] = 2, 2  # beyond the first 10 is no hit that is shown
    rows = explain.choose_users(users, lists, seed=1)
    assert len(set(rows.tolist())) == 10
    assert (rows < 20).tolist() == [True, False] * 5
    assert rows.tolist() == explain.choose_users(users, lists, seed=1).tolist()
    assert rows.tolist() != explain.choose_users(users, lists, seed=2).tolist()
    lists[2:, 3] = 1
    assert sorted(explain.choose_users(users, lists, seed=1).tolist())[:2] == [0, 1]
    assert len(explain.choose_users(users, lists, seed=1)) == 10
    few = users.take(np.arange(3))
    assert sorted(explain.choose_users(few, lists[:3], seed=1).tolist()) == [0, 1, 2]
