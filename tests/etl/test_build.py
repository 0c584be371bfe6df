"""The whole stage, from a generated log to the artifact that the other stages open."""

import gzip
import hashlib
import hmac
import itertools
import json
from collections import Counter, defaultdict
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from contract import artifacts, schema
from contract import config as config_module
from contract.disk import writing
from etl import build, corpus, generate
from etl.report import write_report

DEMO = str(Path(__file__).parents[2] / "configs" / "demo.toml")
KEY = "a secret that nobody is to see"


@pytest.fixture(scope="module")
def log_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("build") / "data"
    generate.main([str(folder), "--users", "150", "--items", "240", "--seed", "5"])
    return folder


@pytest.fixture(scope="module")
def run(log_folder):
    """run(work folder, **{setting: value}) -> the artifact, opened as the next stage does."""

    def build_it(work: str, **settings: str) -> artifacts.Artifact:
        folder = log_folder.parent
        overrides = {
            "data.path": str(log_folder), "work": str(folder / work), "etl.num_shards": "3", "etl.vocab_size": "400",
            "tracking.uri": f"sqlite:///{folder}/mlflow.db",
        } | {key.replace("__", "."): value for key, value in settings.items()}  # fmt: skip
        build.main(["--config", DEMO, *(f"--{key}={value}" for key, value in overrides.items())])
        return artifacts.open_artifact(config_module.load(DEMO, overrides), "corpus")

    return build_it


@pytest.fixture(scope="module")
def built(run):
    return run("plain")


def good_rows(folder):
    """[(user, item, ts, event)] of the log in its order, by plain Python, each exact duplicate once."""
    rows = {}
    for file in sorted(folder.glob("events-*")):
        for line in gzip.decompress(file.read_bytes()).decode().splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if row.get("user_id") and row.get("item_id") and 1e12 < row["timestamp"] < 2e12:
                rows[row["user_id"], row["item_id"], row["timestamp"], row["event"]] = None
    return list(rows)


def five_core(events):
    """{(user, item): [..]} -> what is left of it when users and items have five events or more."""
    while True:
        users, items = Counter(), Counter()
        for (user, item), rows in events.items():
            users[user] += len(rows)
            items[item] += len(rows)
        left = {pair: rows for pair, rows in events.items() if users[pair[0]] >= 5 and items[pair[1]] >= 5}
        if len(left) == len(events):
            return left
        events = left


def first_events(folder):
    """{user: [(ts, item)] in time order} of the 5-core of first events."""
    first = {}
    for user, item, ts, _ in good_rows(folder):
        first[user, item] = [min(ts, *first.get((user, item), [1 << 62]))]
    visits = defaultdict(list)
    for (user, item), (ts,) in five_core(first).items():
        visits[user].append((ts, item))
    return {user: sorted(events) for user, events in visits.items()}


def users_of(artifact):
    users = schema.read_table(artifact.path / "users.parquet", schema.USERS)
    return dict(zip(users["user_idx"].to_pylist(), users["user_id"].to_pylist(), strict=True))


def interactions(artifact):
    """{user_id: [(ts, item_id, event, split)] in their order}"""
    item_ids, user_ids = schema.read_items(artifact.path).item_ids, users_of(artifact)
    table = schema.read_table(artifact.path / "interactions", corpus.INTERACTIONS)
    found = defaultdict(list)
    for row in table.sort_by([("user_idx", "ascending"), ("position", "ascending")]).to_pylist():
        found[user_ids[row["user_idx"]]].append((row["ts"], item_ids[row["item_idx"]], row["event"], row["split"]))
    return found


