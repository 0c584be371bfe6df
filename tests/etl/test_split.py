"""Splits against plain Python, OTTO's rules against another writing of them, and what the leak check refuses."""

import collections

import numpy as np
import pyarrow as pa
import pytest

from contract import schema
from contract.schema import CONTEXT, NO_TIME, TEST, TRAIN, VALID
from contract.settings import Etl
from etl import blocks, kcore, split
from tests.etl.small import as_block, as_events, in_parts, random_users

CLICK, CART, ORDER = 1, 2, 3


def splits(block, split_):
    """{user: [(item, split)]}"""
    by_user = iter(split_.tolist())
    return {user: [(row[0], next(by_user)) for row in rows] for user, rows in as_events(block).items()}


def test_leave_one_out():
    block = as_block({
        "one": [(1, 5, 1, 0)],
        "two": [(1, 5, 1, 0), (2, 5, 1, 0)],
        "three": [(1, 5, 1, 0), (2, 5, 1, 0), (3, 5, 1, 0)],  # a tie: the place decides
        "four": [(4, 1, 1, 0), (3, 2, 1, 0), (2, 3, 1, 0), (1, 4, 1, 0)],
    })  # fmt: skip
    assert splits(block, split.leave_one_out(block)) == {
        "one": [(1, TRAIN)],
        "two": [(1, TRAIN), (2, TRAIN)],
        "three": [(1, TRAIN), (2, VALID), (3, TEST)],
        "four": [(4, TRAIN), (3, TRAIN), (2, VALID), (1, TEST)],
    }


