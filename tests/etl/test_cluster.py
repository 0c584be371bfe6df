"""The stage on a cluster: a master and two workers of Spark's own, on loopback, in processes and folders of their own.

The executors run a Python that has the packages but not this repository: our code comes from the driver, or not at all.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import pyspark
import pytest

from contract import config as config_module
from contract.artifacts import MANIFEST, Artifact, open_artifact
from etl import build, generate

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs" / "demo.toml")
SPARK_HOME = Path(pyspark.__file__).parent
BARE_PYTHON = "bare/bin/python"
NUM_SHARDS = 32  # no other stage of the job has as many tasks
FILES_PER_SHARD = 6  # users, interactions, pairs, and a WebDataset shard of each split
FAST_START = "-XX:TieredStopAtLevel=1"
PATIENCE_SECONDS = 300  # a job takes some 20; a machine may be busy
# Speculation never puts a copy on the host of the first attempt: one host by two names.
HOSTS = ("127.0.0.1", "localhost")


class Master(NamedTuple):
    url: str  # spark://...
    page: str  # what it says of itself, in JSON

    def num_workers(self) -> int:
        with urllib.request.urlopen(self.page) as answer:
            return json.load(answer)["aliveworkers"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the stage runs, far from the repository: log/, and a Python that does not find the repository."""
    folder = tmp_path_factory.mktemp("cluster")
    generate.main([str(folder / "log"), "--users", "1500", "--items", "480", "--seed", "3"])
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "bare"], check=True)
    (site,) = (folder / "bare").glob("lib/python*/site-packages")
    # Python does not read .pth files in a folder that it has from one: what is installed as editable stays unknown.
    (site / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
    for package in ("contract", "etl"):
        script = f"import pyarrow, pyspark, {package}"
        words = [folder / BARE_PYTHON, "-c", script]
        errors = subprocess.run(words, cwd=folder, env=environment(folder), capture_output=True, text=True).stderr
        assert f"No module named '{package}'" in errors
    return folder


def environment(folder: Path) -> dict[str, str]:
    unset = ("PYTHONPATH", "PYSPARK_SUBMIT_ARGS", "SPARK_CONF_DIR")
    kept = {name: value for name, value in os.environ.items() if name not in unset}
    return kept | {
        "SPARK_HOME": str(SPARK_HOME),
        "SPARK_LOCAL_IP": "127.0.0.1",
        "SPARK_DAEMON_JAVA_OPTS": FAST_START,
        "PYSPARK_PYTHON": str(folder / BARE_PYTHON),
        "PYSPARK_DRIVER_PYTHON": sys.executable,
    }


@pytest.fixture(scope="module")
def master(folder) -> Iterator[Master]:
    port, page = free_port(), free_port()
    master = Master(f"spark://127.0.0.1:{port}", f"http://127.0.0.1:{page}/json/")
    with daemon(folder, "Master", "--host", "127.0.0.1", "--port", str(port), "--webui-port", str(page)):
        wait_for("the master", lambda: master.num_workers() == 0)
        yield master


@pytest.fixture
def workers(folder, master) -> Iterator[list[subprocess.Popen]]:
    """Two, of one core each."""
    words = ["Worker", "--webui-port", "0", "--cores", "1", "--memory", "1g", "--work-dir", str(folder / "executors")]
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(daemon(folder, *words, "--host", host, master.url)) for host in HOSTS]
    wait_for("the end of the workers", lambda: master.num_workers() == 0)


@contextlib.contextmanager
def daemon(folder: Path, name: str, *words: str) -> Iterator[subprocess.Popen]:
    """A process of Spark's standalone mode, and all that it starts, until the end of the block."""
    program = [SPARK_HOME / "bin" / "spark-class", f"org.apache.spark.deploy.{name.lower()}.{name}", *words]
    with (folder / f"{name}.txt").open("ab") as log:
        process = subprocess.Popen(program, cwd=folder, env=environment(folder), stdout=log, stderr=log)
    try:
        yield process
    finally:
        kill(process)


