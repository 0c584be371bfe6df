"""The trainer as its users call it, on the tiny corpus."""

import json
import math
import os
import re
import signal
import sys

import mlflow
import pytest
import safetensors.torch
import torch
from transformers import T5Config, T5ForConditionalGeneration

from contract import cli
from contract.config import to_toml
from contract.outbox import QUEUE
from tests import tiny
from tests.trainer import runs
from trainer.main import main


@pytest.fixture
def work(tmp_path):
    """A work folder with corpus/ and gid/, and its config file."""
    config = tiny.tiny_config(tmp_path / "work", train__log_every="1", model__dropout="0.1")
    tiny.write_corpus(config)
    tiny.write_gids(config)
    (tmp_path / "run.toml").write_text(to_toml(config))
    return tmp_path / "run.toml"


def start(work, *overrides, ranks=1):
    """Starts the trainer as so many processes."""
    return runs.start(ranks, ["trainer/main.py", "--config", str(work), *overrides])


@pytest.fixture
def train(group, capfd, monkeypatch):
    """A function (work, *overrides) -> (exit status, output): a run of one rank within this process."""

    def run(work, *overrides):
        monkeypatch.setattr(sys, "argv", ["main.py", "--config", str(work), *overrides])
        try:
            cli.run(main)
            code = 0
        except SystemExit as exit:
            code = exit.code
        output, errors = capfd.readouterr()
        return code, output + errors

    return run


def weights(work):
    return safetensors.torch.load_file(work.parent / "work" / "model" / "model.safetensors")


def modes(folder):
    """Of all files and folders that colleagues may have to read."""
    return {(path.is_dir(), path.stat().st_mode & 0o777) for path in folder.rglob("*") if QUEUE not in path.parts}


def usual_modes(folder):
    (folder / "any folder").mkdir(exist_ok=True)
    (folder / "any file").touch()
    return {(path.is_dir(), path.stat().st_mode & 0o777) for path in folder.glob("any *")}


def losses(output):
    return [float(x) for x in re.findall(r"samples/s .* loss (\d+\.\d+)$", output, re.MULTILINE)]


