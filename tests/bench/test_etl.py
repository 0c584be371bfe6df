"""The benchmark's log, its two peers against a plain reference, and the measurement of processes."""

import collections
import json
import sys
import time

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bench import etl as bench
from bench import etl_peers
from contract import config as config_module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A log of 20,000 rows."""
    folder = tmp_path_factory.mktemp("log")
    bench.generate(folder, num_events=20_000, seed=1)
    return folder


def run_peer(engine: str, folder, out) -> dict[str, int]:
    out.mkdir()
    return etl_peers.with_polars(folder, out) if engine == "polars" else etl_peers.with_duckdb(folder, out, 2, "1g")


def reference(folder) -> dict[str, list[tuple]]:
    """{user_id: its (item_id, ts, event, split) in time order}, row by row."""
    code = {name: n for n, name in enumerate(etl_peers.EVENTS, start=1)}
    rows = collections.defaultdict(list)
    for row, (user, item, ts, event) in enumerate(pl.read_parquet(folder / "log-*.parquet").iter_rows()):
        if user and item and event in code and etl_peers.FIRST_MS <= ts <= time.time() * 1000:
            rows[user].append(((ts, row), item, code[event]))
    of_user = {}
    for user, events in rows.items():
        first = {}
        for event in sorted(events)[-etl_peers.MAX_USER_EVENTS :]:
            first.setdefault(event[1], event)
        of_user[user] = list(first.values())
    num_before, num = -1, sum(map(len, of_user.values()))
    while num != num_before:
        num_of_item = collections.Counter(item for events in of_user.values() for _, item, _ in events)
        of_user = {u: [e for e in events if num_of_item[e[1]] >= 5] for u, events in of_user.items()}
        of_user = {u: events for u, events in of_user.items() if len(events) >= 5}
        num_before, num = num, sum(map(len, of_user.values()))
    return {
        user: [(item, ts, event, max(0, n - len(events) + 3)) for n, ((ts, _), item, event) in enumerate(events)]
        for user, events in of_user.items()
    }


@pytest.mark.parametrize("engine", ["polars", "duckdb"])
def test_a_peer_does_the_job(engine, folder, tmp_path):
    expected = reference(folder)
    counts = run_peer(engine, folder, tmp_path / "out")
    items = pl.read_parquet(tmp_path / "out" / "items.parquet")
    users = pl.read_parquet(tmp_path / "out" / "users.parquet")
    assert counts == {
        "num_users": len(expected),
        "num_items": len({item for events in expected.values() for item, *_ in events}),
        "num_events": sum(map(len, expected.values())),
    }
    assert users["user_idx"].sort().to_list() == list(range(1, counts["num_users"] + 1))
    assert items["item_idx"].sort().to_list() == list(range(1, counts["num_items"] + 1))
    assert items["title"].null_count() == 0
    rows = pl.read_parquet(tmp_path / "out" / "interactions.parquet").join(users, on="user_idx")
    found = collections.defaultdict(list)
    for user, *event in (
        rows.join(items, on="item_idx").select("user_id", "item_id", "ts", "event", "split").iter_rows()
    ):
        found[user].append(tuple(event))
    assert {u: sorted(events) for u, events in found.items()} == {u: sorted(e) for u, e in expected.items()}
    histories = pl.read_parquet(tmp_path / "out" / "histories.parquet")
    if "events" in histories.columns:
        histories = histories.explode("events").unnest("events")
    else:
        histories = histories.explode(pl.exclude("user_idx"))
    raw = histories.join(users, on="user_idx", maintain_order="left").join(items, on="item_idx", maintain_order="left")
    in_order = collections.defaultdict(list)
    for user, *event in raw.select("user_id", "item_id", "ts", "event", "split").iter_rows():
        in_order[user].append(tuple(event))
    assert dict(in_order) == expected


def test_the_input_order_decides_between_equal_times(tmp_path):
    """u's 1001 items have one time: the first row falls to the limit, the last one is the test event."""
    rows = [("u", f"i{n}", 10**12, "clicks") for n in range(1001)]
    rows += [(f"v{n}", f"i{m}", 10**12, "orders") for n in range(4) for m in range(999, -1, -1)]
    columns = dict(zip(("user_id", "item_id", "timestamp", "event"), map(list, zip(*rows, strict=True)), strict=True))
    table = pa.table(columns)
    pq.write_table(table.slice(0, 600), tmp_path / "log-00000.parquet")
    pq.write_table(table.slice(600), tmp_path / "log-00001.parquet")
    items = pa.table({"item_id": [f"i{n}" for n in range(1001)], "title": ["a title"] * 1001})
    pq.write_table(items, tmp_path / "items.parquet")
    expected = reference(tmp_path)
    assert len(expected["u"]) == 999  # i0 fell to the limit, i1000 has one user
    assert expected["u"][-1] == ("i999", 10**12, 1, 2)
    for engine in ("polars", "duckdb"):
        counts = run_peer(engine, tmp_path, tmp_path / engine)
        assert counts["num_events"] == sum(map(len, expected.values()))
        rows = pl.read_parquet(tmp_path / engine / "interactions.parquet")
        rows = rows.join(pl.read_parquet(tmp_path / engine / "users.parquet"), on="user_idx")
        rows = rows.join(pl.read_parquet(tmp_path / engine / "items.parquet"), on="item_idx")
        tests = rows.filter(pl.col("split") == 2).select("user_id", "item_id").iter_rows()
        assert dict(tests) == {user: events[-1][0] for user, events in expected.items()}


