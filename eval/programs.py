"""Other programs, run one at a time: output to a log, signals passed on."""

import contextlib
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from contract import cli
from contract.cli import Preempted

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# For the ranks of a launcher that is gone to save their checkpoint; the deepspeed launcher kills them after 30.
GROUP_SECONDS = 60


def call(words: list[str], log: Path, show: Callable[[str], None]) -> int:
    """Runs a program, whose output is added to `log`, and returns its exit status.

    Args:
        show: takes the last line of the log, again and again.

    Raises:
        KeyboardInterrupt: a signal asked to stop, which was passed on; `Preempted` if it was the scheduler's.
    """
    asked, process = [], None

    def pass_on(number: int, _) -> None:
        asked.append(number)
        if process:
            _send(process, number)

    before = {number: signal.signal(number, pass_on) for number in SIGNALS}
    try:
        with log.open("a") as stream:
            print(f"$ {shlex.join(words)}", file=stream, flush=True)
            # In a session of its own, where a Ctrl-C comes once, from here, to the program and what it has started.
            process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
            )
        if asked:
            _send(process, asked[0])
        while process.poll() is None:
            show(last_line(log))
            time.sleep(0.2)
        if asked:
            _wait_for_group(process.pid)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if signal.SIGINT in asked or process.returncode == cli.EXIT_INTERRUPTED:
        raise KeyboardInterrupt
    if asked or process.returncode == cli.EXIT_PREEMPTED:
        raise Preempted
    return process.returncode


def _send(process: subprocess.Popen, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has just ended
        os.killpg(process.pid, number)


def _wait_for_group(group: int) -> None:
    end = time.monotonic() + GROUP_SECONDS
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < end:
            os.killpg(group, 0)
            time.sleep(0.2)


def last_line(log: Path) -> str:
    """The last line that is not empty, of what was written so far."""
    return next((line.strip() for line in reversed(_last_lines(log)) if line.strip()), "")


def reason(log: Path) -> str:
    """Why the last program failed: what it called an error, else its last line."""
    lines = _last_lines(log)
    begin = max((number for number, line in enumerate(lines) if line.startswith("$ ")), default=0)
    errors = [line for line in lines[begin:] if line.startswith("error: ")]
    return errors[-1] if errors else last_line(log)


def _last_lines(log: Path) -> list[str]:
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - 8192))
        return stream.read().decode(errors="replace").split("\n")
