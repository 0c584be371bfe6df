"""Blocks of whole users: the cut between users, cleaning against plain Python, and the one shuffle."""

import collections
import json
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyspark.sql import functions as F

from contract.schema import NO_TIME
from contract.settings import Etl
from etl import blocks, corpus
from tests.etl.small import as_block, as_events, random_users

GRANULE = 1 << 20


# --- a block ---


def test_select_slice_and_counts_per_user_equal_plain_python():
    users = random_users(40, 30, 12, seed=1)
    block, rng = as_block(users), random.Random(2)
    keep = {user: [rng.random() < 0.4 for _ in rows] for user, rows in users.items()}
    mask = np.array([kept for of_user in keep.values() for kept in of_user])
    assert block.per_user(mask).tolist() == [sum(of_user) for of_user in keep.values()]

    chosen = block.select(mask)
    expected = {
        user: [row for row, kept in zip(rows, keep[user], strict=True) if kept]
        for user, rows in users.items()
        if any(keep[user])
    }
    assert 0 < len(expected) < len(users)
    assert as_events(chosen) == expected
    assert chosen.item.tolist() == sorted({row[0] for rows in expected.values() for row in rows})
    keys = dict(zip(block.user_id.to_pylist(), block.user_key.tolist(), strict=True))
    assert chosen.user_key.tolist() == [keys[user] for user in expected]
    assert chosen.row.tolist() == [n for n, rows in enumerate(expected.values()) for _ in rows]

    for first, last in ((0, 40), (0, 3), (5, 17), (39, 40), (7, 7)):
        part = block.slice(first, last)
        assert as_events(part) == {user: users[user] for user in list(users)[first:last]}
        assert part.starts.tolist() == np.cumsum([0, *map(len, as_events(part).values())])[:-1].tolist()
    assert as_events(block.select(np.zeros(len(block.code), bool))) == {}


@pytest.mark.parametrize("users", [{}, {"ü": [(2**31 - 1, NO_TIME, 127, 3)]}, random_users(30, 9, 5, seed=4)])
def test_a_block_comes_back_from_its_files(tmp_path, users):
    block = as_block(users)
    found = blocks.read_block(tmp_path, blocks.write_block(block, tmp_path))
    assert as_events(found) == users
    assert found.user_id.type == pa.string()
    for name in ("user_key", "num_events", "item", "code", "ts", "event", "split"):
        assert getattr(found, name).dtype == getattr(block, name).dtype, name
        assert getattr(found, name).tolist() == getattr(block, name).tolist(), name


# --- whole users ---


@pytest.mark.parametrize("max_rows", [1, 3, 1000])
@pytest.mark.parametrize("batch_rows", [1, 2, 7, 1000])
def test_tables_are_cut_between_users_alone(batch_rows, max_rows):
    rng = random.Random(batch_rows)
    sizes = {f"u{user:02d}": rng.choice([1, 1, 2, 5, 40]) for user in range(80)}
    rows = [(user, n) for user, size in sizes.items() for n in range(size)]
    table = pa.table({"user_id": [user for user, _ in rows], "n": [n for _, n in rows]})
    batches = iter(table.to_batches(max_chunksize=batch_rows))
    seen, found = [], []
    for part, counts in blocks.whole_users(batches, max_rows, rows_per_table=30):
        users = list(dict.fromkeys(part["user_id"].to_pylist()))
        assert counts == {
            "num_rows": sum(sizes[user] for user in users),
            "num_over_limit": sum(max(0, sizes[user] - max_rows) for user in users),
        }
        assert part.num_rows <= 30 + batch_rows + max(sizes.values())
        seen += users
        found += zip(*part.to_pydict().values(), strict=True)
    assert seen == list(sizes)  # each user in one table
    assert found == [(user, n) for user, n in rows if n < max_rows]


def test_a_table_is_as_large_as_asked_for_and_one_user_more():
    table = pa.table({"user_id": [f"u{n // 4}" for n in range(400)]})
    found = [part.num_rows for part, _ in blocks.whole_users(iter(table.to_batches(max_chunksize=1)), 9, 30)]
    assert found == [*[32] * 12, 16]


# --- duplicates and repeats ---


