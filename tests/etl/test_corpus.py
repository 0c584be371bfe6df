import hashlib
import io
import json
import random
import tarfile

import pyarrow as pa
import pytest
import webdataset

from contract import schema
from contract.schema import NO_TIME, TEST, TRAIN, VALID
from etl import corpus


def digests(folder):
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.rglob("*") if f.is_file()}


def test_dense_index_is_a_permutation_that_forgets_the_input(spark):
    ids = [f"{n:05d}" for n in range(3000)]
    table = spark.createDataFrame([(i,) for i in ids], "user_id string")
    dense, num = corpus.with_dense_index(table, "user_id", 1, "user_idx")
    index = {row.user_id: row.user_idx for row in dense.collect()}
    assert num == 3000
    assert sorted(index.values()) == list(range(1, 3001))
    # The rank correlation of 3,000 independent pairs has a standard deviation of 0.018.
    mean = 3001 / 2
    correlation = sum((n + 1 - mean) * (index[i] - mean) for n, i in enumerate(ids)) / (3000 * (3000**2 - 1) / 12)
    assert abs(correlation) < 0.08
    shuffled = random.Random(0).sample(ids, len(ids))
    other = spark.createDataFrame([(i,) for i in shuffled], "user_id string").repartition(5)
    assert {
        r.user_id: r.user_idx for r in corpus.with_dense_index(other, "user_id", 1, "user_idx")[0].collect()
    } == index
    assert {
        r.user_id: r.user_idx for r in corpus.with_dense_index(table, "user_id", 2, "user_idx")[0].collect()
    } != index


INTERACTIONS = "user_idx long, item_idx int, ts long, event byte, split byte, position int"


@pytest.fixture
def interactions(spark):
    """Users 1 and 2 with all splits, 3 with train only, 4 with test only; times of user 2 are unknown."""
    return spark.createDataFrame(
        [
            (1, 11, 5, 1, TRAIN, 1), (1, 12, 5, 2, TRAIN, 2), (1, 13, 8, 1, VALID, 3), (1, 14, 9, 1, TEST, 4),
            (2, 12, NO_TIME, 0, TRAIN, 1), (2, 11, NO_TIME, 0, VALID, 2), (2, 13, NO_TIME, 0, TEST, 3),
            (3, 12, 7, 1, TRAIN, 1),
            (4, 14, 3, 1, TEST, 1),
        ],
        INTERACTIONS,
    )  # fmt: skip


def test_counts_and_statistics_are_of_train_only(spark, interactions):
    assert corpus.count_splits(interactions) == {
        "num_train": 4, "num_valid": 2, "num_test": 3, "num_train_users": 3, "num_train_items": 2,
    }  # fmt: skip
    items = spark.createDataFrame([(n,) for n in (11, 12, 13, 14)], "item_idx int")
    rows = corpus.with_statistics(items, interactions).collect()
    assert {r.item_idx: (r.num_train, r.first_ts) for r in rows} == {
        11: (1, 5), 12: (3, 5), 13: (0, NO_TIME), 14: (0, NO_TIME),
    }  # fmt: skip


def test_item_users_are_a_sample_of_the_train_users(spark, interactions):
    rows = corpus.item_users(interactions, 64, seed=1).collect()
    assert {r.item_idx: r.user_idxs for r in rows} == {11: [1], 12: [1, 2, 3]}
    crowd = spark.createDataFrame([(u, 1, 0, 0, TRAIN, 1) for u in range(1, 501)], INTERACTIONS)
    (sample,) = (r.user_idxs for r in corpus.item_users(crowd, 20, seed=1).collect())
    assert len(set(sample)) == 20
    assert max(sample) > 100  # not the first ones
    assert [r.user_idxs for r in corpus.item_users(crowd.repartition(7), 20, seed=1).collect()] == [sample]
    assert [r.user_idxs for r in corpus.item_users(crowd, 20, seed=2).collect()] != [sample]


@pytest.mark.parametrize("valid_in_history", [True, False])
def test_sequences(interactions, valid_in_history):
    histories = corpus.histories(interactions.repartition(3, "item_idx"))

    def rows(split):
        found = corpus.sequences(histories, split, valid_in_history).collect()
        return {r.user_idx: list(zip(r.item_idx, r.ts, r.event, r.is_target, strict=True)) for r in found}

    assert rows(TRAIN) == {
        1: [(11, 5, 1, True), (12, 5, 2, True)], 2: [(12, NO_TIME, 0, True)], 3: [(12, 7, 1, True)],
    }  # fmt: skip
    assert rows(VALID) == {
        1: [(11, 5, 1, False), (12, 5, 2, False), (13, 8, 1, True)],
        2: [(12, NO_TIME, 0, False), (11, NO_TIME, 0, True)],
    }
    valid = {1: [(13, 8, 1, False)], 2: [(11, NO_TIME, 0, False)]} if valid_in_history else {1: [], 2: []}
    assert rows(TEST) == {
        1: [(11, 5, 1, False), (12, 5, 2, False), *valid[1], (14, 9, 1, True)],
        2: [(12, NO_TIME, 0, False), *valid[2], (13, NO_TIME, 0, True)],
        4: [(14, 3, 1, True)],
    }


