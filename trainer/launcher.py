"""Ranks stop when the launcher that started them is gone.

The command `deepspeed` starts a launcher, which starts the ranks and waits for them. When one of these two is killed
(kill -9, out of memory), nobody waits for the ranks any more. Of a killed launcher the command itself returns 0: what
comes next would find the artifact of the run before, while the ranks go on.
"""

import os
import signal
import threading
import time
from pathlib import Path

from contract.cli import RANK

POLL_SECONDS = 1.0
LAUNCHER, COMMAND = "deepspeed.launcher.launch", "deepspeed.launcher.runner"
STARTED = "CROSS_RANK"  # in the environment of what DeepSpeed's launcher has started, and of no other rank


def heed_launcher() -> None:
    """From now on this process gets SIGTERM, at which training saves a checkpoint, when DeepSpeed's launcher is gone.

    Raises:
        ConnectionError: it is gone already.
    """
    if STARTED not in os.environ or any(thread.name == "launcher" for thread in threading.enumerate()):
        return
    ancestors = [pid for pid in _ancestors() if _is_launcher(pid)]
    if not any(LAUNCHER in _words(pid) for pid in ancestors):
        raise ConnectionError("DeepSpeed's launcher was killed while the ranks started; run the same command again")
    born = {pid: _stat(pid)[19] for pid in ancestors}
    threading.Thread(target=_watch, args=(born,), daemon=True, name="launcher").start()


def _watch(born: dict[int, str]) -> None:
    while all(_lives(pid, began) for pid, began in born.items()):
        time.sleep(POLL_SECONDS)
    print(f"rank {RANK}: DeepSpeed's launcher was killed: this rank stops", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)


def _ancestors() -> list[int]:
    """Process ids, the parent first."""
    found, pid = [], os.getppid()
    while pid > 0 and (stat := _stat(pid)):
        found.append(pid)
        pid = int(stat[1])
    return found


def _is_launcher(pid: int) -> bool:
    """The launcher, or the command `deepspeed` that started it."""
    words = _words(pid)
    return LAUNCHER in words or COMMAND in words or any(Path(word).name == "deepspeed" for word in words[:2])


def _lives(pid: int, began: str) -> bool:
    stat = _stat(pid)
    return bool(stat) and stat[0] not in "ZX" and stat[19] == began


def _stat(pid: int) -> list[str]:
    """What Linux says of a process, from its state on; [1] is the parent, [19] when it began. Empty: there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _words(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []
