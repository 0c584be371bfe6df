"""The k-core in rounds over blocks, against a fixed point by plain Python."""

import collections
import itertools

import numpy as np
import pytest

from etl import blocks, kcore
from etl.tasks import read_items
from tests.etl.small import as_block, as_events, in_parts, random_users


def fixed_point(users, min_user, min_item):
    """The (user, item) pairs of the k-core: rounds of users, then items, until nothing changes."""
    pairs = {(user, row[0]) for user, rows in users.items() for row in rows}
    while True:
        of_user = collections.Counter(user for user, _ in pairs)
        left = {pair for pair in pairs if of_user[pair[0]] >= min_user}
        of_item = collections.Counter(item for _, item in left)
        left = {pair for pair in left if of_item[pair[1]] >= min_item}
        if left == pairs:
            return pairs
        pairs = left


@pytest.fixture
def core(spark, tmp_path):
    """core(users, min_user, min_item, num_blocks) -> (rounds, the pairs that survive)."""

    def run(users, min_user, min_item, num_blocks):
        names = [blocks.write_block(as_block(part), tmp_path) for part in in_parts(users, num_blocks)]
        rounds = list(kcore.k_core(spark, names, min_user, min_item, tmp_path))
        out = read_items(tmp_path, rounds[-1].out)
        read = [blocks.read_block(tmp_path, name) for name in names]
        left = [as_events(block.select(kcore.survivors(block, out, min_user))) for block in read]
        return rounds, {(user, row[0]) for part in left for user, rows in part.items() for row in rows}

    return run


@pytest.mark.parametrize(("min_user", "min_item"), [(3, 4), (6, 2), (0, 5), (5, 0), (1, 1)])
def test_rounds_end_in_the_fixed_point(core, min_user, min_item):
    users = random_users(120, 90, 14, seed=min_user)
    expected = fixed_point(users, min_user, min_item)
    rounds, found = core(users, min_user, min_item, num_blocks=4)
    assert found == expected
    assert expected
    assert (len(expected) < sum(map(len, users.values()))) == (max(min_user, min_item) > 1)
    last = rounds[-1]
    assert last.num_events == len(expected)
    assert last.num_users == len({user for user, _ in expected})
    assert last.num_items == len({item for _, item in expected})
    for before, after in itertools.pairwise(rounds):
        assert before.num_events > after.num_events
        assert before.num_users >= after.num_users
        assert before.num_items >= after.num_items
        assert after.out[:-1] == before.out


def test_a_chain_falls_link_by_link_and_leaves_nothing(core):
    """u0 - i1 - u1 - i2 - .. : with two of each asked for, a round takes the users at the ends and their items."""
    users = {f"u{n}": [(item, n, 1, 0) for item in (n, n + 1)] for n in range(6)}
    rounds, found = core(users, 2, 2, num_blocks=3)
    assert found == set()
    assert [(r.num_users, r.num_items, r.num_events) for r in rounds] == [
        (6, 5, 12), (4, 3, 8), (2, 1, 4), (0, 0, 0),
    ]  # fmt: skip


def test_nobody_has_enough_events(core):
    """The first round leaves nothing already, and says so."""
    rounds, found = core({"u": [(1, 1, 1, 0)], "v": [(1, 1, 1, 0), (2, 2, 1, 0)]}, 3, 0, num_blocks=2)
    assert [(r.num_users, r.num_items, r.num_events) for r in rounds] == [(0, 0, 0)]
    assert found == set()


def test_several_events_on_an_item_count_as_such(core):
    """Repeats that are kept are events: min_user and min_item count events, not pairs."""
    rounds, found = core({"u": [(1, 1, 1, 0), (1, 2, 1, 0), (1, 3, 1, 0)], "v": [(2, 1, 1, 0)]}, 3, 3, num_blocks=1)
    assert found == {("u", 1)}
    assert rounds[-1].num_events == 3


def test_survivors_of_items_that_are_out():
    block = as_block({"u": [(1, 1, 1, 0), (2, 2, 1, 0)], "v": [(2, 1, 1, 0), (3, 2, 1, 0), (4, 3, 1, 0)]})
    out = np.array([2], np.int32)
    assert kcore.survivors(block, out, 2).tolist() == [False, False, False, True, True]
    assert kcore.survivors(block, out, 0).tolist() == [True, False, False, True, True]
    assert kcore.survivors(block, out[:0], 3).tolist() == [False, False, True, True, True]
