"""Records on their way to MLflow: on disk at once, sent by a thread, kept while the server is away.

    python -m contract.outbox WORK      sends what the stages of this work folder have left

<work>/.mlflow-queue/<run_id>/ holds the records that MLflow has not confirmed, the tracking URI that they are for, and
the files that are to become artifacts. Whoever sends them holds a lock on it. It disappears when all have arrived.
Nobody but its owner can read it, or send it.

A record leaves the disk after MLflow has confirmed it, so one may be sent twice after a crash. MLflow takes the two
for one: a metric by name, step, time and value, all of which the record holds; an artifact by its name.
"""

import argparse
import contextlib
import fcntl
import itertools
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from contract import cli, urls
from contract.cli import Progress
from contract.disk import opened, sealed, write_atomically

QUEUE, RECORDS, URI, REFUSED, FILES = ".mlflow-queue", "records.jsonl", "uri", "refused.jsonl", "files"
LAST_WAIT = 15.0  # seconds that the end of a stage waits for a server that is away
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 60.0  # seconds between two attempts, doubled each time
_CHUNK = 1 << 18  # bytes of records sent at once
_METRICS_AT_ONCE = 1000  # MLflow's limit
# What another attempt would not mend. A proxy's own pages are not meant: see `_is_refused`.
_REFUSALS = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "INVALID_STATE", "BAD_REQUEST")


