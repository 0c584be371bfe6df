"""A SLURM cluster for the tests marked `slurm`: the one that is running, or one that a script brings up.

COLAREC_LOCAL_SLURM names the script: `up`, `down`, `env` (prints `export SLURM_CONF=...`), `kill-node N`,
`start-node N`. On a cluster of your own: pytest -m slurm --basetemp=<a folder that all nodes see>.
"""

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

PATIENCE_SECONDS = 900  # a stage takes some 20; a machine may be busy
UNFINISHED = ("PENDING", "RUNNING", "COMPLETING", "SUSPENDED")


class Slurm:
    """What the tests ask of the cluster."""

    def __init__(self, script: str):
        self.script = script  # '' where the cluster is not ours

    def call(self, *words: str) -> str:
        done = subprocess.run(words, capture_output=True, text=True)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def states(self, job: str) -> list[str]:
        """How each start of the job ended, first to last."""
        words = ("sacct", "--duplicates", "-X", "--noheader", "--parsable2", f"--jobs={job}", "--format=State")
        return [line.split()[0] for line in self.call(*words).splitlines()]

    def ended(self, *jobs: str) -> list[str]:
        """Waits for the end of the jobs; returns their last states."""

        def all_ended() -> bool:
            # A job that goes back into the queue is in no state of accounting for a moment.
            at_work = self.call("squeue", "--me", "--noheader", "--format=%i").split()
            ended = (states and states[-1] not in UNFINISHED for states in map(self.states, jobs))
            return not set(jobs) & set(at_work) and all(ended)

        wait_for(f"the end of {jobs}", all_ended)
        return [self.states(job)[-1] for job in jobs]

    def cancel_jobs_of(self, folder: Path) -> None:
        """Of the work folders below it."""
        jobs = [line.split("|") for line in self.call("squeue", "--me", "--noheader", "--format=%i|%k").splitlines()]
        if mine := [number for number, comment in jobs if str(folder) in comment]:
            self.call("scancel", *mine)

    def has_partitions(self, *names: str) -> bool:
        return set(names) <= set(self.call("sinfo", "--noheader", "--format=%R").split())

    def kill_node(self, name: str) -> None:
        self.call("bash", self.script, "kill-node", name)

    def start_node(self, name: str) -> None:
        self.call("bash", self.script, "start-node", name)


@pytest.fixture(scope="session")
def slurm():
    script = os.environ.get("COLAREC_LOCAL_SLURM", "")
    if script:
        subprocess.run(["bash", script, "up"], check=True)
        conf = subprocess.run(["bash", script, "env"], check=True, capture_output=True, text=True).stdout
        os.environ["SLURM_CONF"] = conf.strip().removeprefix("export SLURM_CONF=")
        yield Slurm(script)
        subprocess.run(["bash", script, "down"], check=True)
    elif shutil.which("sinfo") and subprocess.run(["sinfo"], capture_output=True).returncode == 0:
        yield Slurm("")
    else:
        pytest.skip("no SLURM cluster is running, and COLAREC_LOCAL_SLURM names no script that brings one up")


def wait_for(what: str, there: Callable[[], bool]) -> None:
    until = time.monotonic() + PATIENCE_SECONDS
    while not there():
        assert time.monotonic() < until, f"waited {PATIENCE_SECONDS} s for {what}"
        time.sleep(0.5)


def log(work: Path, stage: str, job: str) -> str:
    file = work / "logs" / f"{stage}-{job}.log"
    return file.read_text() if file.exists() else ""
