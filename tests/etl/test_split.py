import pytest

from contract.schema import TEST, TRAIN, VALID
from etl import clean, split


def split_of(rows):
    events = split.leave_one_out(split.with_position(clean.merge_repeats(rows, [], False, "first")))
    return events, {(e.user_id, e.item_id): e.split for e in events.collect()}


def test_leave_one_out(log):
    _, found = split_of(
        log(
            ("u", "a", 30), ("u", "b", 10), ("u", "c", 20), ("u", "d", 40),
            ("v", "a", 1), ("v", "b", 2),
            ("w", "a", 3), ("w", "b", 2), ("w", "c", 1),
        )
    )  # fmt: skip
    assert found == {
        ("u", "b"): TRAIN, ("u", "c"): TRAIN, ("u", "a"): VALID, ("u", "d"): TEST,
        ("v", "a"): TRAIN, ("v", "b"): TRAIN,
        ("w", "c"): TRAIN, ("w", "b"): VALID, ("w", "a"): TEST,
    }  # fmt: skip


@pytest.mark.parametrize("items", ["abcd", "dcba", "cadb"])
def test_ties_follow_the_input_not_the_item(log, items):
    _, found = split_of(log(*(("u", item, 7) for item in items)))
    assert [found["u", item] for item in items] == [TRAIN, TRAIN, VALID, TEST]


def test_position_puts_given_splits_one_after_the_other(log):
    rows = log(("u", "a", None, None, 2), ("u", "b", None, None, 1), ("u", "c", 9, None, 0), ("u", "d", 8, None, 0))
    events = split.with_position(clean.merge_repeats(rows, [], False, "first")).orderBy("position").collect()
    assert [(e.item_id, e.position) for e in events] == [("d", 1), ("c", 2), ("b", 3), ("a", 4)]


def test_a_good_split_passes(log):
    events, _ = split_of(log(("u", "a", 1), ("u", "b", 1), ("u", "c", 2), ("v", "a", 1)))
    split.check_no_leak(events, "first", "leave_one_out")


@pytest.mark.parametrize(
    ("rows", "repeats", "kind"),
    [
        ([("u", "a", 1, None, 0), ("u", "a", 2, None, 2)], "first", "given"),
        ([("u", "a", 3, None, 0), ("u", "b", 2, None, 1), ("u", "c", 4, None, 2)], "first", "leave_one_out"),
        ([("u", "a", 1, None, 0), ("u", "b", 4, None, 1), ("u", "c", 4, None, 2), ("u", "d", 5, None, 1)],
         "keep", "leave_one_out"),
        ([("u", "b", 5, None, 2), ("u", "a", 5, None, 0)], "first", "leave_one_out"),  # a tie, the target earlier
    ],
)  # fmt: skip
def test_leaks_are_refused(log, rows, repeats, kind):
    with pytest.raises(ValueError, match="leaks into its history, first seen at user 'u'"):
        split.check_no_leak(log(*rows, ("ok", "z", 1, None, 0)), repeats, kind)


def test_kept_repeats_are_no_leak(log):
    split.check_no_leak(log(("u", "a", 1, None, 0), ("u", "a", 2, None, 2)), "keep", "leave_one_out")