def read_shard(file):
    samples = webdataset.WebDataset(str(file), shardshuffle=False)
    return [pa.ipc.open_stream(io.BytesIO(sample["arrow"])).read_all() for sample in samples]


def test_shards_are_complete_disjoint_and_the_same_each_time(spark, tmp_path, monkeypatch):
    monkeypatch.setattr(schema, "USERS_PER_MEMBER", 40)
    lengths = {user: 1 + user % 5 for user in range(1, 258)}
    rows = [(u, [u * 10 + k for k in range(n)], list(range(n)), [1] * n, [True] * n) for u, n in lengths.items()]
    columns = "user_idx long, item_idx array<int>, ts array<long>, event array<byte>, is_target array<boolean>"
    table = spark.createDataFrame(rows, columns)
    for run, order in (("a", 2), ("b", 5)):
        (tmp_path / run).mkdir()
        shards = corpus.write_shards(table.repartition(order), "train", 3, 1, tmp_path / run)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert [s["file"] for s in shards] == ["train-00000.tar", "train-00001.tar", "train-00002.tar"]
    assert sorted(f.name for f in (tmp_path / "a").iterdir()) == [s["file"] for s in shards]
    assert sorted(s["num_users"] for s in shards) == [85, 86, 86]

    seen = []
    for shard in shards:
        members = read_shard(tmp_path / "a" / shard["file"])
        assert [m.num_rows for m in members] == [40, 40, shard["num_users"] - 80]
        assert all(m.schema == schema.SEQUENCES for m in members)
        content = [row for m in members for row in m.to_pylist()]
        assert sum(len(row["item_idx"]) for row in content) == shard["num_events"]
        seen += content
        with tarfile.open(tmp_path / "a" / shard["file"]) as tar:
            assert [(m.name, m.mtime) for m in tar] == [(f"{n:06d}.arrow", 0) for n in range(3)]
    key = [row["user_idx"] for row in seen]
    assert key != sorted(key)  # shuffled
    names = schema.SEQUENCES.names
    assert sorted(seen, key=lambda r: r["user_idx"]) == [dict(zip(names, row, strict=True)) for row in rows]


def test_fewer_users_than_shards(spark, tmp_path):
    columns = "user_idx long, item_idx array<int>, ts array<long>, event array<byte>, is_target array<boolean>"
    table = spark.createDataFrame([(u, [1], [1], [1], [True]) for u in (1, 2)], columns)
    assert [s["num_users"] for s in corpus.write_shards(table, "valid", 16, 1, tmp_path)] == [1, 1]
    assert corpus.write_shards(table.limit(0), "test", 16, 1, tmp_path) == []


def test_parquet_is_sorted_over_its_files_and_the_same_each_time(spark, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "ROWS_PER_FILE", 100)
    rows = [(u, f"u{u}") for u in random.Random(1).sample(range(1, 251), 250)]
    table = spark.createDataFrame(rows, "user_idx long, user_id string")
    for run, parts in (("a", 2), ("b", 5)):
        corpus.write_parquet(table.repartition(parts), schema.USERS, 250, 250, tmp_path / run)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert sorted(digests(tmp_path / "a")) == [f"part-{n:05d}.parquet" for n in range(3)]
    assert schema.read_table(tmp_path / "a", schema.USERS)["user_idx"].to_pylist() == list(range(1, 251))


def test_quarantine_tells_the_reason(log, tmp_path):
    rows = log(("u", "a", 1), ("u", "b", 1)).selectExpr(
        "order", "IF(item_id = 'b', 'no user id', NULL) AS reason", "IF(item_id = 'b', 'the row', NULL) AS raw"
    )
    corpus.write_quarantine(rows, tmp_path / "q")
    (file,) = (tmp_path / "q").iterdir()
    assert file.name == "part-00000.json"
    assert json.loads(file.read_text()) == {"reason": "no user id", "raw": "the row", "file": "file"}


def test_catalog(spark, log):
    catalog = spark.createDataFrame(
        [("a", "old", ("f", 0, 1), None), ("a", "new", ("f", 0, 2), None), ("c", "cold", ("f", 0, 0), None),
         (None, "bad", ("f", 0, 3), "no item id")],
        "item_id string, text string, order struct<file: string, block: long, row: long>, reason string",
    )  # fmt: skip
    texts = corpus.texts(catalog)
    assert {r.item_id: r.text for r in texts.collect()} == {"a": "new", "c": "cold"}
    events = log(("u", "a", 1), ("u", "b", 1), ("v", "a", 2))
    assert {r.item_id for r in corpus.item_ids(events, texts, whole_catalog=False).collect()} == {"a", "b"}
    assert {r.item_id for r in corpus.item_ids(events, texts, whole_catalog=True).collect()} == {"a", "b", "c"}