def check_whole(artifact):
    """What holds of a corpus however it was made: files, counts and report agree with each other."""
    counts, report = artifact.counts, json.loads((artifact.path / "report.json").read_text())
    assert not [file for file in artifact.path.rglob("*") if file.name.startswith(("_", "."))]
    there = {str(f.relative_to(artifact.path)) for f in artifact.path.rglob("*") if f.is_file()}
    assert there == {*artifact.manifest["files"], "manifest.json"}
    assert {"report.html", "report.json", "items.parquet/part-00000.parquet"} <= there

    steps = report["filters"]
    assert steps[0]["left"] == counts["num_rows_read"]
    for before, after in itertools.pairwise(steps):
        assert 0 < after["removed"] == before["left"] - after["left"]
    names = (*schema.SPLITS, "context")
    assert steps[-1]["left"] == sum(counts[f"num_{name}"] for name in names)
    assert sum(report["events_by_type"].values()) == steps[-1]["left"]
    assert sum(num for _, num in report["events_per_user"]) == counts["num_users"]
    assert sum(num for _, num in report["events_per_item"]) == counts["num_items"]

    events = interactions(artifact)
    of_split = Counter(row[3] for rows in events.values() for row in rows)
    assert [of_split[code] for code in range(4)] == [counts[f"num_{name}"] for name in names]
    assert len(events) == counts["num_users"]
    train = {user: [row for row in rows if row[3] == schema.TRAIN] for user, rows in events.items()}
    items = schema.read_items(artifact.path)
    assert items.num_items == counts["num_items"]
    num_train = Counter(row[1] for rows in train.values() for row in rows)
    assert items.num_train[1:].tolist() == [num_train[item] for item in items.item_ids[1:]]
    assert counts["num_cold_items"] == sum(not num_train[item] for item in items.item_ids[1:])
    held_out = {user for user, rows in events.items() if {row[3] for row in rows} & {schema.VALID, schema.TEST}}
    assert counts["num_cold_users"] == len([user for user in held_out if not train[user]])

    user_ids, targets = users_of(artifact), Counter()
    for code, name in enumerate(schema.SPLITS):
        shards = artifact.manifest["shards"][name]
        rows = [row for shard in shards for row in corpus.read_sequences(artifact.path / shard["file"]).to_pylist()]
        assert len(rows) == sum(shard["num_users"] for shard in shards)
        assert sum(len(row["item_idx"]) for row in rows) == sum(shard["num_events"] for shard in shards)
        assert len({row["user_idx"] for row in rows}) == len(rows)
        for row in rows:
            chosen = [item for item, is_target in zip(row["item_idx"], row["is_target"], strict=True) if is_target]
            of_user = events[user_ids[row["user_idx"]]]
            assert [items.item_ids[item] for item in chosen] == [e[1] for e in of_user if e[3] == code]
            targets[code] += len(chosen)
    assert all(targets[code] == of_split[code] for code in range(3))
    user_lists = schema.map_item_users(artifact.path, items.num_items)
    for item in range(1, items.num_items + 1):
        sample = {user_ids[user] for user in user_lists.row(item).tolist()}
        whole = {user for user, rows in train.items() if items.item_ids[item] in {row[1] for row in rows}}
        assert sample <= whole
        assert len(sample) == min(len(whole), 64)
    lines = [json.loads(x) for f in (artifact.path / "quarantine" / "log").iterdir() for x in f.open()]
    assert len(lines) == counts["num_rows_bad"] > 0
    assert Counter(line["reason"] for line in lines) == {r: v["num"] for r, v in report["quarantine"]["log"].items()}
    return events, report


