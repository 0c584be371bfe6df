"""What becomes of records when MLflow's server dies, stays away or refuses them, and when this process is killed."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import mlflow
import pytest

from contract import config, disk, outbox
from contract.tracking import track

KILLED = """
import os, signal, sys
from contract import config
from contract.tracking import track
with track(config.load(sys.argv[1]), "train", run_id=sys.argv[2]) as run:
    for step in range(50):
        run.metrics({"loss": float(step)}, step)
    os.kill(os.getpid(), signal.SIGKILL)
"""


class Server:
    """A real MLflow server that can be killed and started again on the same port and store."""

    def __init__(self, folder):
        self._folder, self._process = folder, None
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self._port}"

    def start(self):
        store = ("--backend-store-uri", f"sqlite:///{self._folder}/mlflow.db")
        artifacts = ("--artifacts-destination", str(self._folder / "artifacts"))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", "--port", str(self._port), "--workers", "1", *store, *artifacts],
            env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=5).close()
                return
            except OSError:
                time.sleep(0.2)
        pytest.fail("the MLflow server does not start")

    def kill(self):
        if self._process:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.kill()


@pytest.fixture
def settings(tmp_path, server, monkeypatch):
    """Against that server, one attempt at a time, and without samples of the machine."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(outbox, "LAST_WAIT", 3.0)
    return load(tmp_path, server.uri)


def load(folder, uri):
    file = folder / "small.toml"
    file.write_text(f'work = "{folder / "work"}"\n[tracking]\nuri = "{uri}"\nsystem_every = 0\n')
    return config.load(str(file))


def history(settings, run_id, name="loss"):
    """[(step, value)] in the order of the times that they were logged at."""
    metrics = mlflow.MlflowClient(settings.tracking.uri).get_metric_history(run_id, name)
    return [(m.step, m.value) for m in sorted(metrics, key=lambda m: (m.timestamp, m.step))]


def status(settings, run_id):
    return mlflow.MlflowClient(settings.tracking.uri).get_run(run_id).info.status


def left(settings):
    """{run id: number of unsent records} of the work folder."""
    files = (settings.work_dir / outbox.QUEUE).glob(f"*/{outbox.RECORDS}")
    return {file.parent.name: file.read_text().count("\n") for file in files}


def test_a_server_that_dies_and_returns_misses_nothing(settings, server, tmp_path, capsys):
    server.start()
    values = [(step, float(step)) for step in range(60)]
    note = tmp_path / "note.txt"
    note.write_text("as it was")
    with track(settings, "train") as run:
        for step in range(20):
            run.metrics({"loss": step, "recall@10": 1.0}, step)
        server.kill()
        before = time.time()
        for step in range(20, 40):
            run.metrics({"loss": step}, step)
            time.sleep(0.05)
        run.artifact(note, "notes")
        note.unlink()
        away = time.time()
        assert left(settings)[run.run_id] > 20
        server.start()
        for step in range(40, 60):
            run.metrics({"loss": step}, step)
    assert history(settings, run.run_id) == values
    logged = mlflow.MlflowClient(server.uri).get_metric_history(run.run_id, "loss")[20:40]
    assert all(1000 * before - 1 <= metric.timestamp <= 1000 * away for metric in logged)
    assert status(settings, run.run_id) == "FINISHED"
    assert mlflow.artifacts.load_text(f"runs:/{run.run_id}/notes/note.txt") == "as it was"
    assert left(settings) == {}
    said = capsys.readouterr().out
    assert f"MLflow at {server.uri} is away" in said
    assert "is back" in said