def latest_first(users, keys):
    """{user: [(item, ts, event, split)] in input order} -> the table that clean_users takes."""
    rows = []
    for number, (user, events) in enumerate(users.items()):
        ordered = sorted(enumerate(events), key=lambda e: (e[1][3], e[1][1], e[0]), reverse=True)
        rows += [(user, number, keys[item], ts, event, split) for _, (item, ts, event, split) in ordered]
    columns = zip(*rows, strict=True)
    types = {
        "user_id": pa.string(), "user_key": pa.int64(), "item_key": pa.uint64(), "ts": pa.int64(), "event": pa.int8(),
        "split": pa.int8(),
    }  # fmt: skip
    table = pa.table({name: pa.array(values, types[name]) for name, values in zip(types, columns, strict=True)})
    signed = pa.array(table["item_key"].to_numpy().view(np.int64))  # as Spark has it
    return table.set_column(2, "item_key", signed)


def cleaned(users, repeats):
    """What clean_users says of itself, by plain Python; items by name."""
    left, counts = {}, collections.Counter()
    for user, rows in users.items():
        seen, kept, split_of = set(), [], {}
        for item, ts, event, split in sorted(rows, key=lambda row: (row[3], row[1])):  # stable: ties by input
            first = split_of.setdefault(item, split)
            if (item, ts, event, split) in seen:
                counts["num_duplicates"] += 1
            elif repeats == "first" and any(row[0] == item for row in kept):
                counts["num_repeats" if first == split else "num_in_earlier_split"] += 1
            else:
                kept.append((item, ts, event, split))
            seen.add((item, ts, event, split))
        if repeats == "collapse":
            run_starts = [row for n, row in enumerate(kept) if n == 0 or kept[n - 1][0] != row[0]]
            counts["num_repeats"] += len(kept) - len(run_starts)
            kept = run_starts
        left[user] = kept
    counts["num_events"], counts["num_users"] = sum(map(len, left.values())), len(left)
    return left, counts


def drawn_keys(items, seed):
    rng = random.Random(seed)
    return {item: rng.getrandbits(64) for item in items}  # half of them are negative as int64


def cleaned_blocks(users, repeats, seed):
    """(clean_users' block with items by name, its counts) under random item keys."""
    keys = drawn_keys({row[0] for rows in users.values() for row in rows}, seed)
    names = sorted(keys, key=keys.get)
    catalog = np.array(sorted(keys.values()), np.uint64)
    block, counts = blocks.clean_users(latest_first(users, keys), catalog, repeats)
    assert (np.diff(block.item) > 0).all()
    assert set(block.code.tolist()) == set(range(len(block.item)))
    events = {user: [(names[item], *rest) for item, *rest in rows] for user, rows in as_events(block).items()}
    return events, counts


@pytest.mark.parametrize("repeats", ["first", "collapse", "keep"])
@pytest.mark.parametrize("num_splits", [1, 3])
def test_cleaning_equals_plain_python(repeats, num_splits):
    rng = random.Random(num_splits)
    users = {
        f"u{n}": [
            (rng.choice("abcd"), rng.choice([NO_TIME, 1, 2, 3, 4]), rng.randint(0, 2), rng.randrange(num_splits))
            for _ in range(rng.choice([1, 2, 6, 30]))
        ]
        for n in range(60)
    }
    expected, counts = cleaned(users, repeats)
    assert counts["num_duplicates"] > 20
    assert (counts["num_in_earlier_split"] > 50) == (repeats == "first" and num_splits > 1)
    for seed in (1, 2, 3):  # the ids of items, and so their numbers, decide nothing
        found, found_counts = cleaned_blocks(users, repeats, seed)
        assert found == expected
        assert collections.Counter(found_counts) == counts
    assert counts["num_events"] + counts["num_duplicates"] + counts["num_in_earlier_split"] + counts[
        "num_repeats"
    ] == sum(map(len, users.values()))