class Outbox:
    """The unsent records of one run. `put` may be called from any thread; it writes a line and returns."""

    def __init__(self, folder: Path, uri: str, report: Callable[[str], None], wait: bool = True):
        """Opens <work>/.mlflow-queue/<run_id>, with what is left there of an earlier process.

        Raises:
            BlockingIOError: another process sends it, and `wait` is false.
        """
        self._folder, self._uri, self._report = folder, uri, report
        self._handle = _locked(folder, wait)
        write_atomically(folder / URI, uri)
        (folder / URI).chmod(0o600)
        self._lock, self._more, self._closing = threading.Lock(), threading.Event(), threading.Event()
        self._given_up = threading.Event()
        self._sent = 0  # bytes of the records that have arrived
        self._left = 0  # records that had not when the lock was given up
        self._client = None
        self._away = self._write_failed = False
        self._thread = threading.Thread(target=self._work, name="mlflow outbox", daemon=True)

    def start(self) -> None:
        """Begins to send: first what other runs of this work folder have left, then the records of this one."""
        self._thread.start()

    def put(self, record: dict) -> None:
        """Keeps {"time", "step", "metrics": {name: value}}, {"file", "folder"} or {"time", "status"}; times in ms."""
        # The line break comes first: a line that a full disk has cut spoils no other.
        line = b"\n" + json.dumps(sealed(record)).encode()
        with self._lock:
            try:
                if os.write(self._handle.fileno(), line) < len(line):
                    raise OSError("the disk is full")
            except OSError as error:
                if not self._write_failed:
                    self._report(f"{self._folder} cannot be written ({error}): metrics are lost until it can be")
                self._write_failed = True
                return
        self._more.set()

    def put_file(self, path: Path, folder: str | None) -> None:
        """Keeps a file as it is now, by a hard link where it can: a stage renames its folder in the end."""
        place = self._folder / FILES / str(time.time_ns())
        place.mkdir(parents=True)
        try:
            os.link(path, place / path.name)
        except OSError:  # another file system, or one without hard links
            shutil.copyfile(path, place / path.name)
            (place / path.name).chmod(0o600)
        self.put({"file": f"{place.name}/{path.name}", "folder": folder})

    def close(self) -> None:
        """Sends what is left; says where it stays when the server does not come back within LAST_WAIT seconds."""
        self._closing.set()
        self._more.set()
        deadline = time.monotonic() + LAST_WAIT
        while self._thread.is_alive() and not (self._away and time.monotonic() > deadline):
            self._thread.join(0.1)
        self._given_up.set()
        self._thread.join(1.5 * _FIRST_PAUSE)  # it may hang in a request until that times out
        with self._lock:
            left = self._left if self._handle.closed else len(self._unsent(None)[0])
        if left:
            self._report(
                f"{left} records have not reached MLflow at {self._uri}. They stay in {self._folder}; the next stage "
                f"with this work folder sends them, or: python -m contract.outbox {self._folder.parent.parent}"
            )

    def release(self) -> None:
        """Gives up the lock, and removes what is no longer needed."""
        with self._lock:
            self._left = len(self._unsent(None)[0])
            if not self._left and not (self._folder / REFUSED).exists():
                shutil.rmtree(self._folder, ignore_errors=True)
                with contextlib.suppress(OSError):  # those of other runs are there
                    self._folder.parent.rmdir()
            self._handle.close()

    def send_some(self) -> int:
        """Sends the oldest records; returns how many, 0 when there are none. Raises what MLflow raises."""
        with self._lock:
            records, end = self._unsent(_CHUNK)
        self._deliver(records)
        with self._lock:
            self._sent = end
            if end == os.fstat(self._handle.fileno()).st_size:
                os.ftruncate(self._handle.fileno(), 0)
                self._sent = 0
        for record in records:
            if "file" in record:
                shutil.rmtree((self._folder / FILES / record["file"]).parent, ignore_errors=True)
        return len(records)

    def _unsent(self, limit: int | None) -> tuple[list[dict], int]:
        """The records within the next `limit` bytes (None: all), and where they end."""
        size = os.fstat(self._handle.fileno()).st_size
        content = os.pread(self._handle.fileno(), limit or size, self._sent)
        if self._sent + len(content) < size:
            content = content[: content.rindex(b"\n")]
        return [r for r in map(_parsed, content.split(b"\n")) if r], self._sent + len(content)

    def _deliver(self, records: list[dict]) -> None:
        try:
            self._log(records)
        except Exception as error:
            if not _is_refused(error, self._uri):
                raise
            if len(records) > 1:
                for record in records:
                    self._deliver([record])
                return
            first = not (self._folder / REFUSED).exists()
            with open(self._folder / REFUSED, "a", opener=_for_owner) as stream:
                stream.write(json.dumps(records[0]) + "\n")
            if first:
                self._report(f"MLflow refuses a record: {_reason(error)}; it is kept in {self._folder / REFUSED}")

    def _log(self, records: list[dict]) -> None:
        """Sends records in their order. Raises what MLflow raises."""
        import mlflow
        from mlflow.entities import Metric

        self._client = self._client or mlflow.MlflowClient(self._uri)
        run_id = self._folder.name
        for are_metrics, group in itertools.groupby(records, lambda record: "metrics" in record):
            if are_metrics:
                metrics = (Metric(k, v, r["time"], r["step"]) for r in group for k, v in r["metrics"].items())
                while part := list(itertools.islice(metrics, _METRICS_AT_ONCE)):
                    self._client.log_batch(run_id, metrics=part, synchronous=True)
                continue
            for record in group:
                if record.get("status") == "RUNNING":
                    self._client.update_run(run_id, "RUNNING")
                elif "status" in record:
                    self._client.set_terminated(run_id, record["status"], record["time"])
                elif (file := self._folder / FILES / record["file"]).exists():  # else it arrived before a crash
                    self._client.log_artifact(run_id, str(file), record["folder"])

    def _work(self) -> None:
        for folder in sorted(self._folder.parent.iterdir()):
            # A server that is away costs a stage one attempt, not one for each of the runs that wait for it.
            if folder != self._folder and not self._send_left(folder):
                break
        try:
            self._send_all()
        finally:
            self.release()

    def _send_all(self) -> None:
        """Sends until `close` is called and nothing is left, or it has given up."""
        pause = _FIRST_PAUSE
        while not self._given_up.is_set():
            self._more.clear()
            closing = self._closing.is_set()  # before: what is put until then is seen by the attempt
            try:
                sent = self.send_some()
            except Exception as error:  # whatever it is, training goes on
                if not self._away:
                    kept = f"records are kept in {self._folder}"
                    self._report(f"MLflow at {self._uri} is away ({_reason(error)}): {kept}")
                self._away = True
                # The end of the stage asks for one attempt at once, and then for one each second.
                (self._given_up if self._closing.is_set() else self._closing).wait(pause)
                pause = _FIRST_PAUSE if self._closing.is_set() else min(2 * pause, _LONGEST_PAUSE)
                continue
            if self._away and sent:
                self._report(f"MLflow at {self._uri} is back: what was kept is sent")
            self._away, pause = False, _FIRST_PAUSE
            if not sent:
                if closing:
                    return
                self._more.wait()

    def _send_left(self, folder: Path) -> bool:
        """False when the server of that run does not take it."""
        try:
            count = send(folder, self._report)
        except (BlockingIOError, FileNotFoundError):  # another process is at it, or has sent it by now
            return True
        except Exception:  # it stays, and `close` of its own stage has said so
            return False
        if count:
            self._report(f"sent {count} records that an earlier stage had left in {folder}")
        return True


