"""What MLflow holds after a stage, and what becomes of a store that cannot be used."""

import subprocess
import sys
import time

import mlflow
import pytest

from contract import config
from contract.tracking import track

TRACKER = """
import sys
from contract import config
from contract.tracking import track
with track(config.load(sys.argv[1]), sys.argv[2]) as run:
    run.metrics({"loss": 1.0})
"""


@pytest.fixture
def settings(tmp_path):
    """A store of its own. Its file is made by the first `track`."""
    file = tmp_path / "small.toml"
    uri = f"sqlite:///{tmp_path / 'store' / 'mlflow.db'}"
    file.write_text(f'seed = 7\nwork = "{tmp_path / "work"}"\n[tracking]\nuri = "{uri}"\n')
    return config.load(str(file))


def runs(settings) -> list:
    client = mlflow.MlflowClient(tracking_uri=settings.tracking.uri)
    experiment = client.get_experiment_by_name(settings.tracking.experiment)
    return client.search_runs([experiment.experiment_id], order_by=["attributes.start_time"])


def test_a_run_holds_the_config_the_metrics_and_how_it_ended(settings, tmp_path):
    note = tmp_path / "note.txt"
    note.write_text("kept")
    with track(settings, "eval") as run:
        run.metrics({"recall@10": 0.25}, step=3)
        run.artifact(note)
    with pytest.raises(KeyboardInterrupt), track(settings, "train"):
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match="bad"), track(settings, "gid"):
        raise ValueError("bad")
    assert [run.info.status for run in runs(settings)] == ["FINISHED", "KILLED", "FAILED"]
    with track(settings, "train", run_id=runs(settings)[1].info.run_id) as resumed:
        resumed.metrics({"loss": 2.0})

    evaluated, trained, failed = runs(settings)
    assert [run.info.status for run in (evaluated, trained, failed)] == ["FINISHED", "FINISHED", "FAILED"]
    assert evaluated.info.run_name == "small/eval"
    assert evaluated.data.params == {key: str(value) for key, value in config.flatten(settings).items()}
    assert evaluated.data.metrics == {"recall_at_10": 0.25}
    assert evaluated.data.tags["stage"] == "eval"
    assert trained.data.metrics == {"loss": 2.0}
    kept = mlflow.artifacts.list_artifacts(run_id=evaluated.info.run_id, tracking_uri=settings.tracking.uri)
    assert [file.path for file in kept] == ["config.toml", "note.txt"]


def test_training_samples_the_machine(settings, tmp_path):
    sampled = config.load(str(tmp_path / "small.toml"), {"tracking.system_every": "1"})
    client = mlflow.MlflowClient(settings.tracking.uri)
    with track(sampled, "train") as run:
        for _ in range(100):
            found = client.get_run(run.run_id).data.metrics
            if "system/cpu_utilization_percentage" in found:
                break
            time.sleep(0.2)
    assert 0 <= found["system/system_memory_usage_percentage"] <= 100
    with track(config.load(str(tmp_path / "small.toml"), {"tracking.system_every": "1"}), "gid") as run:
        time.sleep(2.5)
    assert client.get_run(run.run_id).data.metrics == {}


def test_every_metric_arrives_and_no_other_store_is_made(settings, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)  # where MLflow's own default store would appear
    with track(settings, "train") as run:
        for step in range(300):
            run.metrics({"loss": float(step)}, step)
    assert list(elsewhere.iterdir()) == []
    client = mlflow.MlflowClient(settings.tracking.uri)
    assert [m.value for m in client.get_metric_history(run.run_id, "loss")] == [float(step) for step in range(300)]


def test_an_unreachable_server_is_said_at_once(settings, tmp_path):
    unreachable = config.load(str(tmp_path / "small.toml"), {"tracking.uri": "http://127.0.0.1:9"})
    start = time.monotonic()
    message = r"http://127\.0\.0\.1:9 cannot be used.*\n.*--tracking\.uri=sqlite:///"
    with pytest.raises(ConnectionError, match=message), track(unreachable, "train"):
        pytest.fail("the stage must not begin")
    assert time.monotonic() - start < 15


def test_two_processes_create_a_store_at_the_same_time(settings, tmp_path):
    processes = [
        subprocess.Popen([sys.executable, "-c", TRACKER, str(tmp_path / "small.toml"), stage], stderr=subprocess.PIPE)
        for stage in ("etl", "gid")
    ]
    errors = [process.communicate()[1].decode() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    assert sorted(run.info.run_name for run in runs(settings)) == ["small/etl", "small/gid"]