@pytest.mark.parametrize(
    ("repeats", "rows", "left"),
    [
        # Equal times: the first of the input stays, whatever its type.
        ("first", [("a", 5, 2, 0), ("b", 5, 1, 0), ("a", 5, 1, 0)], [("a", 5, 2, 0), ("b", 5, 1, 0)]),
        ("keep", [("a", 5, 2, 0), ("a", 5, 1, 0), ("a", 5, 2, 0)], [("a", 5, 2, 0), ("a", 5, 1, 0)]),
        # A duplicate between two runs does not part them.
        ("collapse", [("a", 1, 1, 0), ("b", 2, 1, 0), ("b", 2, 1, 0), ("b", 3, 1, 0), ("a", 4, 1, 0)],
         [("a", 1, 1, 0), ("b", 2, 1, 0), ("a", 4, 1, 0)]),
        # The split that the input gives goes before the time.
        ("first", [("a", 9, 1, 0), ("a", 1, 1, 2), ("b", 2, 1, 2), ("b", 3, 1, 1)], [("a", 9, 1, 0), ("b", 3, 1, 1)]),
    ],
)  # fmt: skip
def test_cleaning_literal_rows(repeats, rows, left):
    assert cleaned_blocks({"u": rows}, repeats, seed=1)[0] == {"u": left}


def test_an_item_that_the_catalog_lacks_is_our_bug():
    with pytest.raises(AssertionError, match="not in the catalog"):
        blocks.clean_users(latest_first({"u": [("a", 1, 0, 0)]}, {"a": 7}), np.array([6, 8], np.uint64), "first")


# --- the shuffle ---


@pytest.fixture
def gathered(spark, tmp_path):
    """gather(log, etl, types) -> (its counts and span, [the events of each block, items by id], the bad rows)."""
    (tmp_path / "a.jsonl").write_text("x")
    (tmp_path / "b.jsonl").write_text("x")
    source = blocks.Source([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], GRANULE)

    def run(log, etl, types, name="stage"):
        stage = tmp_path / name
        stage.mkdir()
        ids = log.where("reason IS NULL").select("item_id").distinct()
        catalog = corpus.number_catalog(ids, spark.createDataFrame([], "item_id string"), 1, stage / "catalog")
        id_of = {row.number: row.item_id for row in catalog.collect()}
        found = blocks.gather(log, source, types, etl, 1, stage / "catalog", stage)
        events = [
            {user: [(id_of[item], *rest) for item, *rest in rows] for user, rows in as_events(block).items()}
            for block in (blocks.read_block(stage, name) for name in found.blocks)
        ]
        bad = [json.loads(line) for file in found.quarantine for line in (stage / file).open()]
        return found, events, bad

    return run


def test_gather_equals_plain_python_for_any_partitions(spark, log, gathered):
    rng = random.Random(5)
    rows = [
        (f"u{min(int(rng.expovariate(0.15)), 25)}", rng.choice("abcdef"), rng.randrange(40),
         rng.choice(["view", "cart", "ad", None]))
        for _ in range(600)
    ]  # fmt: skip
    types, etl = ["view", "cart"], Etl(events=("view", "cart"), max_user_events=20, repeats="keep")
    wanted = collections.defaultdict(list)
    for user, item, ts, event in rows:
        if event in types:
            wanted[user].append((item, ts, types.index(event) + 1, 0))
    latest = {user: sorted(events, key=lambda row: row[1])[-20:] for user, events in wanted.items()}
    expected, counts = cleaned(latest, "keep")
    num_rows = sum(map(len, wanted.values()))
    counts |= {"num_rows": num_rows, "num_over_limit": num_rows - sum(map(len, latest.values()))}
    assert counts["num_over_limit"] > 0

    first, events, _ = gathered(log(*rows), etl, types, "first")
    assert {user: found for block in events for user, found in block.items()} == expected
    assert sum(map(len, events)) == len(expected)
    assert first.counts == counts
    times = [row[1] for found in expected.values() for row in found]
    assert first.span == (min(times), max(times))
    assert len(first.blocks) > 1

    before = spark.conf.get("spark.sql.shuffle.partitions")
    spark.conf.set("spark.sql.shuffle.partitions", 5)
    second, again, _ = gathered(log(*rows).repartition(7, "item_id"), etl, types, "second")
    spark.conf.set("spark.sql.shuffle.partitions", before)
    assert [list(block.items()) for block in again] == [list(block.items()) for block in events]  # and their order
    assert (second.counts, second.span) == (first.counts, first.span)


