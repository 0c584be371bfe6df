"""The whole stage, from a generated log to the artifact that the other stages open."""

import gzip
import json
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from contract import artifacts, schema
from contract import config as config_module
from etl import build, generate

DEMO = str(Path(__file__).parents[2] / "configs" / "demo.toml")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("build")
    generate.main([str(folder / "data"), "--users", "150", "--items", "240", "--seed", "5"])
    overrides = {
        "data.path": str(folder / "data"), "work": str(folder / "work"), "etl.num_shards": "3",
        "etl.vocab_size": "400", "tracking.uri": f"sqlite:///{folder}/mlflow.db",
    }  # fmt: skip
    build.main(["--config", DEMO, *(f"--{key}={value}" for key, value in overrides.items())])
    return config_module.load(DEMO, overrides), folder


def five_core(folder):
    """{user: [(ts, item)] in time order} by plain Python, from the files."""
    first = {}
    for file in sorted((folder / "data").glob("events-*")):
        for line in gzip.decompress(file.read_bytes()).decode().splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            key = (row.get("user_id"), row.get("item_id"))
            if all(key) and 1e12 < row["timestamp"] < 2e12:
                first[key] = min(row["timestamp"], first.get(key, 1 << 62))
    while True:
        users, items = Counter(u for u, _ in first), Counter(i for _, i in first)
        left = {key: ts for key, ts in first.items() if users[key[0]] >= 5 and items[key[1]] >= 5}
        if len(left) == len(first):
            break
        first = left
    visits = defaultdict(list)
    for (user, item), ts in first.items():
        visits[user].append((ts, item))
    return {user: sorted(events) for user, events in visits.items()}


def test_corpus_equals_a_plain_recount(built):
    config, folder = built
    corpus = artifacts.open_artifact(config, "corpus")
    expected = five_core(folder)
    items = schema.read_items(corpus.path)
    users = schema.read_table(corpus.path / "users.parquet", schema.USERS)
    user_id = dict(zip(users["user_idx"].to_pylist(), users["user_id"].to_pylist(), strict=True))
    found = defaultdict(list)
    for row in schema.read_table(corpus.path / "interactions", schema.INTERACTIONS).to_pylist():
        found[user_id[row["user_idx"]]].append((row["ts"], items.item_ids[row["item_idx"]], row["split"]))
    assert set(found) == set(expected)
    for user, events in expected.items():
        splits = [schema.TRAIN] * (len(events) - 2) + [schema.VALID, schema.TEST]
        assert sorted(found[user]) == [(ts, item, s) for (ts, item), s in zip(events, splits, strict=True)]
    assert corpus.counts["num_users"] == len(expected)
    assert corpus.counts["num_items"] == items.num_items == len({i for e in expected.values() for _, i in e})
    assert corpus.counts["num_train"] == items.num_train.sum() == sum(len(e) - 2 for e in expected.values())
    assert corpus.counts["num_valid"] == corpus.counts["num_test"] == len(expected)
    assert items.tokens.lengths[1:].min() > 0


def test_manifest_says_what_the_next_stages_need(built):
    config, _ = built
    corpus = artifacts.open_artifact(config, "corpus")
    assert corpus.manifest["events"] == ["view", "cart", "purchase"]
    assert corpus.manifest["time_unit"] == "ms"
    assert set(corpus.manifest["shards"]) == set(schema.SPLITS)
    for shards in corpus.manifest["shards"].values():
        assert sum(s["num_users"] for s in shards) == corpus.counts["num_users"]
        assert all((corpus.path / s["file"]).is_file() for s in shards)
    lines = [json.loads(x) for f in (corpus.path / "quarantine" / "log").iterdir() for x in f.open()]
    assert len(lines) == corpus.counts["num_rows_bad"] > 0
    assert all(line["reason"] for line in lines)
    assert not list(corpus.path.glob("_*"))


def test_bad_rows_stop_the_job_and_leave_nothing(tmp_path):
    (tmp_path / "log.csv").write_text("user_id,item_id,timestamp\n" + "u,a,1700000000\n,b,1700000000\n" * 3)
    (tmp_path / "items.csv").write_text("item_id,title\na,A\n")
    (tmp_path / "c.toml").write_text(
        '[data]\nformat = "csv"\ninteractions = ["log.csv"]\nitems = ["items.csv"]\n'
        f'path = "{tmp_path}"\n[tracking]\nuri = "sqlite:///{tmp_path}/mlflow.db"\n'
    )
    with pytest.raises(ValueError, match="3 of the 6 rows of the log are unusable") as error:
        build.main(["--config", str(tmp_path / "c.toml"), f"--work={tmp_path / 'work'}"])
    assert "3 x no user id, such as: ,b,1700000000" in str(error.value)
    assert not [path for path in (tmp_path / "work").iterdir() if path.is_dir()]


def test_dry_run_names_what_is_missing_and_writes_nothing(tmp_path, capsys):
    build.main(["--config", DEMO, f"--data.path={tmp_path / 'no'}", f"--work={tmp_path / 'work'}", "--dry-run"])
    assert "items.jsonl   (missing)" in capsys.readouterr().out
    assert not (tmp_path / "work").exists()
