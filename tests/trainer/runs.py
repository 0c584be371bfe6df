"""Training runs for tests: of this process, or several one after another on some ranks, which start only once.

A run is {"set": {setting: value}} on the tiny corpus; "resume": it goes on from the checkpoints of its work folder;
"stop": after this step rank 0 gets SIGTERM. Its record holds what was logged: {metric: [values in the order of steps]}.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import torch
import torch.distributed as dist

from contract.artifacts import open_artifact
from contract.cli import Preempted, Progress
from tests import tiny
from trainer import distributed
from trainer.checkpoint import Checkpoints
from trainer.inputs import read_catalog
from trainer.model import ColaRec, model_config
from trainer.training import Training

ENV = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}


def write_data(work: Path) -> Path:
    """Writes the tiny corpus/ and gid/ into a work folder."""
    config = tiny.tiny_config(work)
    tiny.write_corpus(config)
    tiny.write_gids(config)
    return work


class Record:
    """Stands where the MLflow run does."""

    def __init__(self, stop: int = 0):
        self.values: dict[str, list[float]] = defaultdict(list)
        self._stop = stop

    def metrics(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.values[name].append(value)
        if 0 < step == self._stop and dist.get_rank() == 0:
            os.kill(os.getpid(), signal.SIGTERM)


def fit(work: Path, settings: dict[str, str] | None = None, resume: bool = False, stop: int = 0):
    """Trains within the process group that is there. Returns the values logged and the Training."""
    defaults = {"train.log_every": "1", "train.max_steps": "20", "train.save_every": "1000"}
    config = tiny.tiny_config(work, **{k.replace(".", "__"): v for k, v in (defaults | (settings or {})).items()})
    corpus, gid = open_artifact(config, "corpus"), open_artifact(config, "gid")
    catalog = read_catalog(corpus, gid)
    torch.manual_seed(config.seed)
    model = ColaRec(model_config(config, catalog))
    engine = distributed.initialize(config, model, dist.get_world_size(), torch.device("cpu"))
    checkpoints = Checkpoints(config, {"corpus": corpus.digest})
    if not resume and dist.get_rank() == 0:
        checkpoints.create("run")
    dist.barrier()
    record = Record(stop)
    try:
        training = Training(config, corpus, catalog, engine, checkpoints, record, Progress("train"))
        if resume:
            assert checkpoints.find() == "run"
            training.resume()
        training.fit()
    except Preempted:
        assert stop
    return record.values, training


def start(ranks: int, arguments: list[str]) -> list[subprocess.Popen]:
    """Starts a Python program as so many ranks, each in a process group of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = ENV | {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    return [
        subprocess.Popen(
            [sys.executable, "-u", *arguments], env=env | {"RANK": str(r), "LOCAL_RANK": str(r)}, **options
        )
        for r in range(ranks)
    ]


def on_ranks(ranks: int, work: Path, runs: list[dict]) -> list[dict[str, list[float]]]:
    """The records of runs, each in a work folder of its name under `work`, on so many ranks."""
    processes = start(ranks, [__file__, str(work), json.dumps(runs)])
    outputs = [process.communicate(timeout=600)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * ranks, "\n".join(outputs)
    return json.loads((work / "records.json").read_text())


def main() -> None:
    work, runs = Path(sys.argv[1]), json.loads(sys.argv[2])
    with distributed.process_group(timeout=120) as (rank, _, _):
        records = [
            fit(work / run["name"], run.get("set"), run.get("resume", False), run.get("stop", 0))[0] for run in runs
        ]
    if rank == 0:
        (work / "records.json").write_text(json.dumps(records))


if __name__ == "__main__":
    main()
