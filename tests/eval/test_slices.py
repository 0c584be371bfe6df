"""Slices of literal users and targets."""

import numpy as np
import pytest

from contract.schema import NO_TIME
from eval import metrics, slices
from eval.users import EvalUsers
from tests.eval.rows import ragged

DAY = 86_400_000
NUM_TRAIN = np.array([0, 6, 3, 2, 1, 0])  # of items 0 (none) to 5


def users(**changes) -> EvalUsers:
    """Four users with one, two, one and one targets."""
    fields = {
        "user_idx": np.array([1, 2, 3, 4]),
        "history": ragged([[1] * 7, [2], [], [3, 4]]),
        "targets": ragged([[1], [3, 5], [2], [4]]),
        "last_ts": np.array([0, 10, NO_TIME, 20]) * np.array([DAY, DAY, 1, DAY]),
        "target_ts": np.array([1, 12, 13, 15, 50]) * DAY,
        "target_event": np.array([1, 2, 1, 0, 1], np.int8),
    }
    return EvalUsers(**fields | changes)


def kept(of: EvalUsers, **options) -> dict[str, list[int]]:
    """{kind/name: places of the kept targets}."""
    arguments = {"num_train": NUM_TRAIN, "events": ["view", "buy/x"], "has_time": True} | options
    found = slices.read_slices(of, **arguments)
    return {f"{one.kind}/{one.name}": np.flatnonzero(one.kept).tolist() for one in found}


def test_slices_of_users_and_of_targets():
    assert kept(users()) == {
        "history/0": [3],
        "history/1-4": [1, 2, 4],
        "history/5-9": [0],
        "activity/long_tail": [1, 2, 3],  # users 2 and 3
        "activity/other_half": [0, 4],
        "recency/q1": [0],  # a day; user 3 has no history
        "recency/q2": [1, 2],  # two days, of the first target
        "recency/q3": [4],  # thirty
        "popularity/head": [0],  # 6 of 12 train events; the first third is within
        "popularity/mid": [3],
        "popularity/tail": [1, 4],
        "popularity/cold": [2],
        "event/view": [0, 2, 4],
        "event/buy_x": [1],
    }


def test_a_kind_that_divides_nothing_is_left_out():
    alike = users(history=ragged([[1], [2], [3], [3]]), target_event=np.ones(5, np.int8))
    found = kept(alike, has_time=False)
    assert {name.split("/")[0] for name in found} == {"activity", "popularity"}
    assert found["activity/long_tail"] == [0, 1, 2]  # ties by user_idx
    assert "event/view" not in kept(alike, events=["view"])


def test_without_times_of_targets_recency_is_to_the_end_of_the_log():
    found = kept(users(target_ts=np.full(5, NO_TIME)))
    # 20, 10 and 0 days before the last event of all
    assert [found[f"recency/q{i}"] for i in (1, 2, 3)] == [[4], [1, 2], [0]]
    nothing = kept(users(target_ts=np.full(5, NO_TIME), last_ts=np.full(4, NO_TIME)))
    assert not [name for name in nothing if name.startswith("recency")]


def test_quarters_are_of_like_size_and_do_not_divide_equal_times():
    rng = np.random.default_rng(0)
    last = rng.permutation(1000) * DAY
    many = EvalUsers(
        np.arange(1, 1001),
        ragged([[1]] * 1000),
        ragged([[2]] * 1000),
        last,
        np.full(1000, 1000 * DAY),
        np.ones(1000, np.int8),
    )
    parts = slices.by_recency(many)
    assert [mask.sum() for _, _, mask in parts] == [250] * 4
    assert parts[0][1] == "last seen up to 250.0 days before"
    assert (many.last_ts[parts[0][2]] >= 750 * DAY).all()
    equal = slices.by_recency(EvalUsers(**vars(many) | {"last_ts": np.where(last < 600 * DAY, 0, last)}))
    assert [mask.sum() for _, _, mask in equal] == [250, 150 + 600, 0, 0]


def test_thirds_of_the_train_events():
    num_train = np.array([0, 1, 10, 1, 4, 4, 4, 0, 6])
    parts = slices.by_popularity(num_train, np.arange(1, 9))
    assert {name: (np.flatnonzero(mask) + 1).tolist() for name, _, mask in parts} == {
        "head": [2],
        "mid": [4, 8],
        "tail": [1, 3, 5, 6],
        "cold": [7],
    }
    assert parts[0][1] == "the 1 most popular items, 10 to 10 train events each"
    assert parts[3][1] == "the 1 items without train events"


@pytest.mark.parametrize(
    ("ms", "text"), [(0, "0 s"), (59_000, "59 s"), (90_000, "1.5 min"), (3_600_000, "1.0 h"), (DAY * 3, "3.0 days")]
)
def test_durations(ms, text):
    assert slices.duration(ms) == text


def test_measured_slices():
    of = users()
    lists = {
        name: metrics.read_lists(np.array(items, np.int32), of.targets, [1, 2], NUM_TRAIN)
        for name, items in {"ours": [[1, 2], [5, 3], [1, 2], [1, 2]], "other": [[0, 0]] * 4}.items()
    }
    found = slices.measure(lists, of, slices.read_slices(of, NUM_TRAIN, ["view", "buy"], True), 2, seed=1)
    by_name = {f"{one['kind']}/{one['name']}": one for one in found}
    tail = by_name["popularity/tail"]
    assert (tail["num_users"], tail["num_targets"]) == (2, 2)
    assert tail["models"]["ours"]["recall@2"]["mean"] == 0.5  # item 3 at rank 2 of user 2; item 4 of user 4 is missed
    assert tail["models"]["ours"]["ndcg@2"]["mean"] == pytest.approx(0.5 / np.log2(3))
    assert tail["lead"]["recall@2"]["over"] == "other"
    long_tail = by_name["activity/long_tail"]
    assert (long_tail["num_users"], long_tail["num_targets"]) == (2, 3)
    assert long_tail["models"]["ours"]["recall@2"] == {"mean": 1, "low": 1, "high": 1}
    assert list(tail["models"]["ours"]) == ["recall@2", "ndcg@2"]