def test_corpus_equals_a_plain_recount(built, log_folder):
    expected = first_events(log_folder)
    found, report = check_whole(built)
    assert set(found) == set(expected)
    for user, events in expected.items():
        splits = [schema.TRAIN] * (len(events) - 2) + [schema.VALID, schema.TEST]
        assert [row[:2] for row in found[user]] == events
        assert [row[3] for row in found[user]] == splits
    assert report["k_core"][-1]["num_events"] == sum(map(len, expected.values()))
    assert built.counts["num_valid"] == built.counts["num_test"] == len(expected)
    assert schema.read_items(built.path).tokens.lengths[1:].min() > 0
    days = Counter(ts // 86_400_000 for events in expected.values() for ts, _ in events)
    assert sum(sum(nums) for _, *nums in report["activity"]) == sum(days.values())
    assert len(report["activity"]) == len(days)


def test_manifest_says_what_the_next_stages_need(built):
    assert built.manifest["events"] == ["view", "cart", "purchase"]
    assert built.manifest["event_weights"] == [1.0, 1.0, 1.0]
    assert built.manifest["time_unit"] == "ms"
    assert set(built.manifest["shards"]) == set(schema.SPLITS)
    lines = [json.loads(x) for f in (built.path / "quarantine" / "log").iterdir() for x in f.open()]
    assert all(line["raw"] and line["file"].startswith("events-2024-q") for line in lines)


def test_a_second_run_over_what_a_killed_one_left_gives_the_same_bytes(built, run):
    folder = built.path.parent.parent / "again" / ".corpus.tmp"
    (folder / "_stage").mkdir(parents=True)
    (folder / "users.parquet").write_text("half of it")
    again = run("again")
    assert not folder.exists()
    assert again.manifest["files"] == built.manifest["files"]
    assert again.digest == built.digest


def test_temporal_split_of_collapsed_runs_with_pseudonyms(run, log_folder, monkeypatch):
    monkeypatch.setenv("SHOP_KEY", KEY)
    artifact = run(
        "temporal", etl__split="temporal", etl__test_days="30", etl__valid_days="20.5", etl__pseudonym_key="SHOP_KEY",
        etl__repeats="collapse", eval__mask_seen="false", etl__min_item="0", etl__min_user="0",
    )  # fmt: skip
    found, report = check_whole(artifact)
    codes = {"view": 1, "cart": 2, "purchase": 3}
    by_user = defaultdict(list)
    for user, item, ts, event in good_rows(log_folder):
        by_user[user].append((ts, item, codes[event]))
    test = max(ts for rows in by_user.values() for ts, _, _ in rows) - 30 * 86_400_000
    valid = test - round(20.5 * 86_400_000)
    hashed = {user: hmac.new(KEY.encode(), user.encode(), hashlib.sha256).hexdigest()[:32] for user in by_user}
    expected = {}
    for user, rows in by_user.items():
        rows = sorted(rows, key=lambda row: row[0])
        runs = [row for n, row in enumerate(rows) if n == 0 or rows[n - 1][1] != row[1]]
        expected[hashed[user]] = [(*row, 2 if row[0] > test else 1 if row[0] > valid else 0) for row in runs]
    assert found == expected
    assert valid < report["split"]["first_valid_ts"] <= test < report["split"]["first_test_ts"]
    assert report["k_core"] == []
    catalog = {json.loads(line)["item_id"] for line in (log_folder / "items.jsonl").open()}
    assert set(schema.read_items(artifact.path).item_ids[1:]) == catalog  # min_item = 0 keeps the whole of it

    secret = [KEY.encode(), *(user.encode() for user in hashed)]
    for file in (f for f in artifact.path.rglob("*") if f.is_file()):
        texts = [file.read_bytes()]
        if file.suffix == ".parquet":  # its pages are packed
            texts.append(str(pq.read_table(file).to_pydict()).encode())
        assert not [word for word in secret for text in texts if word in text], file
    for line in (x for f in (artifact.path / "quarantine" / "log").iterdir() for x in f.open()):
        assert json.loads(line)["raw"] is None


def test_random_split_of_a_log_without_a_catalog(run, log_folder):
    artifact = run("random", etl__split="random", etl__split_shares="0.7,0.1,0.2", data__items="")
    found, _ = check_whole(artifact)
    assert {user: sorted(row[:2] for row in rows) for user, rows in found.items()} == first_events(log_folder)
    for rows in found.values():
        num = Counter(row[3] for row in rows)
        assert num[schema.VALID] == max(1, round(len(rows) * 0.1))
        assert num[schema.TEST] == max(1, round(len(rows) * 0.2))
    items = schema.read_items(artifact.path)
    assert artifact.counts["num_items_without_text"] == items.num_items
    assert artifact.counts["vocab_size"] == 3
    assert items.tokens.lengths.max() == 0
    assert not (artifact.path / "tokenizer").exists()


def test_ottos_split(run):
    artifact = run(
        "otto", etl__split="otto", etl__repeats="keep", eval__mask_seen="false", etl__test_days="60",
        etl__valid_days="60", etl__min_item="0", etl__min_user="0",
    )  # fmt: skip
    found, report = check_whole(artifact)
    assert artifact.counts["num_context"] > 0
    assert report["filters"][-1]["what"] == "events that the split leaves out"
    kinds = {frozenset(row[3] for row in rows) for rows in found.values()}
    assert kinds == {frozenset({schema.TRAIN}), *(frozenset({schema.CONTEXT, c}) for c in (schema.VALID, schema.TEST))}


def test_a_report_that_is_written_again_is_the_same(built, tmp_path):
    write_report(json.loads((built.path / "report.json").read_text()), tmp_path)
    for name in ("report.html", "report.json"):
        assert (tmp_path / name).read_bytes() == (built.path / name).read_bytes()


TINY = """
[data]
format = "csv"
interactions = ["log.csv"]
items = ["items.csv"]
path = "{folder}"
[tracking]
uri = "sqlite:///{database}"
"""


@pytest.fixture
def tiny(tmp_path, log_folder):
    """tiny(log.csv, [settings]) builds from it into tmp_path / "work"."""

    def run(log: str, *settings: str) -> None:
        (tmp_path / "log.csv").write_text("user_id,item_id,timestamp\n" + log)
        (tmp_path / "items.csv").write_text("item_id,title\na,A\n")
        (tmp_path / "c.toml").write_text(TINY.format(folder=tmp_path, database=log_folder.parent / "mlflow.db"))
        build.main(["--config", str(tmp_path / "c.toml"), f"--work={tmp_path / 'work'}", *settings])

    return run


def test_bad_rows_stop_the_job_and_leave_nothing(tiny, tmp_path):
    with pytest.raises(ValueError, match="3 of the 6 rows of the log are unusable") as error:
        tiny("u,a,1700000000\n,b,1700000000\n" * 3)
    assert "3 x no user id, such as: ,b,1700000000" in str(error.value)
    assert not [path for path in (tmp_path / "work").iterdir() if path.is_dir()]


def test_a_core_without_anybody_stops_the_job(tiny, tmp_path):
    with pytest.raises(ValueError, match=r"no user is left with etl\.min_user = 5 and etl\.min_item = 5; lower them"):
        tiny("u,a,1700000000\nu,b,1700000001\nv,a,1700000000\n")
    assert not [path for path in (tmp_path / "work").iterdir() if path.is_dir()]


def test_a_catalog_of_other_items_stops_the_job(tiny, tmp_path):
    with pytest.raises(
        ValueError, match=r"2 of the 2 events .* \(100.00%\), at most 90.00% .*log: 0a, 0b; of the catalog: a\n"
    ):
        tiny("u,0a,1700000000\nu,0b,1700000001\n")
    assert not [path for path in (tmp_path / "work").iterdir() if path.is_dir()]


def test_a_corpus_that_nothing_can_be_learned_from_is_told_at_once(tiny, tmp_path):
    """Two of three events are held out: no train event has another beside it, whatever the number of shards."""
    log = "".join(f"{user},{item},17000000{n:02d}\n" for user in "uvw" for n, item in enumerate("abc"))
    with pytest.raises(ValueError, match=r"no user has two train events.*hold out less"):
        tiny(log, "--etl.min_user=0", "--etl.min_item=0", "--data.items=")
    assert not [path for path in (tmp_path / "work").iterdir() if path.is_dir()]


def test_a_work_folder_without_room_is_one_message_and_leaves_nothing(log_folder, small_disk):
    with pytest.raises(ValueError, match=r"No space left on device; the work folder .* needs room"):
        build.main(["--config", DEMO, f"--work={small_disk / 'work'}", f"--data.path={log_folder}"])
    assert [path.name for path in (small_disk / "work").iterdir() if not path.name.startswith(".mlflow")] == [
        ".corpus.lock"
    ]


def test_a_report_on_a_full_disk_is_one_message(built, tmp_path):
    (tmp_path / "report.html").symlink_to("/dev/full")
    report = json.loads((built.path / "report.json").read_text())
    message = r"cannot be written: No space left on device.*; make room"
    with pytest.raises(ValueError, match=message), writing(tmp_path, "write elsewhere"):
        write_report(report, tmp_path)


def test_dry_run_names_what_is_missing_and_writes_nothing(tmp_path, capsys):
    build.main(["--config", DEMO, f"--data.path={tmp_path / 'no'}", f"--work={tmp_path / 'work'}", "--dry-run"])
    assert "items.jsonl   (missing)" in capsys.readouterr().out
    assert not (tmp_path / "work").exists()