def kill(process: subprocess.Popen) -> None:
    """-9, with its children."""
    with contextlib.suppress(psutil.NoSuchProcess):
        tree = psutil.Process(process.pid)
        for one in [tree, *tree.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.send_signal(signal.SIGKILL)
    process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(what: str, there: Callable[[], bool], every: float = 0.1) -> None:
    until = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < until:
        # While it starts, the master is not there, or answers with another page than the JSON.
        with contextlib.suppress(OSError, json.JSONDecodeError):
            if there():
                return
        time.sleep(every)
    pytest.fail(f"waited {PATIENCE_SECONDS} s for {what}")


def settings(folder: Path, name: str) -> dict[str, str]:
    """Of the stage on folder/log, which it turns into folder/<name>."""
    return {
        "work": str(folder / name), "data.path": str(folder / "log"), "etl.num_shards": str(NUM_SHARDS),
        "etl.vocab_size": "400", "tracking.uri": f"sqlite:///{folder}/mlflow.db",
    }  # fmt: skip


def arguments(settings: dict[str, str]) -> list[str]:
    return ["--config", CONFIG, *(f"--{key}={value}" for key, value in settings.items())]


class Job:
    """spark-submit etl/build.py into <folder>/<name>."""

    def __init__(self, folder: Path, name: str, master: str, **conf: str):
        self.work, self.log, self.events = folder / name, folder / f"{name}.txt", folder / f"{name}.events"
        self.events.mkdir()
        self.settings = settings(folder, name)
        conf |= {
            "spark.executor.memory": "640m", "spark.executor.extraJavaOptions": FAST_START, "spark.ui.enabled": "false",
            "spark.sql.shuffle.partitions": "2", "spark.eventLog.enabled": "true", "spark.eventLog.compress": "false",
            "spark.eventLog.rolling.enabled": "false", "spark.eventLog.dir": self.events.as_uri(),
            "spark.hadoop.fs.defaultFS": "hdfs://127.0.0.1:9",  # as on YARN; nobody is there
        }  # fmt: skip
        words = [SPARK_HOME / "bin" / "spark-submit", "--master", master, "--driver-java-options", FAST_START]
        words += [word for key, value in conf.items() for word in ("--conf", f"{key}={value}")]
        words += [ROOT / "etl" / "build.py", *arguments(self.settings)]
        env = environment(folder) | {"PYTHONPATH": str(ROOT)}  # of the driver
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(words, cwd=folder, env=env, stdout=log, stderr=subprocess.STDOUT)

    def corpus(self) -> Artifact:
        """What the job wrote, once it is through: the files of the manifest, unchanged, and no others anywhere."""
        assert self.process.wait(PATIENCE_SECONDS) == 0, self.log.read_text()
        corpus = open_artifact(config_module.load(CONFIG, self.settings), "corpus")
        assert {path.name for path in self.work.iterdir()} == {"corpus", ".corpus.lock"}
        files = {str(file.relative_to(corpus.path)) for file in corpus.path.rglob("*") if not file.is_dir()}
        assert files == {*corpus.manifest["files"], MANIFEST}
        return corpus

    def shards_begun(self) -> float:
        """The share of the shards whose files are there or begun."""
        stage = self.work / ".corpus.tmp" / "_stage"
        if not (stage.parent / "items.parquet").is_dir():  # written right before the shards
            return 0
        return sum("." not in file.name and file.is_file() for file in stage.iterdir()) / FILES_PER_SHARD / NUM_SHARDS

    def tasks_of_shards(self) -> list[dict]:
        """The ends of all attempts to write a shard, from Spark's event log."""
        (file,) = self.events.iterdir()
        events = [json.loads(line) for line in file.open()]
        submitted = (event["Stage Info"] for event in events if event["Event"] == "SparkListenerStageSubmitted")
        (stage,) = {info["Stage ID"] for info in submitted if info["Number of Tasks"] == NUM_SHARDS}
        return [event for event in events if event["Event"] == "SparkListenerTaskEnd" and event["Stage ID"] == stage]


@pytest.fixture
def submit(folder) -> Iterator[Callable[..., Job]]:
    with contextlib.ExitStack() as stack:

        def run(name: str, master: Master, **conf: str) -> Job:
            job = Job(folder, name, master.url, **conf)
            stack.callback(kill, job.process)
            return job

        yield run


@pytest.fixture(scope="module")
def digest(folder) -> str:
    """Of the corpus that two threads of one process write."""
    here = settings(folder, "local")
    build.main(arguments(here))
    return open_artifact(config_module.load(CONFIG, here), "corpus").digest


def test_with_speculative_copies_a_cluster_writes_what_one_process_does(submit, master, workers, digest):
    eager = {"": "true", ".interval": "5ms", ".quantile": "0.01", ".multiplier": "0.01", ".minTaskRuntime": "1ms"}
    job = submit("speculation", master, **{f"spark.speculation{key}": value for key, value in eager.items()})
    assert job.corpus().digest == digest
    tasks = [task["Task Info"] for task in job.tasks_of_shards()]
    assert {task["Host"] for task in tasks} == set(HOSTS)
    assert any(task["Speculative"] for task in tasks)


def test_a_worker_that_dies_while_shards_are_written_leaves_no_trace(submit, master, workers, digest):
    job = submit("killed", master)
    wait_for("the first shards", lambda: job.process.poll() is not None or job.shards_begun() > 0.2, every=0.002)
    kill(workers[0])
    assert job.shards_begun() < 1, "all shards were written before the worker was dead; raise NUM_SHARDS"
    assert job.corpus().digest == digest
    lost = [task for task in job.tasks_of_shards() if task["Task End Reason"]["Reason"] == "ExecutorLostFailure"]
    assert {task["Task Info"]["Host"] for task in lost} == {HOSTS[0]}
