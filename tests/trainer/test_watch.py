"""What the other ranks say when one is gone."""

import contextlib
import multiprocessing
import os
import re
import signal
import socket
import sys
import time
from datetime import timedelta

import pytest

RANKS = multiprocessing.get_context("forkserver")
RANKS.set_forkserver_preload(["torch.distributed"])


def work_together(rank, port, output, ready, what):
    """A rank that adds up numbers with two others until something happens."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.stderr = open(output, "w", buffering=1)  # noqa: SIM115 - until the process ends
    import torch
    import torch.distributed as dist

    from contract import cli
    from trainer.watch import Watch

    def main(_):
        dist.init_process_group("gloo", timeout=timedelta(seconds=3 if what == "late" else 60))
        with contextlib.ExitStack() as stack:
            if what == "bug" and rank == 1:
                stack.callback(os._exit, 9)  # as the launcher kills it when another rank has left
            stack.enter_context(Watch(rank, 3, torch.device("cpu")))
            for step in range(10**9):
                dist.all_reduce(torch.ones(3))
                if step == 10:
                    ready.wait()
                    if what == "error" and rank == 1:
                        raise FileNotFoundError("shard train-00007.tar is gone")
                    if what == "bug" and rank == 1:
                        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
                    if what == "done":
                        return
                    if what == "late" and rank == 1:
                        read_a_shard_for_ever()
                while what == "hang" and rank == 0 and step > 10:  # in a collective that notices nothing, as NCCL's
                    time.sleep(1)

    cli.run(main)


def read_a_shard_for_ever():
    time.sleep(1000)


def run(tmp_path, what, killed=None):
    """Returns exit codes and what was written to stderr, per rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ready = RANKS.Barrier(4)
    outputs = [tmp_path / f"{rank}.txt" for rank in range(3)]
    ranks = [RANKS.Process(target=work_together, args=(r, port, outputs[r], ready, what)) for r in range(3)]
    for process in ranks:
        process.start()
    ready.wait(120)
    if killed is not None:
        os.kill(ranks[killed].pid, signal.SIGKILL)
    for process in ranks:
        process.join(30)
    return [process.exitcode for process in ranks], [output.read_text() for output in outputs]


@pytest.mark.parametrize("what", ["collective", "hang"])
def test_a_killed_rank_is_named_and_takes_the_others_down(tmp_path, what):
    codes, outputs = run(tmp_path, what, killed=1)
    assert codes == [2, -9, 2]
    for rank in (0, 2):
        assert "error: rank 1 on " in outputs[rank]
        assert "died without a word" in outputs[rank]
        assert "Traceback" not in outputs[rank]


def test_the_first_rank_is_watched_as_well(tmp_path):
    codes, outputs = run(tmp_path, "collective", killed=0)
    assert codes == [-9, 2, 2]
    assert "error: rank 0 on 127.0.0.1 died" in outputs[1]
    assert "error: rank 0 on 127.0.0.1 died" in outputs[2]


def test_the_error_of_a_rank_is_what_the_others_say(tmp_path):
    codes, outputs = run(tmp_path, "error")
    assert codes == [2, 2, 2]
    assert "error: shard train-00007.tar is gone" in outputs[1]
    for rank in (0, 2):
        assert "failed: FileNotFoundError: shard train-00007.tar is gone" in outputs[rank]


def test_a_rank_with_a_bug_shows_where_before_the_others_end(tmp_path):
    codes, outputs = run(tmp_path, "bug")
    assert codes == [2, 9, 2]
    assert "Traceback" in outputs[1]
    assert "in main" in outputs[1]
    for rank in (0, 2):
        assert "failed: RuntimeError: mat1 and mat2 shapes cannot be multiplied" in outputs[rank]
        assert "Traceback" not in outputs[rank]


def test_a_late_rank_says_where_it_is_when_the_others_time_out(tmp_path):
    codes, outputs = run(tmp_path, "late")
    assert codes == [2, 2, 2]
    assert re.search(r"late is rank 1 on \S+, at line \d+ of \S+test_watch.py, in read_a_shard_for_ever", outputs[1])
    for rank in (0, 2):
        assert "waited for a rank that is late" in outputs[rank]
        assert "Traceback" not in outputs[rank]


def test_ranks_that_are_done_leave_in_peace(tmp_path):
    assert run(tmp_path, "done") == ([0, 0, 0], ["", "", ""])
