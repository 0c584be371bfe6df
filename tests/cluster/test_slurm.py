"""The chain on a SLURM cluster of two nodes, as its user sees it: submit.py, sacct and the logs."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest

from contract import config as config_module
from contract.artifacts import open_artifact
from contract.config import to_toml
from tests import tiny
from tests.cluster.conftest import log, wait_for
from tests.test_pipeline import BIN, CONFIG
from tests.trainer import runs

pytestmark = pytest.mark.slurm

STAGES = ("etl", "gid", "train", "eval")
FAST_JAVA = "-XX:TieredStopAtLevel=1"
# One core and one rank a node.
PROFILE = f"""
spark = ["--driver-java-options", "{FAST_JAVA}", "--conf", "spark.executor.extraJavaOptions={FAST_JAVA}",
         "--conf", "spark.ui.enabled=false"]

[env]
SPARK_DAEMON_JAVA_OPTS = "{FAST_JAVA}"
OMP_NUM_THREADS = "1"

[etl]
nodes = 2
memory_gb = 4

[gid]
memory_gb = 4

[train]
nodes = 2
min_nodes = 1
memory_gb = 4
partition = "PARTITION"

[eval]
nodes = 2
memory_gb = 4
"""


def write_profile(folder: Path, text: str = PROFILE, partition: str = "") -> str:
    (folder / "site.toml").write_text(text.replace("PARTITION", partition))
    return str(folder / "site.toml")


def call(config: Path, profile: str, *words: str) -> subprocess.CompletedProcess:
    program = [sys.executable, "cluster/submit.py", str(config), "--profile", profile, *words]
    return subprocess.run(program, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(Path.cwd())})


def submit(config: Path, profile: str, *words: str) -> dict[str, str]:
    """{stage: job id} of what was submitted."""
    done = call(config, profile, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(re.findall(r"^(\w+) +job (\d+)", done.stdout, re.MULTILINE))


@pytest.fixture
def trained(tmp_path):
    """The config file of a training that takes a while, with corpus/ and gid/ complete."""
    settings = {"eval_every": "1000", "save_every": "20", "log_every": "10", "max_steps": "400", "epochs": "1000"}
    config = tiny.tiny_config(tmp_path / "work", **{f"train__{name}": value for name, value in settings.items()})
    tiny.write_corpus(config)
    tiny.write_gids(config)
    (tmp_path / "run.toml").write_text(to_toml(config))
    return tmp_path / "run.toml"


@pytest.fixture(autouse=True)
def no_jobs_are_left(slurm, tmp_path):
    yield
    slurm.cancel_jobs_of(tmp_path)


def mlflow_runs(folder: Path) -> dict[str, list[str]]:
    """{name: states} of the runs that were recorded."""
    client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    found = {}
    for run in client.search_runs([client.get_experiment_by_name("colarec").experiment_id]):
        found.setdefault(run.info.run_name, []).append(run.info.status)
    return found


def test_the_chain_gives_what_the_stages_give_without_slurm(slurm, tmp_path):
    subprocess.run(
        [sys.executable, "etl/generate.py", tmp_path / "log", "--users", "300", "--items", "150"], check=True
    )
    config, uri = tmp_path / "shop.toml", f"sqlite:///{tmp_path / 'mlflow.db'}"
    config.write_text(CONFIG.format(data=tmp_path / "log"))
    settings = [f"--tracking.uri={uri}"]
    there = submit(config, write_profile(tmp_path), f"--work={tmp_path / 'there'}", *settings)
    assert tuple(there) == STAGES
    assert slurm.ended(*there.values()) == ["COMPLETED"] * 4, [log(tmp_path / "there", *job) for job in there.items()]

    here = ["--config", str(config), f"--work={tmp_path / 'here'}", *settings]
    path = {"PATH": f"{BIN}:{os.environ['PATH']}"}
    spark = ["spark-submit", "--driver-java-options", FAST_JAVA, "etl/build.py", *here]
    subprocess.run(spark, check=True, env=runs.ENV | path)
    subprocess.run([sys.executable, "gid/build.py", *here], check=True, env=runs.ENV)
    for program in ("trainer/main.py", "eval/main.py"):
        processes = runs.start(2, [program, *here])
        outputs = [process.communicate(timeout=900)[0] for process in processes]
        assert [process.returncode for process in processes] == [0, 0], outputs

    for artifact in ("corpus", "gid"):
        digests = {
            open_artifact(config_module.load(str(config), {"work": str(tmp_path / work)}), artifact).digest
            for work in ("here", "there")
        }
        assert len(digests) == 1, artifact
    models = [json.loads((tmp_path / w / "eval" / "metrics.json").read_text())["models"] for w in ("here", "there")]
    assert models[0] == models[1]
    assert mlflow_runs(tmp_path) == {f"shop/{stage}": ["FINISHED"] * 2 for stage in STAGES}
    assert "all artifacts in" in call(config, write_profile(tmp_path), f"--work={tmp_path / 'there'}", *settings).stdout


def test_a_preempted_training_goes_on_and_the_chain_with_it(slurm, trained, tmp_path):
    if not slurm.has_partitions("preempt", "urgent"):
        pytest.skip("needs a partition 'preempt' whose jobs one in the partition 'urgent' puts back into the queue")
    jobs = submit(trained, write_profile(tmp_path, partition="preempt"))
    assert tuple(jobs) == ("train", "eval")
    wait_for("the training", lambda: "step 30/" in log(tmp_path / "work", "train", jobs["train"]))
    urgent = ["sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null"]
    slurm.call(*urgent, "--wrap=true")
    assert slurm.ended(*jobs.values()) == ["COMPLETED", "COMPLETED"], log(tmp_path / "work", "train", jobs["train"])
    assert slurm.states(jobs["train"])[0] in ("PREEMPTED", "REQUEUED")
    said = log(tmp_path / "work", "train", jobs["train"])
    stopped = re.search(r"(SIGTERM|SIGUSR1): stopped at step (\d+)", said)[2]
    assert f"goes on from step {stopped}" in said
    assert mlflow_runs(tmp_path) == {"tiny/train": ["FINISHED"], "tiny/eval": ["FINISHED"]}


def test_training_goes_on_with_the_nodes_that_are_left_when_one_dies(slurm, trained, tmp_path):
    if not slurm.script:
        pytest.skip("nobody kills a node of a cluster that is not the tests' own: set COLAREC_LOCAL_SLURM")
    jobs = submit(trained, write_profile(tmp_path), "--train.max_steps=300")
    wait_for("the training", lambda: "step 30/" in log(tmp_path / "work", "train", jobs["train"]))
    slurm.kill_node("n2")
    try:
        assert slurm.ended(jobs["train"]) == ["COMPLETED"], log(tmp_path / "work", "train", jobs["train"])
    finally:
        slurm.start_node("n2")
    assert slurm.states(jobs["train"]) == ["NODE_FAIL", "COMPLETED"]
    said = log(tmp_path / "work", "train", jobs["train"])
    assert re.search(r"on 2 x cpu.*step 30/.*on 1 x cpu.*goes on from step \d+.*step 300/300", said, re.DOTALL)
    assert "rank 1 on n2 died without a word" in said
    assert "stage train failed" not in said
    assert mlflow_runs(tmp_path)["tiny/train"] == ["FINISHED"]


def test_a_stage_that_fails_stops_the_chain_and_says_where_to_look(slurm, trained, tmp_path):
    jobs = submit(trained, write_profile(tmp_path), "--from", "gid", "--gid.length=1")
    assert slurm.ended(*jobs.values()) == ["FAILED", "CANCELLED", "CANCELLED"]
    said = log(tmp_path / "work", "gid", jobs["gid"])
    assert "error: 40 items do not fit into a tree of length 1" in said
    assert f"stage gid failed, and the jobs after it are cancelled: {tmp_path}/work/logs/gid-{jobs['gid']}.log" in said
    # What is mended goes on with the stage that failed.
    jobs = submit(trained, write_profile(tmp_path), "--from", "train")
    refused = call(trained, write_profile(tmp_path))
    assert refused.returncode == 2
    assert f"error: jobs are at work on {tmp_path}/work: " in refused.stderr


def test_an_unfit_node_is_named_before_the_work(slurm, trained, tmp_path):
    """A folder of the first node alone is no disk of the second."""
    nodes = slurm.call("sinfo", "--noheader", "--Node", "--format=%N").split()
    first, second = sorted(set(nodes))[:2]
    disk = f"/dev/shm/colarec-{os.getpid()}"
    slurm.call("srun", f"--nodelist={first}", "mkdir", disk)
    try:
        profile = write_profile(tmp_path, f"local_disk = '{disk}'\n[train]\nnodes = 2\n[eval]\n")
        jobs = submit(trained, profile)
        assert slurm.ended(*jobs.values()) == ["FAILED", "CANCELLED"]
    finally:
        slurm.call("srun", f"--nodelist={first}", "rmdir", disk)
    said = log(tmp_path / "work", "train", jobs["train"])
    assert f"node {second} is unfit: local_disk {disk} cannot be used" in said
    assert "1 of 2 nodes are fit, the stage needs 2" in said


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        ("partition = 'nowhere'", "etl: partition 'nowhere' is not there; there are: "),
        (
            "[train]\nnodes = 99\n[gid]\ncpus = 9999",
            "gid: 1 nodes of 9999 CPUs, 0 GPUs and 0 GB are asked for",
        ),
        ("[etl]\nmemory_gb = 99999", "etl: 1 nodes of 1 CPUs, 0 GPUs and 99999 GB are asked for"),
        ("[train]\ngpus = 999\ncpus = 999", "train: 1 x 999 ranks do not divide train.streams = 4"),
        ("sbatch = ['--begin=never']", "etl: sbatch refuses: "),
    ],
)
def test_what_the_cluster_does_not_have_is_refused(slurm, trained, tmp_path, profile, message):
    done = call(trained, write_profile(tmp_path, profile), "--from", "etl")
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / "work" / "logs").exists()
    assert not slurm.call("squeue", "--me", "--noheader", "--name=tiny-etl").strip()


def test_a_signal_that_reaches_the_tasks_alone_saves_and_requeues(slurm, trained, tmp_path):
    """As --signal sends it before the time limit."""
    jobs = submit(trained, write_profile(tmp_path))
    wait_for("the training", lambda: "step 30/" in log(tmp_path / "work", "train", jobs["train"]))
    slurm.call("scancel", f"--signal={signal.SIGUSR1.name}", jobs["train"])
    wait_for("the second start", lambda: "goes on from step" in log(tmp_path / "work", "train", jobs["train"]))
    said = log(tmp_path / "work", "train", jobs["train"])
    assert "SIGUSR1: stopped at step" in said
    assert f"saved a checkpoint: goes back into the queue as job {jobs['train']}" in said


def test_an_mlflow_server_answers_another_node(slurm, tmp_path):
    first, second = sorted(set(slurm.call("sinfo", "--noheader", "--Node", "--format=%N").split()))[:2]
    options = [f"--nodelist={first}", f"--comment={tmp_path}", f"--output={tmp_path}/mlflow.txt"]
    slurm.call("sbatch", *options, "cluster/mlflow.sbatch", str(tmp_path / "mlflow"))
    uri = tmp_path / "mlflow" / "uri"
    wait_for("the address", uri.exists)
    ask = "import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1] + '/health').read().decode())"
    words = ["srun", f"--nodelist={second}", sys.executable, "-c", ask, uri.read_text().strip()]
    wait_for("the server", lambda: subprocess.run(words, capture_output=True, text=True).stdout.strip() == "OK")