def send(folder: Path, report: Callable[[str], None]) -> int:
    """Sends the records that a stage has left in <work>/.mlflow-queue/<run_id>; returns how many.

    Raises:
        BlockingIOError: another process is at it.
        whatever MLflow raises: the rest stays.
    """
    outbox = Outbox(folder, _uri(folder), report, wait=False)
    count = 0
    try:
        while sent := outbox.send_some():
            count += sent
    finally:
        outbox.release()
    return count


def _uri(folder: Path) -> str:
    """The store that the records of a run are for. Queues of old versions may name it with a password."""
    return urls.without_user((folder / URI).read_text())


def _for_owner(path: str, flags: int) -> int:
    """Opens a file that nobody else may read."""
    return os.open(path, flags, 0o600)


def _locked(folder: Path, wait: bool):
    """The file of records, open for appending and locked by this process."""
    while True:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir(mode=0o700, exist_ok=True)
            folder.chmod(0o700)
            handle = open(folder / RECORDS, "ab+", buffering=0, opener=_for_owner)  # noqa: SIM115 - the lock
            os.fchmod(handle.fileno(), 0o600)
        except FileNotFoundError:  # removed since: all had arrived
            continue
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        if os.fstat(handle.fileno()).st_nlink:
            return handle
        handle.close()


def _parsed(line: bytes) -> dict | None:
    """None for what a full disk has cut, or what is damaged."""
    try:
        record = json.loads(line)
        # Those that an earlier version left behind hold no checksum of themselves, and nothing but these.
        return record if record.keys() <= {"time", "step", "metrics", "file", "folder", "status"} else opened(record)
    except (ValueError, AttributeError):
        return None


def _is_refused(error: Exception, uri: str) -> bool:
    """True when MLflow itself says that the record, or its run, is at fault."""
    from mlflow.exceptions import MlflowException, RestException

    kind = RestException if uri.startswith("http") else MlflowException
    return isinstance(error, kind) and error.error_code in _REFUSALS


def _reason(error: Exception) -> str:
    """The first line; of a chain of HTTP errors what caused them."""
    line = (urls.hidden(str(error)).splitlines() or [type(error).__name__])[0]
    return line.rpartition("(Caused by ")[2][:200]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m contract.outbox", description=__doc__.partition("\n")[0])
    parser.add_argument("work", type=Path, help="work folder of the stages, such as runs/phone")
    work, progress = parser.parse_args(argv).work, Progress("mlflow")
    if not work.is_dir():
        raise FileNotFoundError(
            f"the work folder {work} does not exist; give the one of the config, such as runs/phone"
        )
    folders = sorted((work.absolute() / QUEUE).glob(f"*/{URI}"))
    if not folders:
        return progress(f"nothing is left to send in {work}")
    for folder in (file.parent for file in folders):
        uri = _uri(folder)
        try:
            progress(f"sent {send(folder, progress)} records of run {folder.name} to {uri}")
        except BlockingIOError:
            progress(f"run {folder.name} is left to the stage that is writing it now")
        except Exception as error:  # each store raises its own kinds
            raise ConnectionError(
                f"MLflow at {uri} cannot be used: {_reason(error)}\nthe records stay in {folder}"
            ) from error


if __name__ == "__main__":
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    sys.exit(cli.run(main))