def test_resume_after_a_kill_equals_the_unbroken_run(work, train):
    code, output = train(work, "--train.save_every=4")
    assert code == 0, output
    assert len(losses(output)) == 22
    unbroken = weights(work)
    assert modes(work.parent / "work") == usual_modes(work.parent)

    [process] = start(work, "--train.save_every=4")
    for line in process.stdout:
        if "step 7/22" in line:
            process.kill()
    process.wait()
    assert modes(work.parent / "work" / "checkpoints") == usual_modes(work.parent)
    first = work.parent / "work" / "model"
    assert json.loads((first / "manifest.json").read_text())["counts"]["step"] == 22  # the finished model stands

    # Other settings must not go on with it.
    code, refused = train(work, "--train.lr=0.5")
    assert code == 2
    assert "train.lr = 0.003" in refused

    code, resumed = train(work, "--train.save_every=4")
    assert code == 0, resumed
    assert "goes on from step 4" in resumed
    assert losses(resumed) == losses(output)[4:]
    for name, value in weights(work).items():
        assert torch.equal(value, unbroken[name]), name
    client = mlflow.MlflowClient(f"sqlite:///{work.parent / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("colarec").experiment_id])
    assert sorted(run.info.status for run in runs) == ["FINISHED", "FINISHED"]  # the killed one was gone on with
    assert not (work.parent / "work" / "checkpoints").exists()


def wait_for(process, text):
    """Reads the output up to a line that holds the text."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return
    pytest.fail(f"never said {text!r}:\n" + "".join(lines))


def test_a_preempted_rank_saves_with_the_others_and_a_killed_one_takes_them_down(work):
    ranks = start(work, "--train.save_every=100", "--train.epochs=200", "--train.workers=1", ranks=2)
    wait_for(ranks[0], "step 3/")
    os.killpg(ranks[1].pid, signal.SIGUSR1)  # its loader process as well
    outputs = [rank.communicate(timeout=60)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [75, 75], outputs
    step = re.search(r"SIGUSR1: stopped at step (\d+); the same command goes on", outputs[0])[1]
    assert not (work.parent / "work" / "model").exists()

    ranks = start(work, "--train.save_every=100", "--train.epochs=200", "--train.zero_stage=3", ranks=2)
    wait_for(ranks[0], f"goes on from step {step}")
    wait_for(ranks[0], f"step {int(step) + 3}/")
    ranks[1].kill()
    outputs = [rank.communicate(timeout=60)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, -9], outputs
    assert re.search(r"error: rank 1 on \S+ died without a word", outputs[0])
    client = mlflow.MlflowClient(f"sqlite:///{work.parent / 'mlflow.db'}")
    [record] = client.search_runs([client.get_experiment_by_name("colarec").experiment_id])
    assert record.info.status == "FAILED"


@pytest.mark.parametrize(("stop", "status"), [(KeyboardInterrupt, 130), (cli.Preempted, 75)])
def test_exit_status_of_an_interruption(stop, status):
    def stage(_):
        raise stop

    with pytest.raises(SystemExit) as exit:
        cli.run(stage)
    assert exit.value.code == status


def test_a_loss_that_is_not_finite_stops_with_step_and_shard(work, train):
    code, output = train(work, "--train.lr=1e30", "--train.clip=1e30")
    assert code == 2
    assert re.search(r"error: the (loss|gradient norm) is (nan|inf) at step \d+,? on rank 0,.* shard train-0", output)
    assert not (work.parent / "work" / "model").exists()


def test_a_second_run_on_the_same_folder_is_refused(work, train):
    [process] = start(work, "--train.epochs=200")
    try:
        wait_for(process, "step 1/")
        code, output = train(work)
        assert code == 2
        assert f"another run is writing {work.parent / 'work' / 'model'} (pid {process.pid}" in output
    finally:
        process.kill()
        process.wait()


def test_a_stage_before_the_one_it_needs_names_the_command(work, train, tmp_path):
    code, output = train(work, f"--work={tmp_path / 'empty'}")
    assert code == 2
    assert "run first: spark-submit etl/build.py" in output
    assert "Traceback" not in output


def test_it_learns_what_follows_what(work, train):
    """After item i comes i + 1 (mostly): far below chance is reached only by reading the latest item."""
    code, output = train(
        work, "--train.epochs=40", "--train.lr=1e-2", "--train.log_every=1000", "--train.eval_every=110"
    )
    assert code == 0
    valid = [float(x) for x in re.findall(r"valid loss (\d+\.\d+)", output)]
    assert 1.1 < valid[0] < math.log(4)  # by how many items are below the codes
    assert min(valid) < 0.75
    ndcg = [float(x) for x in re.findall(r"ndcg@10 (\d+\.\d+)", output)]
    assert max(ndcg) > 3 * ndcg[0]


def test_the_options_of_the_model_go_together_and_give_a_plain_one(work, train, tmp_path):
    torch.manual_seed(3)
    shape = {"d_model": 16, "d_ff": 32, "d_kv": 8, "num_heads": 2, "num_layers": 1, "num_decoder_layers": 1}
    T5ForConditionalGeneration(T5Config(vocab_size=60, **shape)).save_pretrained(tmp_path / "t5")
    words = ["--model.lora_rank=2", f"--model.init={tmp_path / 't5'}", "--train.recompute=true", "--train.ema=0.9"]
    code, output = train(work, *words, "--train.epochs=6", "--train.lr=1e-2", "--train.best=loss")
    assert code == 0, output
    assert f"starts from encoder and decoder of {tmp_path / 't5'}" in output
    found = weights(work)
    assert not [name for name in found if "lora" in name or "base_layer" in name]
    frozen = safetensors.torch.load_file(tmp_path / "t5" / "model.safetensors")
    norm = "encoder.final_layer_norm.weight"
    assert torch.equal(found[norm], frozen[norm])
    query = "encoder.block.0.layer.0.SelfAttention.q.weight"
    assert torch.linalg.matrix_rank(found[query] - frozen[query], atol=1e-5) == 2
    valid = [float(x) for x in re.findall(r"valid loss (\d+\.\d+)", output)]
    assert min(valid) < valid[0] - 0.05
    client = mlflow.MlflowClient(f"sqlite:///{work.parent / 'mlflow.db'}")
    [run] = client.search_runs([client.get_experiment_by_name("colarec").experiment_id])
    logged = {file.path for file in client.list_artifacts(run.info.run_id, "model")}
    assert logged == {"model/README.md", "model/config.json", "model/model.safetensors"}