def test_the_log_has_the_shape_that_is_promised(folder, tmp_path):
    rows = pl.read_parquet(folder / "log-*.parquet")
    items = pl.read_parquet(folder / "items.parquet")
    assert rows.schema == {"user_id": pl.String, "item_id": pl.String, "timestamp": pl.Int64, "event": pl.String}
    assert len(rows) == 20_000
    assert len(items) == items["item_id"].n_unique() == 186
    assert items["title"].str.split(" ").list.len().is_between(3, 8).all()
    assert set(rows["item_id"].drop_nulls()) <= set(items["item_id"])
    bad = rows.filter(pl.any_horizontal(pl.all().is_null()) | (pl.col("timestamp") < etl_peers.FIRST_MS))
    assert 5 <= len(bad) <= 50  # 0.1%, half of them far from the expectation
    assert rows.n_unique() < len(rows)
    shares = rows["event"].value_counts(normalize=True).sort("proportion", descending=True)
    assert shares["event"].to_list() == list(bench.EVENTS)
    hot = f"u{1291 * 48_271}"  # the first after the 1,290 others, scattered
    assert 0.005 <= (rows["user_id"] == hot).mean() <= 0.02
    bench.generate(tmp_path, num_events=20_000, seed=1)
    assert (tmp_path / "log-00003.parquet").read_bytes() == (folder / "log-00003.parquet").read_bytes()


def test_the_config_is_one_of_the_etl(folder):
    config = config_module.load(str(folder / "config.toml"))
    assert config.data.path == str(folder)
    assert config.etl.events == etl_peers.EVENTS
    assert (config.etl.min_user, config.etl.min_item) == (etl_peers.MIN_USER, etl_peers.MIN_ITEM)
    assert config.etl.max_user_events == etl_peers.MAX_USER_EVENTS


def test_the_memory_of_a_whole_process_tree_is_measured(tmp_path):
    hold = "import time; x = bytearray(150 << 20); time.sleep(1.5)"
    parent = f"import subprocess, sys; x = bytearray(150 << 20); subprocess.run([sys.executable, '-c', {hold!r}])"
    usage = bench.measure([sys.executable, "-c", parent], {}, 2**30, tmp_path / "log.txt")
    assert usage.outcome == "finished"
    assert 300 << 20 <= usage.peak_bytes <= 400 << 20


def test_a_process_tree_that_exceeds_the_limit_is_killed(tmp_path):
    hold = "import time; x = bytearray(150 << 20); time.sleep(600)"
    usage = bench.measure([sys.executable, "-c", hold], {}, 100 << 20, tmp_path / "log.txt")
    assert usage.outcome == "more than 0.1 GiB"
    assert usage.seconds < 300


def test_a_failure_is_told(tmp_path):
    usage = bench.measure([sys.executable, "-c", "exit('no such thing')"], {}, 2**30, tmp_path / "log.txt")
    assert usage.outcome == "exit status 1"
    assert "no such thing" in (tmp_path / "log.txt").read_text()


def test_engines_that_did_not_finish_have_no_figures():
    done = {"engine": "duckdb", "version": "2", "seconds": 10.0, "cpu_seconds": 16.0, "peak_bytes": 2**30}
    done |= {"outcome": "finished", "load_before": 0.5, "num_users": 1000, "num_items": 20, "num_events": 3000}
    slow = done | {"engine": "spark", "seconds": 25.0, "cpu_seconds": 8.0}
    dead = done | {"engine": "polars", "seconds": 1.0, "outcome": "more than 10.0 GiB"}
    lines = bench.table([slow, dead, done]).splitlines()[2:]
    assert lines == [
        "| spark 2 | 25.0 | 2.5 | 8.0 | 0.5 | 1.0 | 1.0 | 1,000 | 20 | 3,000 | 0.5 |",
        "| polars 2 | did not finish: more than 10.0 GiB |  |  |  |  |  |  |  |  | 0.5 |",
        "| duckdb 2 | 10.0 | 1.0 | 16.0 | 1.0 | 1.0 | 1.0 | 1,000 | 20 | 3,000 | 0.5 |",
    ]


def test_the_last_result_of_each_engine_is_published(tmp_path):
    done = {"engine": "polars", "version": "2", "seconds": 10.0, "cpu_seconds": 16.0, "peak_bytes": 2**30, "cores": 2}
    done |= {"outcome": "finished", "load_before": 0.5, "num_users": 1000, "num_items": 20, "num_events": 3000}
    done |= {"memory": "8g", "date": "2026-01-02", "revision": "0123456789abcdef", "num_rows": 5000}
    spark = done | {"engine": "spark", "seconds": 40.0}
    for name, results in {
        "large": [done | {"num_rows": 10**6}],
        "small": [done | {"seconds": 99.0}, spark, done],
    }.items():
        (tmp_path / name).mkdir()
        bench.append(tmp_path / name / "results.json", results)
    bench.publish([tmp_path / "large", tmp_path / "small"], tmp_path)
    assert json.loads((tmp_path / "etl.json").read_text()) == [spark, done, done | {"num_rows": 10**6}]
    shown = (tmp_path / "etl.md").read_text()
    small = "## 5,000 rows\n\n2 cores, 8g; 2026-01-02, revision 012345678\n"
    assert shown.index(small) < shown.index("## 1,000,000 rows")
    assert "| spark 2 | 40.0 | 4.0 |" in shown
    assert "99.0" not in shown
