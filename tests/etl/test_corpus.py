"""Dense ids, the plan of the shards, and the files of a corpus against each other and against plain Python."""

import collections
import hashlib
import io
import json
import random
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset

from contract import schema
from contract.schema import CONTEXT, NO_TIME, TEST, TRAIN, VALID
from contract.settings import Etl
from etl import blocks, corpus, split
from tests.etl.small import as_block, as_events, in_parts, random_users


def digests(folder):
    found = {
        f.relative_to(folder): hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.rglob("*") if f.is_file()
    }
    return {str(name): digest for name, digest in found.items()}


# --- items ---


def test_dense_index_is_a_permutation_that_forgets_the_input(spark):
    ids = [f"{n:05d}" for n in range(3000)]
    table = spark.createDataFrame([(i, n) for n, i in enumerate(ids)], "user_id string, kept int")
    dense, num = corpus.with_dense_index(table, "user_id", 1, "user_idx")
    assert dense.columns == ["user_id", "kept", "user_idx"]
    rows = dense.collect()
    index = {row.user_id: row.user_idx for row in rows}
    assert {row.user_id: row.kept for row in rows} == {i: n for n, i in enumerate(ids)}
    assert num == 3000
    assert sorted(index.values()) == list(range(1, 3001))
    # The rank correlation of 3,000 independent pairs has a standard deviation of 0.018.
    mean = 3001 / 2
    correlation = sum((n + 1 - mean) * (index[i] - mean) for n, i in enumerate(ids)) / (3000 * (3000**2 - 1) / 12)
    assert abs(correlation) < 0.08
    shuffled = random.Random(0).sample(ids, len(ids))
    other = spark.createDataFrame([(i,) for i in shuffled], "user_id string").repartition(5)

    def numbered(users, seed):
        return {
            row.user_id: row.user_idx
            for row in corpus.with_dense_index(users, "user_id", seed, "user_idx")[0].collect()
        }

    assert numbered(other, 1) == index
    assert numbered(other, 2) != index


def test_texts_are_of_the_last_good_row(spark):
    rows = [
        ("a", "old", 1, None),
        ("a", "new", 2 << 33, None),
        ("c", "cold", 0, None),
        ("a", "bad", 3 << 33, "no item id"),
    ]
    listed = spark.createDataFrame(rows, "item_id string, text string, order long, reason string")
    assert {row.item_id: row.text for row in corpus.texts(listed).collect()} == {"a": "new", "c": "cold"}


def test_catalog_numbers_are_what_the_blocks_take_them_for(spark, tmp_path):
    occurring = spark.createDataFrame([(f"i{n}",) for n in range(300)], "item_id string")
    texts = spark.createDataFrame([(f"i{n}", "text") for n in range(250, 400)], "item_id string, text string")
    catalog = corpus.number_catalog(occurring, texts, 7, tmp_path / "catalog")
    rows = sorted(catalog.collect(), key=lambda row: row.number)
    assert pq.read_schema(next((tmp_path / "catalog").glob("*.parquet"))).names == corpus.CATALOG.names
    assert [row.number for row in rows] == list(range(400))
    assert {row.item_id: row.listed for row in rows} == {f"i{n}": n >= 250 for n in range(400)}
    keys = [row.item_key % (1 << 64) for row in rows]
    assert keys == sorted(keys)
    assert min(row.item_key for row in rows) < 0  # the order is not that of signed numbers
    hashed = spark.createDataFrame([(row.item_id,) for row in rows], "item_id string")
    again = {row.item_id: row.key for row in hashed.select("item_id", blocks.item_key(7).alias("key")).collect()}
    assert {row.item_id: row.item_key for row in rows} == again

    chosen = random.Random(1).sample(rows, 50)
    table = pa.table({
        "user_id": ["u"] * 50, "user_key": pa.array([1] * 50, pa.int64()),
        "item_key": pa.array([row.item_key for row in chosen], pa.int64()), "ts": list(range(50))[::-1],
        "event": pa.array([0] * 50, pa.int8()), "split": pa.array([0] * 50, pa.int8()),
    })  # fmt: skip
    read = pq.read_table(tmp_path / "catalog")["item_key"].to_numpy().view(np.uint64)
    block, _ = blocks.clean_users(table, np.sort(read), "first")
    assert [row[0] for row in as_events(block)["u"]] == [row.number for row in reversed(chosen)]