def test_bad_rows_go_to_files_that_tell_their_source(log, gathered):
    rows = [(f"u{n}", "a", n, "view") for n in range(12)]
    bad = {0: "no user id", 7: "no timestamp", 8: "no timestamp"}
    # The last rows are of the second file.
    table = log(*rows, bad=bad).withColumn("order", F.expr("IF(order > 7, order + (1L << 33), order)"))
    _, events, found = gathered(table, Etl(), ["view"])
    assert sorted(user for block in events for user in block) == sorted(f"u{n}" for n in range(12) if n not in bad)
    assert sorted(found, key=lambda row: row["raw"]) == [
        {"reason": "no user id", "raw": "row 0", "file": "a.jsonl"},
        {"reason": "no timestamp", "raw": "row 7", "file": "a.jsonl"},
        {"reason": "no timestamp", "raw": "row 8", "file": "b.jsonl"},
    ]


def test_types_that_are_not_listed_stay_without_a_list(log, gathered):
    rows = [("u", "a", 1, "view"), ("u", "b", 2, None), ("u", "c", None, "view", 2)]
    found, events, _ = gathered(log(*rows), Etl(), ["cart", "view"])
    assert [block for block in events if block] == [{"u": [("a", 1, 2, 0), ("b", 2, 0, 0), ("c", NO_TIME, 2, 2)]}]
    assert found.quarantine == []


def test_a_log_of_which_nothing_counts(log, gathered):
    with pytest.raises(ValueError, match="no event is left of the log"):
        gathered(log(("u", "a", 1, "ad"), ("v", "b", 1, "view"), bad={1: "no"}), Etl(events=("view",)), ["view"])


def part(users, keys, bad):
    """The batches of a part as the shuffle hands them over: bad rows first."""
    good = latest_first(users, keys)
    nothing = pa.nulls(good.num_rows, pa.string())
    columns = {"order": pa.array(range(good.num_rows), pa.int64()), "reason": nothing, "raw": nothing}
    good = pa.table({**dict(zip(good.column_names, good.columns, strict=True)), **columns})
    rows = [{"order": n, "reason": reason, "raw": f"row {n}"} for n, reason in enumerate(bad)]
    table = pa.concat_tables([pa.Table.from_pylist(rows, good.schema), good])
    table = table.append_column("part", pa.array([3] * table.num_rows, pa.int32()))
    return iter(table.combine_chunks().to_batches(max_chunksize=11))


def test_a_part_of_several_blocks_has_the_users_of_one(tmp_path, monkeypatch):
    rng = random.Random(6)
    users = {f"u{n:02d}": [(rng.choice("abcdef"), ts, 1, 0) for ts in range(rng.randint(1, 9))] for n in range(40)}
    keys = drawn_keys("abcdef", 1)
    schema_ = pa.table({"item_key": pa.array(np.array(list(keys.values()), np.uint64).view(np.int64))})
    pq.write_table(schema_, tmp_path / "catalog")

    def run(bad=()):
        batches = blocks._gather_part(
            part(users, keys, bad), Etl(repeats="keep"), tmp_path / "catalog", lambda order: "log", tmp_path
        )
        return [row for batch in batches for row in batch.to_pylist()]

    (whole,) = run()
    monkeypatch.setattr(blocks, "ROWS_PER_BLOCK", 30)
    several = run(bad=["no user id"] * 15)
    assert [row["number"] for row in several] == list(range(len(several)))
    assert {row["part"] for row in several} == {3}
    *several, quarantine = several
    assert len(several) > 3
    assert (quarantine["block"], len((tmp_path / quarantine["quarantine"]).read_text().splitlines())) == (None, 15)
    events = [as_events(blocks.read_block(tmp_path, row["block"])) for row in several]
    joined = [(user, [row[1:] for row in rows]) for block in events for user, rows in block.items()]
    one = as_events(blocks.read_block(tmp_path, whole["block"]))
    assert joined == [(user, [row[1:] for row in rows]) for user, rows in one.items()]
    total = sum((collections.Counter(json.loads(row["counts"])) for row in several), collections.Counter())
    assert total == +collections.Counter(json.loads(whole["counts"]))
