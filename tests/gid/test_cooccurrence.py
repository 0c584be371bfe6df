"""Neighbours by Spark beside those in memory."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from contract import schema
from contract.spark import spark_session
from gid import cooccurrence, neighbours

USERS, ITEMS = 60, 40


@pytest.fixture(scope="module")
def spark():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARK_LOCAL_IP", "127.0.0.1")
        with spark_session("test", "contract", "gid") as session:
            yield session


@pytest.fixture(scope="module")
def train():
    """(user_idx, item_idx); user 60 and item 40 are unknown to it."""
    rng = np.random.default_rng(0)
    taken = rng.random((USERS - 1, ITEMS - 1)) < rng.random(ITEMS - 1) * 0.5
    user, item = np.nonzero(taken)
    return user + 1, item + 1


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, train):
    """The train pairs, one of them twice, and events of valid users, which must not count."""
    folder = tmp_path_factory.mktemp("corpus")
    rows = [(u, i, t, 0, schema.TRAIN) for t, (u, i) in enumerate(zip(*train, strict=True))]
    rows += [(*rows[0][:2], 10**6, 0, schema.TRAIN), (60, 40, 0, 0, schema.VALID), (60, 1, 0, 0, schema.VALID)]
    columns = dict(zip(schema.INTERACTIONS.names, zip(*rows, strict=True), strict=True))
    (folder / "interactions").mkdir()
    pq.write_table(pa.table(columns, schema.INTERACTIONS), folder / "interactions" / "part-0.parquet")
    return folder


def dense(found: neighbours.Neighbours) -> np.ndarray:
    table = np.zeros((ITEMS + 1, ITEMS + 1))
    table[np.arange(ITEMS + 1)[:, None], found.item_IK] = found.weight_IK
    return table


@pytest.mark.parametrize("count", [5, 100])
def test_are_those_that_implicit_finds(spark, corpus, train, tmp_path, monkeypatch, count):
    monkeypatch.setattr(cooccurrence, "BYTES_OF_A_TASK", 20_000)
    cooccurrence.write(spark, corpus, ITEMS, count, tmp_path)
    found, expected = neighbours.read(tmp_path), neighbours.find(*train, USERS, ITEMS, count)
    assert found.item_IK.shape == (ITEMS + 1, count)
    assert (found.item_IK.dtype, found.weight_IK.dtype) == (np.int32, np.float32)
    np.testing.assert_allclose(found.weight_IK, expected.weight_IK, rtol=1e-5)
    np.testing.assert_allclose(dense(found), dense(expected), rtol=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([neighbours.ITEMS, neighbours.WEIGHTS])


def test_do_not_depend_on_how_the_work_is_cut(spark, corpus, tmp_path, monkeypatch):
    tables = []
    for name, task, at_once in (("one", 1 << 26, 1 << 22), ("many", 5000, 50)):
        monkeypatch.setattr(cooccurrence, "BYTES_OF_A_TASK", task)
        monkeypatch.setattr(cooccurrence, "ENTRIES_AT_ONCE", at_once)
        (tmp_path / name).mkdir()
        tables.append(cooccurrence.write(spark, corpus, ITEMS, 10, tmp_path / name))
    np.testing.assert_array_equal(tables[0].item_IK, tables[1].item_IK)
    np.testing.assert_array_equal(tables[0].weight_IK, tables[1].weight_IK)


def test_samples_are_right_on_average(spark, corpus, train, tmp_path):
    """Sums over all pairs of items hold many users and items, so that their noise is small."""
    whole = neighbours.find(*train, USERS, ITEMS, 100).weight_IK
    for name, caps, within in (("items", {"max_items": 6}, 0.1), ("users", {"max_users": 8}, 0.1)):
        (tmp_path / name).mkdir()
        found = cooccurrence.write(spark, corpus, ITEMS, 100, tmp_path / name, **caps)
        assert not np.allclose(found.weight_IK, whole, rtol=0.1)
        assert found.weight_IK.sum() == pytest.approx(whole.sum(), rel=within)


def test_nothing_in_train_gives_empty_tables(spark, tmp_path):
    (tmp_path / "interactions").mkdir()
    table = pa.table({name: [] for name in schema.INTERACTIONS.names}, schema.INTERACTIONS)
    pq.write_table(table, tmp_path / "interactions" / "part-0.parquet")
    assert not cooccurrence.write(spark, tmp_path, 3, 2, tmp_path).item_IK.any()