def test_dense_items_with_and_without_the_rest_of_the_catalog(spark):
    catalog = spark.createDataFrame(
        [
            (0, 10, "seen", True),
            (1, 11, "no text", False),
            (2, 12, "text alone", True),
            (3, 13, "out of the core", False),
        ],
        "number int, item_key long, item_id string, listed boolean",
    )
    columns = "item int, num long, num_train long, num_train_users long, first_ts long"
    statistics = spark.createDataFrame([(0, 5, 4, 3, 100), (1, 1, 0, 0, NO_TIME)], columns)

    def rows(whole):
        items, num = corpus.dense_items(catalog, statistics, whole, 1)
        assert items.columns[:2] == ["number", "item_id"]
        found = items.collect()
        assert sorted(row.item_idx for row in found) == list(range(1, num + 1))
        return {
            row.item_id: (row.number, row["num"], row.num_train, row.num_train_users, row.first_ts) for row in found
        }

    left = {"seen": (0, 5, 4, 3, 100), "no text": (1, 1, 0, 0, NO_TIME)}
    assert rows(whole=False) == left
    assert rows(whole=True) == left | {"text alone": (2, 0, 0, 0, NO_TIME)}


# --- shards ---


@pytest.mark.parametrize(
    ("num_users", "num_shards"),
    [
        ([100], 3),
        ([1, 1000, 1, 1, 50], 7),
        ([3, 2], 16),
        ([1], 1),
        ([10] * 30, 4),
        ([7, 7, 7], 3),
        ([5, 1, 1, 1, 5], 5),
    ],
)
def test_all_users_are_dealt_once_to_shards_of_one_size(num_users, num_shards):
    settled = [split.Settled(f"b{n}", num, "") for n, num in enumerate(num_users)]
    shards = corpus.plan_shards(settled, num_shards)
    assert [shard.number for shard in shards] == list(range(min(num_shards, sum(num_users))))
    dealt = [[(name, user) for name, a, b in shard.pieces for user in range(a, b)] for shard in shards]
    assert [pair for users in dealt for pair in users] == [
        (f"b{n}", user) for n, num in enumerate(num_users) for user in range(num)
    ]
    assert all(a < b for shard in shards for _, a, b in shard.pieces)
    sizes = [len(users) for users in dealt]
    assert max(sizes) - min(sizes) <= 1
    assert [shard.first_user for shard in shards] == [1 + sum(sizes[:n]) for n in range(len(sizes))]


HISTORIES = {
    "all": [(11, 5, 1, TRAIN), (12, 5, 2, TRAIN), (13, 8, 1, VALID), (14, 9, 1, TEST)],
    "undated": [(12, NO_TIME, 0, TRAIN), (11, NO_TIME, 0, VALID), (13, NO_TIME, 0, TEST)],
    "train": [(12, 7, 1, TRAIN)],
    "cold": [(14, 3, 1, TEST)],
    "random": [(11, 1, 1, TEST), (12, 2, 1, TRAIN), (13, 3, 1, VALID), (14, 4, 1, TRAIN), (15, 5, 1, TEST)],
    "session": [(11, 1, 1, CONTEXT), (12, 2, 1, CONTEXT), (13, 3, 1, TEST), (14, 4, 2, TEST)],
}


