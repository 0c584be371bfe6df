"""One MLflow run per stage, written by rank 0 only."""

import contextlib
import fcntl
import logging
import os
import threading
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

from contract import config as config_module
from contract import urls
from contract.artifacts import git_revision
from contract.cli import RANK, Progress
from contract.outbox import QUEUE, Outbox
from contract.settings import Config

# An unreachable server must be said within seconds, before the work begins; MLflow alone retries for minutes.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")


class Run:
    """A stage's record. On ranks above 0 every call does nothing. No call waits for the store, see `Outbox`."""

    def __init__(self, outbox: Outbox | None = None, run_id: str = ""):
        self._outbox = outbox
        self.run_id = run_id

    def metrics(self, values: dict[str, float], step: int = 0) -> None:
        """Logs {name: number}; '@' becomes '_at_' and commas go, as MLflow's names have none."""
        if self._outbox:
            allowed = {name.replace("@", "_at_").replace(",", ""): float(value) for name, value in values.items()}
            self._outbox.put({"time": _now(), "step": step, "metrics": allowed})

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Logs a file, below `folder` of the run's artifacts."""
        if self._outbox:
            self._outbox.put_file(path, folder)

    def served_model(self, name: str, registered: str, **what) -> str:
        """Logs a model that MLflow can serve and registers it; this waits for the store. On rank 0 alone.

        Args:
            what: as `mlflow.pyfunc.log_model` takes it.

        Returns:
            its URI, models:/NAME/VERSION.

        Raises:
            ConnectionError: the store did not take it.
        """
        import mlflow

        try:
            with mlflow.start_run(self.run_id):
                info = mlflow.pyfunc.log_model(name=name, registered_model_name=registered, **what)
        except mlflow.MlflowException as error:
            reason = urls.hidden(str(error)).splitlines()[0]
            raise ConnectionError(f"MLflow at {mlflow.get_tracking_uri()} did not take the model: {reason}") from error
        return f"models:/{registered}/{info.registered_model_version}"


@contextlib.contextmanager
def track(config: Config, stage: str, run_id: str = "") -> Iterator[Run]:
    """Opens the stage's run, or goes on with `run_id`, and closes it as FINISHED, FAILED or KILLED.

    Only the beginning of a new run needs the store. A server that is away later, or when a run goes on, stops nothing.

    Raises:
        ConnectionError: the tracking server or database cannot be used.
    """
    if RANK > 0:
        yield Run()
        return
    run_id, goes_on = run_id or _start(config, stage), bool(run_id)
    outbox = Outbox(config.work_dir / QUEUE / run_id, absolute_uri(config.tracking.uri), Progress("mlflow"))
    outbox.start()
    run = Run(outbox, run_id)
    if goes_on:
        outbox.put({"time": _now(), "status": "RUNNING"})
    status = "FAILED"
    try:
        with _system_metrics(config, stage, run):
            yield run
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        outbox.put({"time": _now(), "status": status})
        outbox.close()


def _now() -> int:
    return time.time_ns() // 1_000_000


@contextlib.contextmanager
def _system_metrics(config: Config, stage: str, run: Run) -> Iterator[None]:
    """Samples what the training uses of this machine, in a thread."""
    if stage != "train" or not config.tracking.system_every:
        yield
        return
    done = threading.Event()
    thread = threading.Thread(target=_sample, args=(run, config, done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _sample(run: Run, config: Config, done: threading.Event) -> None:
    """MLflow's collectors without its loop, which ends for good when the server does not answer."""
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    logging.getLogger("mlflow.system_metrics").setLevel(logging.ERROR)
    monitor = SystemMetricsMonitor(run.run_id, tracking_uri=config.tracking.uri)
    while not done.wait(config.tracking.system_every):
        monitor.collect_metrics()
        # A step that goes on in a resumed run, without asking the server for the last one.
        run.metrics({f"system/{name}": value for name, value in monitor.aggregate_metrics().items()}, int(time.time()))
        for collector in monitor.monitors:
            collector.clear_metrics()


def _start(config: Config, stage: str) -> str:
    """Creates the stage's run, with its parameters; returns its id."""
    logging.getLogger("alembic").setLevel(logging.WARNING)
    import mlflow  # 2 s: not before the arguments are known to be good
    from mlflow.entities import Param, RunTag

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    uri = config.tracking.uri
    try:
        with _creation_lock(uri):
            mlflow.set_tracking_uri(uri)
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
        return run.info.run_id
    except Exception as error:  # each store raises its own kinds
        raise ConnectionError(
            f"MLflow at {uri} cannot be used: {(urls.hidden(str(error)).splitlines() or [type(error).__name__])[0]}\n"
            "start it, or choose another with --tracking.uri=sqlite:///runs/mlflow.db"
        ) from error


def _sqlite_file(uri: str) -> Path | None:
    return Path(uri.removeprefix("sqlite:///")).absolute() if uri.startswith("sqlite:///") else None


def absolute_uri(uri: str) -> str:
    """The store by a name that holds in any folder."""
    file = _sqlite_file(uri)
    return f"sqlite:///{file}" if file else uri


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
