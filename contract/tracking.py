"""One MLflow run per stage, written by rank 0 only."""

import contextlib
import fcntl
import logging
import os
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

from contract import config as config_module
from contract.artifacts import git_revision
from contract.cli import RANK
from contract.config import Config

# An unreachable server must be said within seconds, before the work begins; MLflow alone retries for minutes.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
os.environ.setdefault("MLFLOW_ENABLE_ASYNC_LOGGING", "true")
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")


class Run:
    """A stage's record. On ranks above 0 every call does nothing."""

    def __init__(self, client=None, run_id: str = ""):
        self._client = client
        self.run_id = run_id

    def metrics(self, values: dict[str, float], step: int = 0) -> None:
        """Logs {name: number}; '@' becomes '_at_' and commas go, as MLflow's names have none."""
        if self._client:
            for name, value in values.items():
                allowed = name.replace("@", "_at_").replace(",", "")
                self._client.log_metric(self.run_id, allowed, value, step=step, synchronous=False)

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Logs a file, below `folder` of the run's artifacts."""
        if self._client:
            self._client.log_artifact(self.run_id, str(path), folder)


@contextlib.contextmanager
def track(config: Config, stage: str, run_id: str = "") -> Iterator[Run]:
    """Opens the stage's run, or goes on with `run_id`, and closes it as FINISHED, FAILED or KILLED.

    Raises:
        ConnectionError: the tracking server or database cannot be used.
    """
    if RANK > 0:
        yield Run()
        return
    client, run_id = _start(config, stage, run_id)
    status = "FAILED"
    try:
        with _system_metrics(config, stage, run_id):
            yield Run(client, run_id)
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        import mlflow

        mlflow.flush_async_logging()
        client.set_terminated(run_id, status)


@contextlib.contextmanager
def _system_metrics(config: Config, stage: str, run_id: str) -> Iterator[None]:
    """Samples what the training uses of this machine, in a thread of MLflow's."""
    if stage != "train" or not config.tracking.system_every:
        yield
        return
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    logging.getLogger("mlflow.system_metrics").setLevel(logging.ERROR)
    monitor = SystemMetricsMonitor(run_id, sampling_interval=config.tracking.system_every, resume_logging=True)
    monitor.start()
    try:
        yield
    finally:
        monitor.finish()


def _start(config: Config, stage: str, run_id: str):
    logging.getLogger("alembic").setLevel(logging.WARNING)
    import mlflow  # 2 s: not before the arguments are known to be good
    from mlflow.entities import Param, RunTag

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    uri = config.tracking.uri
    try:
        with _creation_lock(uri):
            mlflow.set_tracking_uri(uri)  # what is flushed at the end, too
            client = mlflow.MlflowClient()
            experiment = client.get_experiment_by_name(config.tracking.experiment)
            if experiment:
                experiment_id = experiment.experiment_id
            else:
                experiment_id = client.create_experiment(
                    config.tracking.experiment,
                    artifact_location=_artifact_location(uri),
                    tags={"mlflow.experimentKind": "custom_model_development"},  # the UI opens its runs, not traces
                )
        if run_id:
            client.update_run(run_id, status="RUNNING")
            return client, run_id
        run = client.create_run(experiment_id, run_name=f"{config.name}/{stage}")
        params = [Param(key, str(value)) for key, value in config_module.flatten(config).items()]
        tags = [
            RunTag("stage", stage),
            RunTag("work", str(config.work_dir)),
            RunTag("mlflow.source.git.commit", git_revision()),
        ]
        if config.tracking.parent:
            tags.append(RunTag("mlflow.parentRunId", config.tracking.parent))
        client.log_batch(run.info.run_id, params=params[:100], tags=tags)
        client.log_batch(run.info.run_id, params=params[100:])
        client.log_text(run.info.run_id, config_module.to_toml(config), "config.toml")
        return client, run.info.run_id
    except Exception as error:  # each store raises its own kinds
        raise ConnectionError(
            f"MLflow at {uri} cannot be used: {str(error).splitlines()[0]}\n"
            "start it, or choose another with --tracking.uri=sqlite:///runs/mlflow.db"
        ) from error


def _sqlite_file(uri: str) -> Path | None:
    return Path(uri.removeprefix("sqlite:///")).absolute() if uri.startswith("sqlite:///") else None


def _artifact_location(uri: str) -> str | None:
    """Beside the database; a server chooses its own."""
    file = _sqlite_file(uri)
    return urllib.parse.quote((file.parent / "mlartifacts").as_uri(), safe=":/%") if file else None


@contextlib.contextmanager
def _creation_lock(uri: str) -> Iterator[None]:
    """Two processes that create the same SQLite store at once break it."""
    file = _sqlite_file(uri)
    if not file:
        yield
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.with_name(f".{file.name}.lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