def test_by_time_counts_days_back_from_the_last_event():
    at = split.bounds(Etl(test_days=1.5, valid_days=0.5), last_ts=10 * split.MS_PER_DAY)
    assert at == split.Bounds(valid=8 * split.MS_PER_DAY, test=8 * split.MS_PER_DAY + split.MS_PER_DAY // 2)
    block = as_block({"u": [(n, ts, 1, 0) for n, ts in enumerate([3, 10, 11, 20, 21, 30])], "v": [(1, 10, 1, 0)]})
    found = split.by_time(block, split.Bounds(10, 20))
    assert found.tolist() == [TRAIN, TRAIN, VALID, VALID, TEST, TEST, TRAIN]  # the bound itself is before it
    assert found.dtype == np.int8


def test_by_share_gives_each_user_their_share():
    users = {f"u{n}": [(item, item, 1, 0) for item in range(n)] for n in range(1, 60)}
    block = as_block(users)
    found = splits(block, split.by_share(block, (0.7, 0.1, 0.2), seed=3))
    for n in range(1, 60):
        num = collections.Counter(code for _, code in found[f"u{n}"])
        num_valid, num_test = (max(1, round(n * share)) for share in (0.1, 0.2))
        expected = (n - num_valid - num_test, num_valid, num_test) if n >= 3 else (n, 0, 0)
        assert (num[TRAIN], num[VALID], num[TEST]) == expected, n


def test_by_share_draws_at_random_and_the_same_in_any_block():
    users = {f"u{n}": [(item, item, 1, 0) for item in range(20)] for n in range(200)}
    whole = as_block(users)
    found = splits(whole, split.by_share(whole, (0.8, 0.1, 0.1), seed=1))
    apart = {}
    for part in in_parts(users, 5):
        block = as_block(part)
        apart |= splits(block, split.by_share(block, (0.8, 0.1, 0.1), seed=1))
    assert apart == found
    # The order of a user's events has no say.
    turned = as_block({user: rows[::-1] for user, rows in users.items()})
    again = splits(turned, split.by_share(turned, (0.8, 0.1, 0.1), seed=1))
    assert {user: sorted(rows) for user, rows in again.items()} == found
    assert splits(whole, split.by_share(whole, (0.8, 0.1, 0.1), seed=2)) != found
    # 2 of 20 places of each of 200 users: every place is drawn about 20 times, with a standard deviation of 4.
    places = collections.Counter(item for rows in found.values() for item, code in rows if code == TEST)
    assert set(places) == set(range(20))
    assert max(abs(num - 20) for num in places.values()) < 20


def test_what_is_given_stays():
    block = as_block({"u": [(1, 1, 1, TEST), (2, 2, 1, TRAIN)]})
    found, keep = split.assign(block, Etl(split="given"), 1, split.Bounds(0, 0))
    assert (found.tolist(), keep.tolist()) == ([TEST, TRAIN], [True, True])


def test_mixed_is_splitmix64():
    """Against the generator's own words, for one key: x += golden gamma, then the finaliser of Stafford."""

    def reference(state, key, bits=(1 << 64) - 1):
        state = ((state ^ key) + 0x9E3779B97F4A7C15) & bits
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & bits
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & bits
        return state ^ (state >> 31)

    keys = np.array([0, 1, -1, 2**62, -(2**63)])
    assert split.mixed(0, np.zeros(1, np.int64)).tolist() == [0xE220A8397B1DCDAF]  # SplitMix64(0), its first number
    assert split.mixed(7, keys).tolist() == [reference(7, int(key) & (2**64 - 1)) for key in keys]
    assert split.mixed(7, keys, keys[::-1]).tolist() == [
        reference(reference(7, int(a) & (2**64 - 1)), int(b) & (2**64 - 1))
        for a, b in zip(keys, keys[::-1], strict=True)
    ]


# --- OTTO ---


def otto_sessions(users, at):
    """OTTO's first step, event by event: {session: (split, events)}."""
    parts = {}
    for session, events in users.items():
        begin = events[0][1]
        if begin > at.test:
            part, left = TEST, events
        elif begin > at.valid:
            part, left = VALID, [event for event in events if event[1] < at.test]
        else:
            part, left = TRAIN, [event for event in events if event[1] < at.valid]
        if len(left) >= 2:
            parts[session] = (part, left)
    return parts


def otto_known(parts):
    """The second step: of held-out sessions the items that train knows; sessions of one event are left out."""
    known = {event[0] for part, events in parts.values() if part == TRAIN for event in events}
    left = {
        session: (part, events if part == TRAIN else [event for event in events if event[0] in known])
        for session, (part, events) in parts.items()
    }
    return known, {session: (part, events) for session, (part, events) in left.items() if len(events) >= 2}


def otto_labels(rest):
    """The third: the labels of what comes after the context, gathered from its end as OTTO does."""
    click, others = None, {CART: set(), ORDER: set()}
    for item, _, kind, _ in reversed(rest):
        if kind == CLICK:
            click = item
        else:
            others[kind].add(item)
    return {(CLICK, click)} - {(CLICK, None)} | {(kind, item) for kind, items in others.items() for item in items}


def sessions_of_shop(seed):
    """Sessions that begin anywhere in 0..1000 and may last beyond a bound; items repeat, some are rare."""
    rng = np.random.default_rng(seed)
    users = {}
    for session in range(300):
        begin, num = int(rng.integers(1000)), int(rng.integers(1, 12))
        times = begin + np.concatenate([[0], np.sort(rng.integers(0, 80, num - 1))])
        items = np.minimum(rng.exponential(25, num).astype(int), 150)
        kinds = rng.choice([CLICK, CART, ORDER], num, p=[0.6, 0.25, 0.15])
        rows = zip(items.tolist(), times.tolist(), kinds.tolist(), strict=True)
        users[f"s{session}"] = [(*row, 0) for row in rows]
    # At the bounds themselves: the first is of train and loses its event at 700, the second is held out.
    users["at the bound"] = [(1, 690, CLICK, 0), (2, 695, CLICK, 0), (3, 700, CLICK, 0)]
    users["after it"] = [(1, 701, CLICK, 0), (2, 849, CART, 0), (3, 850, CLICK, 0)]
    return users


OTTO = split.Bounds(valid=700, test=850)


def test_ottos_sessions():
    users = sessions_of_shop(1)
    block = as_block(users)
    found, keep = split.sessions(block, OTTO)
    expected = otto_sessions(users, OTTO)
    assert [row[1] for row in expected["at the bound"][1]] == [690, 695]
    assert expected["after it"] == (VALID, users["after it"][:2])
    assert {part for part, _ in expected.values()} == {TRAIN, VALID, TEST}
    left = as_block(users).select(keep)
    assert as_events(left) == {session: events for session, (_, events) in expected.items()}
    assert found[keep].tolist() == [part for part, events in expected.values() for _ in events]


@pytest.mark.parametrize("seed", [1, 2])
def test_ottos_cut(seed):
    sessions = otto_sessions(sessions_of_shop(seed), OTTO)
    known, expected = otto_known(sessions)
    block = as_block({name: [(*row[:3], part) for row in rows] for name, (part, rows) in sessions.items()})
    found = as_events(split.cut_sessions(block, np.isin(block.item, list(known)), seed))
    assert set(found) == set(expected)
    assert sum(len(rows) for _, rows in expected.values()) < sum(len(rows) for _, rows in sessions.values())
    points = collections.Counter()
    for session, (part, events) in expected.items():
        rows = found[session]
        if part == TRAIN:
            assert rows == [(*event[:3], TRAIN) for event in events]
            continue
        context = [row for row in rows if row[3] == CONTEXT]
        targets = [row for row in rows if row[3] != CONTEXT]
        assert rows == [*context, *targets]
        assert {row[3] for row in targets} == {part}
        assert 1 <= len(context) < len(events)
        assert [row[:3] for row in context] == [event[:3] for event in events[: len(context)]]
        rest = events[len(context) :]
        assert {(kind, item) for item, _, kind, _ in targets} == otto_labels(rest)
        assert len(targets) == len(otto_labels(rest))  # each once
        times = [row[1] for row in targets]
        assert times == sorted(times)
        points[len(context)] += len(events) == 6
    assert len([point for point in range(1, 6) if points[point]]) >= 3  # the cut is anywhere


def test_the_cut_of_a_session_does_not_depend_on_its_block():
    sessions = otto_sessions(sessions_of_shop(3), OTTO)
    users = {name: [(*row[:3], part) for row in rows] for name, (part, rows) in sessions.items()}
    whole = split.cut_sessions(as_block(users), np.ones(len(as_block(users).item), bool), 1)
    apart = {}
    for part in in_parts(users, 4):
        block = as_block(part)
        apart |= as_events(split.cut_sessions(block, np.ones(len(block.item), bool), 1))
    assert apart == as_events(whole)


def test_literal_session():
    rows = [(1, 1, CLICK), (2, 2, CART), (3, 3, CLICK), (3, 4, CLICK), (3, 5, CART), (3, 6, CART), (2, 7, ORDER)]
    block = as_block({f"s{n}": [(*row, TEST) for row in rows] for n in range(30)})
    labels = {
        1: [(2, 2, CART), (3, 3, CLICK), (3, 5, CART), (2, 7, ORDER)],
        2: [(3, 3, CLICK), (3, 5, CART), (2, 7, ORDER)],
        3: [(3, 4, CLICK), (3, 5, CART), (2, 7, ORDER)],
        4: [(3, 5, CART), (2, 7, ORDER)],
        5: [(3, 6, CART), (2, 7, ORDER)],
        6: [(2, 7, ORDER)],
    }
    found = as_events(split.cut_sessions(block, np.ones(3, bool), 5))
    seen = set()
    for events in found.values():
        point = sum(row[3] == CONTEXT for row in events)
        seen.add(point)
        assert events == [(*row, CONTEXT) for row in rows[:point]] + [(*row, TEST) for row in labels[point]]
    assert seen == set(range(1, 7))


# --- from blocks to blocks ---


def settled_events(settled, stage):
    found = {}
    for block in settled:
        events = as_events(blocks.read_block(stage, block.name))
        assert len(events) == block.num_users
        found |= events
    return found


def statistics_of(events):
    """{item: (num, num_train, num_train_users, first_ts)} by plain Python."""
    rows = [(user, *row) for user, of_user in events.items() for row in of_user]
    found = {}
    for item in {row[1] for row in rows}:
        of_item = [row for row in rows if row[1] == item]
        train = [row for row in of_item if row[4] == TRAIN]
        times = [row[2] for row in train if row[2] != NO_TIME]
        found[item] = (len(of_item), len(train), len({row[0] for row in train}), min(times, default=NO_TIME))
    return found


def read_statistics(spark, settled, stage):
    rows = split.read_statistics(spark, settled, stage).collect()
    return {row.item: (row["num"], row.num_train, row.num_train_users, row.first_ts) for row in rows}


def test_settle_by_time_after_the_core(spark, tmp_path):
    users = random_users(90, 60, 10, seed=8)
    users["undated"] = [(0, NO_TIME, 1, 0), (1, NO_TIME, 1, 0), (2, NO_TIME, 1, 0)]
    names = [blocks.write_block(as_block(part), tmp_path) for part in in_parts(users, 3)]
    *_, core = kcore.k_core(spark, names, 3, 4, tmp_path)
    at = split.Bounds(500, 700)
    settled = split.settle(spark, names, core.out, Etl(split="temporal", min_user=3, min_item=4), 1, at, tmp_path)
    found = settled_events(settled, tmp_path)
    left, pairs = {}, {(user, row[0]) for user, rows in users.items() for row in rows}
    while True:  # the core, by plain Python
        of_user = collections.Counter(user for user, _ in pairs)
        smaller = {pair for pair in pairs if of_user[pair[0]] >= 3}
        of_item = collections.Counter(item for _, item in smaller)
        smaller = {pair for pair in smaller if of_item[pair[1]] >= 4}
        if smaller == pairs:
            break
        pairs = smaller
    for user, rows in users.items():
        kept = [row for row in rows if (user, row[0]) in pairs]
        if kept:
            left[user] = [(*row[:3], TEST if row[1] > 700 else VALID if row[1] > 500 else TRAIN) for row in kept]
    assert found == left
    assert list(found) == list(left)
    assert read_statistics(spark, settled, tmp_path) == statistics_of(left)


def test_settle_ottos_sessions(spark, tmp_path):
    users = sessions_of_shop(4)
    # A block of which nothing is left: sessions of one event.
    users |= {f"alone {n}": [(1, 900, CLICK, 0)] for n in range(200)}
    names = [blocks.write_block(as_block(part), tmp_path) for part in in_parts(users, 5)]
    etl = Etl(split="otto", repeats="keep", min_user=0, min_item=0)
    settled = split.settle(spark, names, [], etl, 1, OTTO, tmp_path)
    assert len(settled) < len(names)
    found = settled_events(settled, tmp_path)
    _, expected = otto_known(otto_sessions(users, OTTO))
    assert set(found) == set(expected)
    for session, (part, _) in expected.items():
        codes = [row[3] for row in found[session]]
        assert set(codes) == ({TRAIN} if part == TRAIN else {CONTEXT, part})
    known = {row[0] for rows in found.values() for row in rows if row[3] == TRAIN}
    assert {row[0] for rows in found.values() for row in rows} == known
    assert read_statistics(spark, settled, tmp_path) == statistics_of(found)


@pytest.mark.parametrize("method", ["otto", "leave_one_out"])
def test_settle_when_nothing_is_left(spark, tmp_path, method):
    """No user has the two events that are asked for."""
    names = [blocks.write_block(as_block({"u": [(1, 5, 1, 0)]}), tmp_path)]
    etl = Etl(split=method, min_user=2, min_item=0)
    out = list(kcore.k_core(spark, names, 2, 0, tmp_path))[-1].out
    assert split.settle(spark, names, out, etl, 1, OTTO, tmp_path) == []


# --- leaks ---


def sequences(*users):
    """[(item, ts, is_target)] per user -> a table of schema.SEQUENCES; user_idx are 11, 12, .."""
    return pa.table(
        [
            [11 + n for n in range(len(users))],
            [[row[0] for row in rows] for rows in users],
            [[row[1] for row in rows] for rows in users],
            [[1] * len(rows) for rows in users],
            [[row[2] for row in rows] for rows in users],
        ],
        schema=schema.SEQUENCES,
    )


GOOD = [(1, 1, False), (2, 5, False), (3, 5, True)]
COLD = [(7, 9, True)]  # a target without a history


def test_good_sequences_pass():
    split.check_no_leak(sequences(GOOD, COLD), Etl(), TEST)
    undated = [(1, NO_TIME, False), (2, 3, False), (3, NO_TIME, True)]
    split.check_no_leak(sequences(undated), Etl(), TEST)
    several = [(1, 1, False), (2, 5, True), (3, 6, True)]
    split.check_no_leak(sequences(several), Etl(split="temporal"), TEST)
    later = [(1, 9, False), (2, 5, True)]  # the input, or chance, knows no clock
    split.check_no_leak(sequences(later), Etl(split="random"), VALID)
    repeated = [(1, 1, False), (1, 2, False), (1, 3, True)]
    split.check_no_leak(sequences(repeated), Etl(repeats="keep"), VALID)


@pytest.mark.parametrize(
    ("bad", "settings", "what"),
    [
        ([(1, 1, True), (2, 2, False)], {"split": "random"}, "has history after a target"),
        ([(1, 1, False), (2, 2, False)], {}, "has no target"),
        ([(1, 1, False), (2, 2, False), (1, 3, True)], {}, "has an item twice"),
        ([(1, 1, False), (2, 2, True), (3, 3, True)], {}, "has several targets"),
        ([(1, 6, False), (2, 5, True)], {}, "knows of later than its target"),
        ([(1, 6, False), (2, 7, True), (3, 5, True)], {"split": "temporal"}, "knows of later than its target"),
        ([(1, 6, False), (2, 5, True)], {"split": "otto", "repeats": "keep"}, "knows of later than its target"),
    ],
)
def test_leaks_are_refused(bad, settings, what):
    table = sequences(GOOD, COLD, bad, GOOD, bad)
    with pytest.raises(ValueError, match=f"the test split leaks: user_idx 13 {what}, and 1 more do"):
        split.check_no_leak(table, Etl(**settings), TEST)


def test_the_clock_of_all_parts_together():
    good = [{TRAIN: (1, 10), TEST: (21, 30)}, {TRAIN: (2, 9), VALID: (11, 20), CONTEXT: (0, 99)}, {}]
    split.check_clock(good, "temporal")
    split.check_clock([{TEST: (1, 2)}], "otto")
    for leak in ({VALID: (10, 12)}, {TEST: (20, 30)}, {TRAIN: (25, 26)}):
        for method in ("temporal", "otto"):
            with pytest.raises(ValueError, match=f"the {method} split leaks"):
                split.check_clock([*good, leak], method)
        split.check_clock([*good, leak], "leave_one_out")
