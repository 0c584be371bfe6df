import random
from collections import Counter

import pytest

from etl import clean

MS_2020 = 1_577_836_800_000


def test_times_that_cannot_be_true_get_a_reason(log):
    rows = log(("u", "a", MS_2020), ("u", "b", 5), ("u", "c", MS_2020 + 2 * clean.MS_PER_DAY), ("u", "d", None))
    marked = clean.mark_bad(rows, "ms", now_ms=MS_2020).collect()
    assert [r.reason for r in marked] == [None, "timestamp before 1995", "timestamp in the future", None]
    assert '"item_id":"b"' in marked[1].raw
    positions = clean.mark_bad(rows, "order", now_ms=MS_2020).collect()
    assert [r.reason for r in positions] == [None] * 4


def test_profile_counts_rows_by_reason_and_event(log):
    rows = log(("u", "a", 5, "view"), ("u", "b", MS_2020, "view"), ("u", "c", MS_2020, "cart"), ("v", "c", MS_2020))
    found = clean.profile(clean.mark_bad(rows, "ms", now_ms=MS_2020), "log")
    assert (found.num_read, found.num_good, found.bad) == (4, 3, {"timestamp before 1995": 1})
    assert found.num_by_event == {"": 1, "cart": 1, "view": 1}
    with pytest.raises(ValueError, match="the log is empty"):
        clean.profile(rows.limit(0), "log")


def test_too_many_bad_rows_stop_the_job():
    found = clean.Profile(100, {"no user id": 3, "no item id": 2}, {"no user id": "X", "no item id": "Y"}, {"": 95})
    clean.check_bad_share(found, "log", 0.05)
    with pytest.raises(ValueError, match=r"5 of the 100 rows of the log .*5\.00%.*\n.*3 x no user id, such as: X"):
        clean.check_bad_share(found, "log", 0.049)
    with pytest.raises(ValueError, match="unusable"):
        clean.check_bad_share(clean.Profile(2, {"no user id": 2}, {"no user id": "X"}, {}), "log", 1.0)


def test_free_text_is_no_event_type(log):
    with pytest.raises(ValueError, match=r"data\.event_column holds 1,000 types or more"):
        clean.profile(log(*(("u", "a", n, f"free text {n}") for n in range(1000))), "log")


def test_event_types():
    found = clean.Profile(3, {}, {}, {"": 1, "cart": 1, "view": 1})
    assert clean.event_types(found, ()) == ["cart", "view"]
    assert clean.event_types(found, ("view", "buy")) == ["view", "buy"]
    many = clean.Profile(128, {}, {}, {f"type {n}": 1 for n in range(128)})
    assert clean.event_types(many, ("type 3",)) == ["type 3"]
    with pytest.raises(ValueError, match="128 event types, at most 127"):
        clean.event_types(many, ())
    with pytest.raises(ValueError, match=r"etl\.events .*the log holds: none \(1\), cart \(1\), view \(1\)"):
        clean.event_types(found, ("buy",))


def merged(rows, types=(), only_listed=False, repeats="first"):
    events = clean.merge_repeats(rows, list(types), only_listed, repeats)
    return {(e.user_id, e.item_id, e.ts, e.event, e.split, e.order.row) for e in events.collect()}


def test_first_keeps_the_first_time_and_the_strongest_event(log):
    rows = log(("u", "a", 3, "buy"), ("u", "a", 1, "view"), ("u", "a", 1, "view"), ("v", "a", 2, "scroll"))
    assert merged(rows, ["view", "buy"], only_listed=True) == {("u", "a", 1, 2, None, 1)}
    counts = clean.count_merged(clean.with_age(clean.merge_repeats(rows, ["view", "buy"], True, "first")), 4, 1000)
    assert counts == {
        "num_filtered": 1, "num_duplicates": 1, "num_in_earlier_split": 0, "num_repeats": 1,
        "num_over_limit": 0, "num_events": 1,
    }  # fmt: skip


def test_keep_drops_only_exact_duplicates(log):
    rows = log(("u", "a", 3, "x"), ("u", "a", 1, "x"), ("u", "a", 1, "x"), ("u", "a", 1, "y"))
    assert merged(rows, ["x", "y"], repeats="keep") == {
        ("u", "a", 3, 1, None, 0), ("u", "a", 1, 1, None, 1), ("u", "a", 1, 2, None, 3)
    }  # fmt: skip


def test_an_item_in_two_given_splits_stays_in_the_earlier(log):
    rows = log(("u", "a", None, None, 2), ("u", "a", 9, None, 0), ("u", "b", None, None, 1), ("u", "b", None, None, 2))
    assert merged(rows) == {("u", "a", 9, 0, 0, 1), ("u", "b", None, 0, 1, 2)}
    counts = clean.count_merged(clean.with_age(clean.merge_repeats(rows, [], False, "first")), 4, 1000)
    assert (counts["num_in_earlier_split"], counts["num_repeats"], counts["num_events"]) == (2, 0, 2)


def test_age_breaks_ties_by_input_order(log):
    rows = log(("u", "z", 1), ("u", "a", 1), ("u", "m", 0))
    events = clean.with_age(clean.merge_repeats(rows, [], False, "first"))
    assert {e.item_id: e.age for e in events.collect()} == {"a": 1, "z": 2, "m": 3}
    assert clean.count_merged(events, 3, max_user_events=2)["num_over_limit"] == 1


def brute_force_core(pairs, min_user, min_item):
    while True:
        users, items = Counter(u for u, _ in pairs), Counter(i for _, i in pairs)
        left = {(u, i) for u, i in pairs if users[u] >= min_user and items[i] >= min_item}
        if left == pairs:
            return pairs
        pairs = left


@pytest.mark.parametrize(("min_user", "min_item"), [(3, 4), (4, 0)])
def test_k_core_is_the_fixed_point(log, min_user, min_item):
    rng = random.Random(3)
    pairs = {(f"u{rng.randrange(40)}", f"i{int(rng.paretovariate(0.7)) % 60}") for _ in range(190)}
    expected = brute_force_core(pairs, min_user, min_item)
    assert 0 < len(expected) < len(pairs)
    events = clean.merge_repeats(log(*((u, i, 1) for u, i in sorted(pairs))), [], False, "first").persist()
    rounds = list(clean.k_core(events, min_user, min_item))
    core, num_users, num_items = rounds[-1]
    assert {(e.user_id, e.item_id) for e in core.collect()} == expected
    assert (num_users, num_items) == (len({u for u, _ in expected}), len({i for _, i in expected}))
    if min_item:
        assert len(rounds) > 2  # one pass would not have been enough


def test_k_core_may_leave_nothing(log):
    events = clean.merge_repeats(log(("u", "a", 1), ("u", "b", 2)), [], False, "first").persist()
    *_, (_, num_users, _) = clean.k_core(events, 3, 2)
    assert num_users == 0
