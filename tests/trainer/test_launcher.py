"""What becomes of ranks whose launcher is killed. The launcher here is a program by the name of DeepSpeed's."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RANK = """
import signal, sys, time
from trainer import launcher
launcher.POLL_SECONDS = 0.05
signal.signal(signal.SIGTERM, lambda *_: (print("saved", flush=True), sys.exit(75)))
if sys.argv[1] == "late":
    print("begins", flush=True)
    time.sleep(1.5)
try:
    launcher.heed_launcher()
except ConnectionError as error:
    print(error, flush=True)
    sys.exit(2)
print("works", flush=True)
time.sleep(60)
print("worked", flush=True)
"""
LAUNCHER = """
import os, subprocess, sys
subprocess.run([sys.executable, "-c", os.environ["RANK_PROGRAM"], *sys.argv[1:]], env=os.environ | {"CROSS_RANK": "0"})
"""


@pytest.fixture
def command(tmp_path):
    """`deepspeed`, which starts the launcher, which starts a rank; all three print what they have to say."""
    package = tmp_path / "deepspeed" / "launcher"
    package.mkdir(parents=True)
    (package / "launch.py").write_text(LAUNCHER)
    for folder in (package, package.parent):
        (folder / "__init__.py").touch()  # or DeepSpeed itself would come first
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "deepspeed").write_text(
        "import subprocess, sys\n"
        "launch = subprocess.Popen([sys.executable, '-m', 'deepspeed.launcher.launch', *sys.argv[1:]])\n"
        "print(launch.pid, flush=True)\n"
        "launch.wait()\n"
    )
    env = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}", "RANK_PROGRAM": RANK}
    words = [sys.executable, str(tmp_path / "bin" / "deepspeed")]
    started = []

    def start(what):
        started.append(subprocess.Popen([*words, what], stdout=subprocess.PIPE, text=True, env=env))
        return started[-1], int(started[-1].stdout.readline())

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("killed", ["launcher", "command"])
def test_ranks_save_and_stop_when_what_started_them_is_killed(command, killed):
    process, launcher = command("work")
    assert process.stdout.readline() == "works\n"
    os.kill(launcher if killed == "launcher" else process.pid, signal.SIGKILL)
    rest = process.stdout.read()  # until the rank has ended as well
    assert rest == "rank 0: DeepSpeed's launcher was killed: this rank stops\nsaved\n"


def test_a_rank_does_not_begin_without_its_launcher(command):
    process, launcher = command("late")
    assert process.stdout.readline() == "begins\n"
    os.kill(launcher, signal.SIGKILL)
    assert "launcher was killed while the ranks started; run the same command again" in process.stdout.read()


def test_other_ranks_may_outlive_who_started_them(tmp_path):
    """nohup of a single process, or ranks of srun: nothing of DeepSpeed's above them."""
    program = (
        "from trainer.launcher import heed_launcher; heed_launcher(); import threading; print(threading.active_count())"
    )
    env = {name: value for name, value in os.environ.items() if name != "CROSS_RANK"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"