@pytest.mark.parametrize("valid_in_history", [True, False])
def test_sequences(valid_in_history):
    block = as_block(HISTORIES)
    user_idx = np.arange(1, len(HISTORIES) + 1)

    def rows(part):
        table = corpus.sequences(block, user_idx, block.item[block.code], part, valid_in_history)
        assert table.schema == schema.SEQUENCES
        names = dict(enumerate(HISTORIES, start=1))
        return {
            names[row["user_idx"]]: list(zip(*(row[c] for c in ("item_idx", "ts", "event", "is_target")), strict=True))
            for row in table.to_pylist()
        }

    assert rows(TRAIN) == {
        "all": [(11, 5, 1, True), (12, 5, 2, True)],
        "undated": [(12, NO_TIME, 0, True)],
        "train": [(12, 7, 1, True)],
        "random": [(12, 2, 1, True), (14, 4, 1, True)],
    }
    assert rows(VALID) == {
        "all": [(11, 5, 1, False), (12, 5, 2, False), (13, 8, 1, True)],
        "undated": [(12, NO_TIME, 0, False), (11, NO_TIME, 0, True)],
        "random": [(12, 2, 1, False), (14, 4, 1, False), (13, 3, 1, True)],
    }
    valid = {
        "all": [(13, 8, 1, False)] * valid_in_history,
        "undated": [(11, NO_TIME, 0, False)] * valid_in_history,
        "random": [(13, 3, 1, False)] * valid_in_history,
    }
    assert rows(TEST) == {
        "all": [(11, 5, 1, False), (12, 5, 2, False), *valid["all"], (14, 9, 1, True)],
        "undated": [(12, NO_TIME, 0, False), *valid["undated"], (13, NO_TIME, 0, True)],
        "cold": [(14, 3, 1, True)],
        "random": [(12, 2, 1, False), *valid["random"], (14, 4, 1, False), (11, 1, 1, True), (15, 5, 1, True)],
        "session": [(11, 1, 1, False), (12, 2, 1, False), (13, 3, 1, True), (14, 4, 2, True)],
    }


def num_train_users(users):
    pairs = {(user, row[0]) for user, rows in users.items() for row in rows if row[3] == TRAIN}
    return collections.Counter(item for _, item in pairs)


@pytest.fixture
def write(spark, tmp_path):
    """write(users, name, num_blocks, num_shards, etl) -> (folder, what write_shards returned).

    Item number n becomes item_idx 5000 - n.
    """

    def run(users, name, num_blocks, num_shards, etl):
        stage, folder = tmp_path / f"{name}-stage", tmp_path / name
        stage.mkdir()
        folder.mkdir()
        settled = [
            split.Settled(blocks.write_block(as_block(part), stage), len(part), "")
            for part in in_parts(users, num_blocks)
        ]
        known, numbers = num_train_users(users), sorted({row[0] for rows in users.values() for row in rows})
        items = {
            "number": numbers,
            "item_idx": [5000 - n for n in numbers],
            "num_train_users": [known[n] for n in numbers],
        }
        types = pa.schema([("number", pa.int32()), ("item_idx", pa.int32()), ("num_train_users", pa.int64())])
        pq.write_table(pa.table(items, schema=types), stage / "items.parquet")
        shards = corpus.plan_shards(settled, num_shards)
        written = corpus.write_shards(spark, shards, stage / "items.parquet", etl, 1, True, stage, folder)
        pairs = [stage / shard.pairs for shard in written]
        corpus.write_item_users(spark, pairs, 5000, etl.max_users_per_item, folder / "item_users.parquet")
        assert not [f for f in folder.rglob("*") if f.name.startswith("_")]
        return folder, written

    return run


def read_interactions(folder):
    return pa.concat_tables(pq.read_table(file) for file in sorted((folder / "interactions").iterdir()))


def read_shards(folder, name):
    tables = [corpus.read_sequences(shard) for shard in sorted(folder.glob(f"{name}-*.tar"))]
    return pa.concat_tables(tables).to_pylist()


def held_out(users):
    """The last event is test, the one before valid, of those who have three."""
    return {
        user: [
            (*row[:3], TRAIN if len(rows) < 3 or n < len(rows) - 2 else VALID if n == len(rows) - 2 else TEST)
            for n, row in enumerate(rows)
        ]
        for user, rows in users.items()
    }


DAYS = 5


@pytest.fixture
def shop():
    return held_out(random_users(2500, 200, 9, seed=11, max_ts=DAYS * corpus.MS_PER_DAY))


