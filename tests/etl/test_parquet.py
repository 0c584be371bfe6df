"""Columns of many Parquet files."""

import datetime
import decimal
import uuid

import pyarrow as pa
import pytest

STAMPS = pa.array([1_700_000_000_123_456_789, 1_700_000_001_000_000_000], pa.timestamp("ns"))


def two_events(**columns) -> pa.Table:
    return pa.table({"user_id": ["u", "v"], "item_id": ["a", "b"]} | columns)


def test_parquet_as_pandas_writes_it(read):
    """Times in nanoseconds, also where they are not used; names that differ in case; other precisions beside them."""
    content = {"1.parquet": two_events(timestamp=STAMPS, User_Id=STAMPS, junk=STAMPS, Junk=pa.nulls(2))}
    for number, (unit, zone) in enumerate([("ms", "UTC"), ("us", None), ("ns", "Europe/Berlin")], start=2):
        content[f"{number}.parquet"] = two_events(timestamp=STAMPS.cast(pa.timestamp(unit, zone), safe=False))
    events, _ = read(content, "parquet", interactions="*.parquet")
    assert [(e.user_id, e.ts, e.reason) for e in events] == [
        ("u", 1_700_000_000_123, None),
        ("v", 1_700_000_001_000, None),
    ] * 4


def test_a_column_that_some_parquet_files_lack_is_null_there(read):
    """Whichever file comes first; of pandas' type for a column that is None throughout; an id that is null is bad."""
    with_type = two_events(timestamp=[1, 2], type=["view", "cart"])
    content = {
        "1.parquet": two_events(timestamp=[1, 2]),
        "2.parquet": with_type,
        "3.parquet": two_events(timestamp=[1, 2], type=pa.nulls(2)),
        "4.parquet": with_type.drop_columns("user_id").slice(0, 1),
    }
    events, _ = read(content, "parquet", interactions="*.parquet", event_column="type")
    assert [e.event for e in events] == [None, None, "view", "cart", None, None, "view"]
    assert [e.reason for e in events] == [None] * 6 + ["no user id"]
    with pytest.raises(ValueError, match=r'1\.parquet has no column "kind"'):
        read({}, "parquet", interactions="*.parquet", event_column="kind")


def test_integers_of_all_widths_are_one_column(read):
    widths = [
        *((pa.int32(), 7), (pa.int64(), 1 << 40), (pa.uint8(), 255), (pa.uint32(), (1 << 32) - 1)),
        (pa.uint64(), (1 << 64) - 1),
    ]
    content = {
        f"{n}.parquet": pa.table({"user_id": pa.array([value], type_), "item_id": ["a"], "timestamp": [1]})
        for n, (type_, value) in enumerate(widths)
    }
    events, _ = read(content, "parquet", interactions="*.parquet")
    assert [e.user_id for e in events] == [str(value) for _, value in widths]


@pytest.mark.parametrize(
    ("ids", "message"),
    [(["7"], 'column "user_id" is string in .*2.parquet and int32 in .*1.parquet; write it with one type'),
     ([7.5], r"is double in .*2.parquet and int32 in .*1.parquet; .* \(in pandas: dtype Int64\)"),
     (pa.array([1.5], pa.float16()), 'column "user_id" of .*2.parquet is of type halffloat, which is not read')],
)  # fmt: skip
def test_types_that_do_not_go_together_are_named(read, ids, message):
    one = pa.table({"user_id": pa.array([7], pa.int32()), "item_id": ["a"], "timestamp": [1]})
    two = pa.table({"user_id": ids, "item_id": ["a"], "timestamp": [1]})
    with pytest.raises(ValueError, match=message):
        read({"1.parquet": one, "2.parquet": two}, "parquet", interactions="*.parquet")


def test_what_has_a_text_form_is_read_as_text(read):
    values = {
        "2026-01-02": datetime.date(2026, 1, 2),
        "5.10": decimal.Decimal("5.10"),
        "01:02:03.004": pa.array([3_723_004], pa.time32("ms")),
        "01:02:03": pa.array([3_723_000_000_000], pa.time64("ns")),
        "18446744073709551615": pa.array([(1 << 64) - 1], pa.uint64()),
        "00000000-0000-0000-0000-00000000000f": pa.array([uuid.UUID(int=15).bytes], pa.uuid()),
        "large": pa.array(["large"], pa.large_string()),
        "coded": pa.array(["coded"]).dictionary_encode(),
        "bytes": b"bytes",
        "x y": [["x", "y"]],
        "p q": pa.array([["p", "q"]], pa.large_list(pa.large_string())),
        "": pa.array([[]], pa.list_(pa.null())),
    }
    arrays = [value if isinstance(value, (pa.Array, list)) else [value] for value in values.values()]
    names = [f"c{n}" for n in range(len(values))]
    items = pa.table({"item_id": ["a"]} | dict(zip(names, arrays, strict=True)))
    log = two_events(timestamp=[1, 2])
    _, found = read(
        {"log.parquet": log, "items.parquet": items},
        "parquet", interactions="log.parquet", items="items.parquet", text_columns=",".join(names),
    )  # fmt: skip
    assert found[0].text.split("\n") == list(filter(None, values))
