"""Stage artifacts: a folder under the work directory, complete if and only if it holds a manifest.

A stage writes into a temporary folder beside the final one, hashes what it wrote, writes manifest.json
and renames the folder. A stage that dies leaves the artifact of the run before it untouched. A manifest holds a
checksum of itself; one that lacks it is damaged, or of a version before there were any: see contract/seal.py.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from contract import config as config_module
from contract.disk import (
    difference,
    fingerprint,
    read_record,
    refusal,
    refuses_writing,
    write_record,
)
from contract.settings import Config

MANIFEST = "manifest.json"
# A log or a shard that was moved is the same one.
SHAPE_NOTHING = ("data.path", "data.shards_url", "gid.rebuild_share")
# Settings of [train] that leave the trained model as it is.
SHAPE_NO_MODEL = ("workers", "log_every", "save_every", "keep_last", "resume", "timeout")
# What may differ between a training that was interrupted and the one that goes on with it.
FREE_IN_TRAINING = {
    f"train.{name}"
    for name in (
        *SHAPE_NO_MODEL,
        *("zero_stage", "micro_tokens", "length_groups", "eval_every", "patience", "non_finite", "max_skipped"),
    )
}
# What to do, beside making room, about a work folder that cannot be written.
ELSEWHERE = "write elsewhere with --work=..."
# Larger files are checked by size alone: a month of logs is not read twice to be sure of it.
MAX_BYTES_HASHED_ON_OPEN = 64 << 20


@dataclass(frozen=True)
class Stage:
    """A stage: the folder it writes, the command that runs it, what it needs, and the settings that shape it."""

    name: str
    command: str
    needs: tuple[str, ...]
    sections: tuple[str, ...]


STAGES = {
    "corpus": Stage("corpus", "spark-submit etl/build.py", (), ("seed", "data", "etl")),
    "gid": Stage("gid", "python gid/build.py", ("corpus",), ("seed", "cf", "gid")),
    "model": Stage("model", "deepspeed trainer/main.py", ("corpus", "gid"), ("seed", "history", "model", "loss")),
    "eval": Stage("eval", "deepspeed eval/main.py", ("corpus", "gid", "model"), ("eval",)),
}


@dataclass(frozen=True)
class Artifact:
    """A complete artifact: `path / file` are its files, `counts` what the stage counted."""

    path: Path
    manifest: dict
    shards_url: str = ""  # of corpus/: where its .tar files are to be read instead, see data.shards_url

    @property
    def counts(self) -> dict:
        return self.manifest["counts"]

    @property
    def digest(self) -> str:
        """Changes whenever a file of the artifact does."""
        return self.manifest["digest"]


def open_artifact(config: Config, name: str, any_input: bool = False) -> Artifact:
    """Opens <work>/<name>, checked against its manifest, the config and the artifacts it was built from.

    Args:
        any_input: the artifacts it was built from may have changed since.

    Raises:
        FileNotFoundError: the stage has not been run.
        ValueError: files differ from the manifest, or it was built with other settings or another input.
    """
    stage, path = STAGES[name], config.work_dir / name
    command = f"{stage.command} --config <your config>"
    manifest = read_manifest(path, command)
    shards_url = config.data.shards_url if name == "corpus" else ""
    names = [file for file in manifest["files"] if not (shards_url and file.endswith(".tar"))]  # they need not be here
    _check_files(path, manifest, names, command)
    # A setting that did not exist when the artifact was built cannot have shaped it: only known ones are compared.
    wanted = config_module.section(config, *stage.sections)
    for key, value in manifest["config"].items():
        if key in wanted and key not in SHAPE_NOTHING and wanted[key] != value:
            raise ValueError(
                f"{path} was built with {key} = {value!r}, the config says {wanted[key]!r}; "
                f"set it back, choose another work folder (--work=...), or run again: {command}"
            )
    for need in () if any_input else stage.needs:
        if read_manifest(config.work_dir / need, STAGES[need].command)["digest"] != manifest["inputs"][need]:
            raise ValueError(f"{path} was built from another {need}/ than the one that is there now; run: {command}")
    return Artifact(path, manifest, shards_url)


def read_manifest(path: Path, command: str) -> dict:
    """The manifest of the artifact at `path`, for which `command` is to be run.

    Raises:
        FileNotFoundError: there is none, and so no artifact.
        ValueError: it is damaged.
    """
    try:
        return read_record(path / MANIFEST, f"run again: {command}")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing or incomplete (no {MANIFEST}); run first: {command}") from None


def open_finished(path: Path, command: str) -> Artifact:
    """The artifact at `path`, or a copy of some of its files, checked against its manifest and nothing else.

    Raises:
        FileNotFoundError: there is none; the message names the command.
        ValueError: what is there differs from the manifest.
    """
    manifest = read_manifest(path, command)
    _check_files(path, manifest, [file for file in manifest["files"] if (path / file).exists()], command)
    return Artifact(path, manifest)


def _check_files(path: Path, manifest: dict, names: list[str], command: str) -> None:
    for name in names:
        if problem := difference(path / name, manifest["files"][name], MAX_BYTES_HASHED_ON_OPEN):
            raise ValueError(f"{path / name} {problem}, by the manifest beside it; run again: {command}")


def digest_of(files: dict[str, dict]) -> str:
    """The digest of an artifact, of the fingerprints of its files."""
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


class Output:
    """The folder that a stage fills; `commit` makes it the artifact."""

    def __init__(self, config: Config, name: str):
        self._config = config
        self._stage = STAGES[name]
        self._final = config.work_dir / name
        self._old = config.work_dir / f".{name}.old"
        self.path = config.work_dir / f".{name}.tmp"
        self.committed = False

    def recover(self) -> None:
        """Clears what a run that was killed left behind; its commit may have been between the two renames."""
        if self._old.exists() and not self._final.exists():
            self._old.rename(self._final)
        shutil.rmtree(self._old, ignore_errors=True)
        shutil.rmtree(self.path, ignore_errors=True)

    def commit(self, counts: dict, inputs: dict[str, str], **extra) -> Artifact:
        """Writes the manifest and renames. `counts`: what a reader wants to know; `inputs`: {name: digest}."""
        files = {
            str(file.relative_to(self.path)): fingerprint(file)
            for file in sorted(self.path.rglob("*"))
            if file.is_file() and not file.name.startswith((".", "_"))
        }
        manifest = {
            "stage": self._stage.name,
            "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "git": git_revision(),
            "digest": digest_of(files),
            "counts": counts,
            "inputs": inputs,
            **extra,
            "config": config_module.section(self._config, *self._stage.sections),
            "files": files,
        }
        write_record(self.path / MANIFEST, manifest)
        if self._final.exists():
            self._final.rename(self._old)
        self.path.rename(self._final)
        shutil.rmtree(self._old, ignore_errors=True)
        self.committed = True
        return Artifact(self._final, manifest)


@contextlib.contextmanager
def stage_output(config: Config, name: str) -> Iterator[Output]:
    """A locked, empty folder for the stage's files; it disappears unless it is committed.

    Raises:
        BlockingIOError: another process writes this artifact.
        ValueError: the work folder cannot be written, or what the stage writes finds no room there.
    """
    output = Output(config, name)
    with lock(config, name):
        try:
            output.recover()
            output.path.mkdir()
            yield output
        except OSError as error:
            if not refuses_writing(error, output.path):
                raise
            raise ValueError(refusal(error, output.path, ELSEWHERE)) from None
        finally:
            if not output.committed:
                shutil.rmtree(output.path, ignore_errors=True)


def lock(config: Config, name: str) -> contextlib.AbstractContextManager[None]:
    """Holds <work>/.<name>.lock, see `exclusively`."""
    return exclusively(config.work_dir / name, "--work")


@contextlib.contextmanager
def exclusively(output: Path, option: str) -> Iterator[None]:
    """Holds a lock beside an output that is to be written; the operating system releases it when the process dies.

    Args:
        option: of the command line, that says where the output is to be.

    Raises:
        BlockingIOError: another process writes this output.
        ValueError: its folder cannot be written.
    """
    file = output.with_name(f".{output.name}.lock")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle = file.open("a+b", buffering=0)
    except OSError as error:
        raise ValueError(f"the folder {file.parent} cannot be written: {error}; choose {option}=...") from None
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.seek(0)
            raise BlockingIOError(
                f"another run is writing {output} ({handle.read().decode().strip()}); "
                f"wait for it, or write elsewhere with {option}=..."
            ) from None
        with contextlib.suppress(OSError):  # the lock holds on a full disk as well, without a word of who holds it
            handle.truncate(0)
            handle.write(f"pid {os.getpid()} on {os.uname().nodename} since {time.strftime('%H:%M:%S')}".encode())
        yield


def git_revision() -> str:
    """The revision of this code, with '+' when the tree has changes; outside a checkout, as in a container image, what
    COLAREC_REVISION says, or 'unknown'."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("COLAREC_REVISION", "unknown")