def test_the_files_of_a_corpus_agree_with_the_log(shop, write):
    folder, written = write(shop, "a", 4, 3, Etl())
    tables = schema.read_table(folder / "users.parquet", schema.USERS)
    assert tables["user_idx"].to_pylist() == list(range(1, 2501))
    assert tables["user_id"].to_pylist() == list(shop)
    found = read_interactions(folder)
    assert found.schema == corpus.INTERACTIONS
    assert [tuple(row.values()) for row in found.to_pylist()] == [
        (user_idx, 5000 - item, ts, event, part, place)
        for user_idx, rows in enumerate(shop.values(), start=1)
        for place, (item, ts, event, part) in enumerate(rows, start=1)
    ]
    for code, name in enumerate(schema.SPLITS):
        expected = []
        for user_idx, rows in enumerate(shop.values(), start=1):
            shown = [row for row in rows if row[3] <= code] if any(row[3] == code for row in rows) else []
            if shown:
                columns = [[5000 - row[0] for row in shown], *([row[c] for row in shown] for c in (1, 2))]
                values = [user_idx, *columns, [row[3] == code for row in shown]]
                expected.append(dict(zip(schema.SEQUENCES.names, values, strict=True)))
        assert read_shards(folder, name) == expected
        files = [shard.files[name] for shard in written]
        assert [file.name for file in files] == [f"{name}-{n:05d}.tar" for n in range(3)]
        assert sum(file.num_rows for file in files) == len(expected)
        assert sum(file.num_values for file in files) == sum(len(row["item_idx"]) for row in expected)

    rows = [row for rows in shop.values() for row in rows]
    by_split = collections.Counter(row[3] for row in rows)
    assert np.sum([shard.num_by_split for shard in written], axis=0).tolist() == [by_split[code] for code in range(4)]
    by_type = collections.Counter(row[2] for row in rows)
    assert np.sum([shard.num_by_type for shard in written], axis=0)[:5].tolist() == [by_type[code] for code in range(5)]
    by_length = collections.Counter(len(rows).bit_length() - 1 for rows in shop.values())
    assert np.sum([shard.num_by_length for shard in written], axis=0)[:5].tolist() == [by_length[b] for b in range(5)]
    days = collections.Counter((row[1] // corpus.MS_PER_DAY, row[3]) for row in rows)
    for day in range(DAYS):
        assert np.sum([shard.activity[day] for shard in written], axis=0).tolist() == [days[day, c] for c in range(4)]
    for code in range(3):
        times = [row[1] for row in rows if row[3] == code]
        spans = [shard.spans[code] for shard in written]
        assert (min(a for a, _ in spans), max(b for _, b in spans)) == (min(times), max(times))


def test_a_second_run_writes_the_same_bytes_and_other_shards_the_same_rows(shop, write):
    (first, _), (second, _), (whole, _) = (write(shop, n, 4, s, Etl()) for n, s in (("a", 3), ("b", 3), ("c", 1)))
    assert digests(first) == digests(second)
    assert sorted(f.name for f in first.iterdir()) == sorted(
        ["users.parquet", "interactions", "item_users.parquet"]
        + [f"{name}-{n:05d}.tar" for name in schema.SPLITS for n in range(3)]
    )
    assert read_interactions(first).equals(read_interactions(whole))
    for name in schema.SPLITS:
        assert read_shards(first, name) == read_shards(whole, name)
    assert digests(first / "item_users.parquet") == digests(whole / "item_users.parquet")

    members = [
        pa.ipc.open_stream(io.BytesIO(sample["arrow"])).read_all()
        for sample in webdataset.WebDataset(str(whole / "train-00000.tar"), shardshuffle=False)
    ]
    assert [member.num_rows for member in members] == [1024, 1024, 2500 - 2048]
    with tarfile.open(whole / "train-00000.tar") as tar:
        assert [(member.name, member.mtime) for member in tar] == [(f"{n:06d}.arrow", 0) for n in range(3)]


def test_shards_that_nobody_is_in_are_not_there(write):
    users = {"a": [(1, 1, 1, TRAIN)], "b": [(1, 2, 1, TRAIN), (2, 3, 1, TEST)], "c": [(3, NO_TIME, 1, TEST)]}
    folder, written = write(users, "few", 1, 16, Etl(split="given"))
    names = sorted(file.name for file in folder.glob("*.tar"))
    assert names == ["test-00001.tar", "test-00002.tar", "train-00000.tar", "train-00001.tar"]
    assert [shard.num_cold_users for shard in written] == [0, 0, 1]
    assert [shard.spans for shard in written] == [{TRAIN: (1, 1)}, {TRAIN: (2, 2), TEST: (3, 3)}, {}]
    assert [shard.activity for shard in written] == [{0: [1, 0, 0, 0]}, {0: [1, 0, 1, 0]}, {}]


def test_a_leak_ends_the_task_that_wrote_it(write):
    users = {"a": [(1, 1, 1, TRAIN), (2, 2, 1, VALID), (3, 3, 1, TEST), (4, 4, 1, TEST)]}
    with pytest.raises(Exception, match="the test split leaks: user_idx 1 has several targets"):
        write(users, "leak", 1, 1, Etl())


def item_users(folder):
    table = schema.read_table(folder / "item_users.parquet", schema.ITEM_USERS)
    assert table["item_idx"].to_pylist() == sorted(set(table["item_idx"].to_pylist()))
    return {5000 - row["item_idx"]: row["user_idxs"] for row in table.to_pylist()}


def test_item_users_are_a_sample_of_the_train_users(write):
    """Item 1 has 900 train users, 2 has 15, of 3 there are held-out events alone, 4 has 5 with 60 events each."""
    users = {f"u{n}": [(1, 1, 1, TRAIN)] + [(2, 2, 1, TRAIN)] * (n % 60 == 0) for n in range(900)}
    users |= {f"v{n}": [(1, 5, 1, TEST), (3, 6, 1, TEST)] for n in range(30)}
    users |= {f"w{n}": [(4, ts, 1, TRAIN) for ts in range(60)] for n in range(5)}
    etl = Etl(split="given", repeats="keep", max_users_per_item=20)
    folder, _ = write(users, "a", 3, 4, etl)
    found = item_users(folder)
    index = {user: n for n, user in enumerate(users, start=1)}
    assert found[2] == [index[f"u{n}"] for n in range(0, 900, 60)]
    assert found[4] == [index[f"w{n}"] for n in range(5)]  # few users, however many their events
    assert 3 not in found
    sample = found[1]
    assert len(set(sample)) == len(sample) == 20
    assert max(sample) <= 900  # of train
    assert sample == sorted(sample)
    assert 300 < sum(sample) / 20 < 600  # of all of them: 450, with a standard deviation of 58


def test_most_samples_are_full(write):
    """Each of 300 items has 200 users; 20 are wanted, and more are drawn in advance."""
    users = {f"u{n}": [(item, item, 1, TRAIN) for item in range(300)] for n in range(200)}
    found = item_users(write(users, "a", 2, 2, Etl(max_users_per_item=20))[0])
    sizes = collections.Counter(len(sample) for sample in found.values())
    assert len(found) == 300
    assert max(sizes) == 20
    assert sizes[20] > 200
    drawn = collections.Counter(user for sample in found.values() for user in sample)
    assert set(drawn) == set(range(1, 201))  # another sample for each item


# --- files ---


def test_parquet_is_sorted_over_its_files_and_the_same_each_time(spark, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "ROWS_PER_FILE", 100)
    rows = [(u, f"u{u}") for u in random.Random(1).sample(range(1, 251), 250)]
    table = spark.createDataFrame(rows, "user_idx long, user_id string")
    for run, parts in (("a", 2), ("b", 5)):
        corpus.write_parquet(table.repartition(parts), schema.USERS, 250, 250, tmp_path / run)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert sorted(digests(tmp_path / "a")) == [f"part-{n:05d}.parquet" for n in range(3)]
    assert schema.read_table(tmp_path / "a", schema.USERS)["user_idx"].to_pylist() == list(range(1, 251))


def test_the_catalogs_quarantine(spark, tmp_path):
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_text("x")
    source = blocks.Source([tmp_path / "a.csv", tmp_path / "b.csv"], 1 << 20)
    rows = [("i", 1 << 33, "no item id", "second ü"), ("j", 2, None, None), (None, 0, "no item id", "first")]
    listed = spark.createDataFrame(rows, "item_id string, order long, reason string, raw string").repartition(3)
    corpus.quarantine_catalog(listed, source, tmp_path / "q" / "catalog", tmp_path)
    (file,) = (tmp_path / "q" / "catalog").iterdir()
    assert file.name == "part-00000.json"
    assert [json.loads(line) for line in file.open()] == [
        {"reason": "no item id", "raw": "first", "file": "a.csv"},
        {"reason": "no item id", "raw": "second ü", "file": "b.csv"},
    ]