def test_what_a_dead_server_and_a_killed_process_leave_is_sent_later(settings, server, tmp_path, capsys):
    """Goes on where the test above ends, with the server running."""
    with track(settings, "train") as run:
        server.kill()
        run.metrics({"loss": 1.0}, 1)
    assert f"2 records have not reached MLflow at {server.uri}" in capsys.readouterr().out
    with track(settings, "train", run_id=run.run_id) as resumed:  # does not fail for the server
        resumed.metrics({"loss": 2.0}, 2)
    assert "5 records have not reached" in capsys.readouterr().out
    with pytest.raises(ConnectionError, match=r"cannot be used: .*\nthe records stay in"):
        outbox.main([str(settings.work_dir)])
    shutil.copytree(settings.work_dir / outbox.QUEUE, tmp_path / "copy")

    server.start()
    outbox.main([str(settings.work_dir)])
    assert f"sent 5 records of run {run.run_id}" in capsys.readouterr().out
    assert history(settings, run.run_id) == [(1, 1.0), (2, 2.0)]
    assert status(settings, run.run_id) == "FINISHED"
    outbox.main([str(settings.work_dir)])
    assert "nothing is left" in capsys.readouterr().out
    # As if a crash had come between MLflow's answer and the removal: the same once more.
    shutil.copytree(tmp_path / "copy", settings.work_dir / outbox.QUEUE, dirs_exist_ok=True)
    outbox.main([str(settings.work_dir)])
    assert history(settings, run.run_id) == [(1, 1.0), (2, 2.0)]

    with track(settings, "train") as run:
        server.kill()
    outbox_of_run = settings.work_dir / outbox.QUEUE / run.run_id
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "small.toml"), run.run_id], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert left(settings)[run.run_id] == 52  # FINISHED, RUNNING, and the metrics
    server.start()
    with track(settings, "eval"):  # the next stage sends them
        for _ in range(300):
            if not outbox_of_run.exists():
                break
            time.sleep(0.1)
    assert history(settings, run.run_id) == [(step, float(step)) for step in range(50)]
    assert status(settings, run.run_id) == "RUNNING"  # how the killed process left it


def test_a_record_with_a_flipped_bit_is_not_sent():
    record = {"time": 1, "step": 2, "metrics": {"loss": 1.5}}
    line = json.dumps(disk.sealed(record)).encode()
    assert outbox._parsed(line) == record == outbox._parsed(json.dumps(record).encode())  # as an earlier version wrote
    for bit in range(8 * len(line)):
        flipped = bytearray(line)
        flipped[bit // 8] ^= 1 << bit % 8
        assert outbox._parsed(bytes(flipped)) in (None, record)  # white space may differ


def test_the_last_record_is_sent_however_late_it_comes(tmp_path, monkeypatch):
    """What a stage puts and closes while the thread finds nothing to send."""
    settings = load(tmp_path, f"sqlite:///{tmp_path / 'mlflow.db'}")
    with track(settings, "gid") as run:
        pass
    box = outbox.Outbox(settings.work_dir / outbox.QUEUE / run.run_id, settings.tracking.uri, print)
    send_some, late = box.send_some, [{"time": 1, "step": 1, "metrics": {"loss": 1.0}}]

    def find_nothing_at_first():
        count = send_some()
        if late:
            box.put(late.pop())
            box._closing.set()
        return count

    monkeypatch.setattr(box, "send_some", find_nothing_at_first)
    box.start()
    while late:
        time.sleep(0.01)
    box.close()
    assert not (settings.work_dir / outbox.QUEUE).exists()
    assert history(settings, run.run_id) == [(1, 1.0)]


def test_refused_and_torn_records_hold_up_no_other(tmp_path, capsys):
    settings = load(tmp_path, f"sqlite:///{tmp_path / 'mlflow.db'}")
    with track(settings, "gid") as run:
        run.metrics({"loss": 1.0}, 1)
        outbox.main([str(settings.work_dir)])
    output = capsys.readouterr().out
    assert f"run {run.run_id} is left to the stage" in output
    folder = settings.work_dir / outbox.QUEUE / run.run_id
    assert not folder.exists(), output
    folder.mkdir(parents=True)
    (folder / outbox.URI).write_text(settings.tracking.uri)
    lines = [json.dumps({"time": 1, "step": step, "metrics": {name: 2.0}}) for step, name in ((2, "loss"), (3, "no:?"))]
    (folder / outbox.RECORDS).write_text("\n" + "\n".join(lines) + '\n{"time": 1, "st')
    with track(settings, "gid", run_id=run.run_id) as run:
        run.metrics({"loss": 3.0}, 3)
    assert history(settings, run.run_id) == [(2, 2.0), (1, 1.0), (3, 3.0)]  # by time
    assert "MLflow refuses a record" in capsys.readouterr().out
    assert json.loads((folder / outbox.REFUSED).read_text())["metrics"] == {"no:?": 2.0}
    outbox.main([str(settings.work_dir)])  # tries none of it again
    assert (folder / outbox.REFUSED).read_text().count("\n") == 1


def test_a_wrong_folder_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        outbox.main([str(tmp_path / "nowhere")])
