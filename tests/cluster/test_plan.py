"""The command: what it prints, what it warns of, and what it says to bad arguments."""

import json

import pytest

from cluster import plan

SMALL = ["configs/demo.toml", "--events", "44635", "--users", "2354", "--items", "1097", "--cores", "2"]
HUGE = ["configs/phone.toml", "--events", "2e11", "--users", "1e9", "--items", "1e8", "--nodes", "64", "--gpus", "1024"]


def row(text: str, stage: str) -> dict:
    return next(row for row in json.loads(text)["stages"] if row["stage"] == stage)


def test_a_table_for_a_terminal(capsys):
    plan.main([*HUGE, "--price", "3", "--node-price", "4"])
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= plan.WIDTH
    for stage in ("etl", "gid: cf", "gid: neighbours", "gid: tree", "train", "eval"):
        assert any(line.startswith(f"{stage} ") for line in text.splitlines()), stage
    (train,) = (line for line in text.splitlines() if line.startswith("train "))
    assert train.endswith("assumed")  # nothing of a GPU was measured
    assert "cost of all" in text


def test_what_does_not_fit_is_said_with_the_setting_that_mends_it(capsys):
    plan.main([*HUGE, "--memory", "256", "--json", "--history.user_slots=2"])
    before = capsys.readouterr().out
    remedies = {
        "etl": ["etl.num_shards = 45533"],
        "gid: cf": ["cf.method = 'als'", "cf.dim ="],
        "train": [
            "train.table_optimizer = 'rowwise'",
            "gid.branching = 128",
            "train.streams = 1024",
            "tables = 'hash'",
            "eval.mode = 'generative'",
        ],
        "eval": ["eval.mode = 'generative'", "eval.baselines = ['popularity']"],
    }
    for stage, settings in remedies.items():
        said = " ".join(row(before, stage)["warnings"]).replace("item_table", "tables").replace("user_table", "tables")
        for setting in settings:
            assert setting in said, (stage, setting, said)

    mended = {
        "etl.num_shards": "46080", "cf.method": "als", "train.table_optimizer": "rowwise", "gid.branching": "128",
        "train.streams": "1024", "train.global_batch": "65536", "model.item_table": "hash", "model.user_table": "hash",
        "eval.mode": "generative", "eval.baselines": "popularity",
    }  # fmt: skip
    plan.main([*HUGE, "--memory", "4000", "--json", *(f"--{key}={value}" for key, value in mended.items())])
    after = capsys.readouterr().out
    assert row(after, "gid: cf")["warnings"] == row(after, "eval")["warnings"] == []
    assert all(
        "train.streams" not in warning and "_table" not in warning for warning in row(after, "train")["warnings"]
    )
    assert row(after, "train")["numbers"]["tables"] < 1e-3 * row(before, "train")["numbers"]["tables"]


def test_a_small_experiment_is_within_what_was_measured(capsys):
    plan.main([*SMALL, "--json"])
    text = capsys.readouterr().out
    assert [row(text, stage)["basis"] for stage in ("etl", "gid: cf", "gid: tree", "train")] == ["measured"] * 4
    assert row(text, "train")["warnings"] == []
    assert json.loads(text)["dollars"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mfu", "1.5"], r"--mfu 1\.5: must be from"),
        (["--events", "nan"], "--events nan: must be from"),
        (["--users", "1e6"], "are fewer than the 1e\\+06 users"),
        (["--model.dmodel=64"], "did you mean 'model.d_model'"),
        (["--cores=2", "fast"], "unknown argument fast"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        plan.parse([*SMALL, *arguments])
