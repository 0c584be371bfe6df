"""Ablations as their users run them, on the tiny corpus."""

import json
import os
import signal
import sys

import mlflow
import pyarrow.parquet as pq
import pytest

from contract.cli import Preempted, Progress
from contract.config import to_toml
from eval import variants
from eval.ablate import complete, main
from tests import tiny
from trainer.main import main as train
from trainer.training import Training

# Runs the program of a stage as it is, out of the test's process group, but for a variant that is to fail.
LAUNCHER = """
import os, runpy, sys
for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
    os.environ.pop(name, None)
if "no_contrastive" in " ".join(sys.argv):
    sys.exit("error: no machine is free")
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    """(config, words for the command line) of an experiment with corpus/ and gid/."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    config = tiny.tiny_config(tmp_path / "work", train__epochs="1", tracking__system_every="0")
    tiny.write_corpus(config)
    tiny.write_gids(config)
    file, launcher = tmp_path / "tiny.toml", tmp_path / "launcher.py"
    file.write_text(to_toml(config))
    launcher.write_text(LAUNCHER)
    return config, ["--config", str(file), f"--launcher=TOLD=1 {sys.executable} {launcher}"]


def test_from_a_config_to_a_table_with_an_interruption_and_a_failure(experiment, group, monkeypatch, capsys):
    config, words = experiment
    train(words[:2])  # the full model is there before, as after `make run`
    (_, variant) = variants.choose(config, "no_index")
    its_config = variants.variant_config(config, variant)
    variants.link_inputs(config, variant, its_config)
    step = Training.step

    def step_and_stop(self, *arguments):
        step(self, *arguments)
        if self.state["step"] == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Training, "step", step_and_stop)
    with pytest.raises(Preempted):
        train(["--config", str(variants.write_config(its_config))])

    with pytest.raises(ValueError) as failure:
        main([*words, "--only=no_index,no_contrastive"])
    folder = config.work_dir / "ablations"
    assert str(failure.value) == (
        "no_contrastive: trainer/main.py ended with exit status 1: error: no machine is free; "
        f"see {folder / 'no_contrastive' / 'log.txt'}"
    )
    assert "goes on from step 5" in (folder / "no_index" / "log.txt").read_text()
    assert (folder / "full" / "model").resolve() == config.work_dir / "model"
    assert (folder / "no_index" / "gid").resolve() == config.work_dir / "gid"
    results = json.loads((folder / "valid.json").read_text())
    assert list(results) == ["full", "no_index"]
    lists = pq.read_table(folder / "no_index" / "eval" / "recommendations.parquet")["item_idx"].to_pylist()
    valid = [int(sequence[-2]) for sequence in tiny.sequences(60, 40)]
    hits = [target in items[:10] for target, items in zip(valid, lists, strict=True)]
    assert results["no_index"]["recall@10"]["mean"] == pytest.approx(sum(hits) / 60)
    assert f"{sum(hits) / 60:.4f}" in capsys.readouterr().out
    assert "| no_index | no indexing loss |" in (folder / "valid.md").read_text()

    client = mlflow.MlflowClient(config.tracking.uri)
    runs = {run.info.run_name: run for run in client.search_runs(["1"])}
    parent = runs["tiny/ablate"]
    assert parent.info.status == "FAILED"
    assert {file.path for file in client.list_artifacts(parent.info.run_id)} > {"valid.md", "valid.png", "valid.json"}
    for name in ("tiny/full/eval", "tiny/no_index/eval"):
        assert runs[name].data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert runs["tiny/no_index/eval"].data.params["loss.index"] == "0.0"

    log = (folder / "no_index" / "log.txt").read_text()
    main([*words, "--only=no_index"])  # nothing is left to do
    assert (folder / "no_index" / "log.txt").read_text() == log
    assert len(client.search_runs(["1"], "tags.stage = 'ablate'")) == 1
    assert client.get_run(parent.info.run_id).info.status == "FINISHED"


def test_dry_run_says_what_would_be_made(experiment, capsys):
    config, words = experiment
    main([*words, "--dry-run", "--only=gid_random,no_slots"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[-3:]]
    assert lines[0] == ["full", "to", "make:", "model,", "eval"]
    assert lines[1] == ["gid_random", "to", "make:", "gid,", "model,", "eval", "gid.method=random"]
    assert lines[2][-2:] == ["model.item_table=none", "history.user_slots=0"]
    assert not (config.work_dir / "ablations").exists()


def test_the_test_split_is_asked_for_by_name(experiment):
    with pytest.raises(ValueError, match="say --split=test"):
        main([*experiment[1], "--eval.split=test"])


def test_gids_must_be_there(tmp_path):
    config = tiny.tiny_config(tmp_path / "work")
    tiny.write_corpus(config)
    with pytest.raises(FileNotFoundError, match=r"run first: python gid/build\.py"):
        main(["--config", str(tmp_path / "tiny.toml"), f"--work={config.work_dir}"])
    assert not (config.work_dir / "ablations").exists()


def test_a_launcher_that_ends_without_the_model_and_without_an_error_has_failed(experiment):
    """DeepSpeed's does so when a part of it is killed."""
    config, _ = experiment
    (_, variant) = variants.choose(config, "no_index")
    problem = complete(config, variant, variants.variant_config(config, variant), ["true"], Progress("ablate"))
    assert "trainer/main.py ended without an error and without " in problem
