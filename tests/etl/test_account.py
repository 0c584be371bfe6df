"""The steps from the rows that were read to the events of the corpus, and what the manifest lists."""

import collections
import json

import pytest
from pyspark.sql import functions as F

from contract import schema
from contract.settings import Config, Etl
from etl import account, blocks, corpus, hygiene, kcore

FOUND = hygiene.Profile(1000, {"no user id": 4, "no timestamp": 6}, {"": 90, "cart": 300, "view": 600})
COUNTS = {
    "num_rows": 850, "num_over_limit": 100, "num_duplicates": 20, "num_in_earlier_split": 5, "num_repeats": 25,
    "num_events": 700,
}  # fmt: skip


def steps(etl, found=FOUND, counts=COUNTS):
    gathered = blocks.Gathered([], [], collections.Counter(counts), (0, 1))
    types = list(etl.events) or ["cart", "view"]
    return [
        (step.removed, step.left, step.what) for step in account.cleaning_steps(Config(etl=etl), found, types, gathered)
    ]


def test_cleaning_steps_add_up():
    found = steps(Etl(events=("view", "cart"), max_daily_events=50, max_user_events=1000))
    assert found == [
        (0, 1000, "rows read"),
        (10, 990, "rows that cannot be used, in quarantine"),
        (90, 900, "rows of other event types"),
        (50, 850, "rows of bots, with over 50 events a day"),
        (100, 750, "rows before the latest 1,000 of a user"),
        (20, 730, "exact duplicates"),
        (5, 725, "events on items of an earlier split of the user"),
        (25, 700, "repeated events of a user on an item"),
    ]
    assert found[-1][1] == COUNTS["num_events"]


def test_steps_that_removed_nothing_are_left_out():
    """Without a list all types are wanted, those without a name too."""
    all_types = steps(Etl(), counts=COUNTS | {"num_rows": 990, "num_over_limit": 0, "num_in_earlier_split": 0})
    assert [what for _, _, what in all_types] == [
        "rows read", "rows that cannot be used, in quarantine", "exact duplicates",
        "repeated events of a user on an item",
    ]  # fmt: skip
    clean = hygiene.Profile(7, {}, {"": 7})
    assert steps(Etl(), clean, {"num_rows": 7, "num_events": 7}) == [(0, 7, "rows read")]


def test_all_steps_end_with_the_events_of_the_corpus():
    cleaning = [account.Step("rows read", 0, 1000), account.Step("bad", 300, 700)]
    rounds = [kcore.Round(50, 40, 650, []), kcore.Round(45, 35, 600, [])]
    counts = {"num_train": 400, "num_valid": 50, "num_test": 60, "num_context": 30, "num_users": 1}
    assert account.all_steps(cleaning, rounds, counts)[2:] == [
        account.Step("events outside the k-core", 100, 600),
        account.Step("events that the split leaves out", 60, 540),
    ]
    assert account.all_steps(cleaning, [], counts)[2:] == [account.Step("events that the split leaves out", 160, 540)]
    assert account.all_steps(cleaning, [], counts | {"num_train": 560}) == cleaning


def test_what_progress_says():
    assert account.spoken([account.Step("rows read", 0, 2000), account.Step("bad", 1500, 500)]) == "500 left, 1,500 bad"
    assert (
        account.spoken_counts({"num_rows_read": 2000, "num_test": 0, "vocab_size": 3})
        == "2,000 rows read, 3 vocab size"
    )


def test_quarantine_has_an_example_of_each_reason(tmp_path):
    rows = {
        "log/part-00000.json": [("no user id", "first"), ("no user id", "second"), ("no timestamp", "x" * 1000)],
        "log/part-00001.json": [("no item id", None)],
        "catalog/part-00000.json": [("no item id", "item")],
    }
    for name, lines in rows.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        text = "".join(json.dumps({"reason": reason, "raw": raw, "file": "f"}) + "\n" for reason, raw in lines)
        (tmp_path / name).write_text(text)
    log = {"no user id": 2, "no timestamp": 1, "no item id": 1, "far down": 9}
    profiles = {"log": hygiene.Profile(99, log, {}), "catalog": hygiene.Profile(9, {"no item id": 1}, {})}
    assert account.quarantine(profiles, tmp_path) == {
        "log": {
            "no user id": {"num": 2, "example": "first"},
            "no timestamp": {"num": 1, "example": "x" * 300},
            "no item id": {"num": 1, "example": ""},  # raw rows of a log with pseudonyms are gone
            "far down": {"num": 9, "example": ""},
        },
        "catalog": {"no item id": {"num": 1, "example": "item"}},
    }
    assert account.quarantine({"catalog": hygiene.Profile(1, {}, {})}, tmp_path / "none") == {"catalog": {}}


def written(number, **num_users):
    files = {name: corpus.File("x", f"{name}-{number:05d}.tar", num, 10 * num) for name, num in num_users.items()}
    return corpus.Written(files, "", [0] * 4, 0, 0, 0, 0, {}, {})


def test_shard_list_has_the_shards_that_there_are():
    users = corpus.File("x", "users.parquet/part-00000.parquet", 9, 0)
    parts = [written(0, train=5, test=2), written(1, train=4)]
    parts[0].files["users"] = users
    found = account.shard_list(parts)
    assert list(found) == list(schema.SPLITS)
    assert found == {
        "train": [
            {"file": "train-00000.tar", "num_users": 5, "num_events": 50},
            {"file": "train-00001.tar", "num_users": 4, "num_events": 40},
        ],
        "valid": [],
        "test": [{"file": "test-00000.tar", "num_users": 2, "num_events": 20}],
    }


@pytest.mark.parametrize("scale", [1, 1 << 40])
def test_bins_begin_at_powers_of_two(spark, scale):
    sizes = [0, 0, 1, 2, 3, 4, 5, 7, 8, 1023, 1024]
    table = spark.createDataFrame([(size * scale,) for size in sizes], "size long")
    expected = [[0, 2], *([low * scale, num] for low, num in ((1, 1), (2, 2), (4, 3), (8, 1), (512, 1), (1024, 1)))]
    assert account.log_bins(table, F.col("size")) == expected
