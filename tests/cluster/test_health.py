"""The check of a node, on this one."""

import os
import re
import socket
import subprocess
import sys
import threading

import pytest

from cluster import health


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def check(tmp_path):
    """A function (node, **options) -> Popen of a check of two nodes that are one."""
    environment = os.environ | {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    (tmp_path / "shared").write_text("1")

    def start(node, **options):
        given = {"nodes": "2", "gpus": "0", "interface": "lo", "shared": str(tmp_path), "local": str(tmp_path)}
        words = [word for name, value in (given | options).items() for word in (f"--{name}", value)]
        program = [sys.executable, "cluster/health.py", "--node", node, *words]
        return subprocess.Popen(program, env=environment, stdout=subprocess.PIPE, text=True)

    return start


def test_fit_nodes_find_each_other(check):
    nodes = [check("localhost"), check("other")]
    assert [node.communicate(timeout=60)[0].splitlines() for node in nodes] == [["fit"], ["fit"]]


def test_all_that_is_wrong_is_in_one_line(check, tmp_path):
    wrong = {"shared": str(tmp_path / "not"), "local": "/proc", "gpus": "99"}
    line = check("localhost", nodes="1", **wrong).communicate(timeout=120)[0]
    assert re.fullmatch(
        r"does not see \S+/not: the work folder is not on a file system that all nodes share; "
        r"local_disk /proc cannot be used: .*; has \d of 99 GPUs\n",
        line,
    )


def test_an_interface_that_is_not_there(check):
    assert "lo" in health.network("ib7")
    assert "there is no interface ib7" in health.network("ib7")
    assert health.network("lo") == ""


def test_a_clock_that_is_off(monkeypatch):
    port = free_port()
    first = threading.Thread(target=health.answer, args=(port, 1))
    first.start()
    now = health.time.time
    monkeypatch.setattr(health.time, "time", lambda: now() + (60 if threading.current_thread() is not first else 0))
    assert health.clock("localhost", port) == "its clock is +60 s off that of localhost"
    first.join()


def test_a_first_node_that_cannot_be_reached(monkeypatch):
    monkeypatch.setattr(health, "JOIN_SECONDS", 0)
    assert "cannot reach localhost at port" in health.clock("localhost", free_port())


def test_a_rank_learns_what_torch_reads_from_what_slurm_says():
    given = {
        "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "8", "SLURM_JOB_ID": "1234567",
        "MASTER_ADDR": "n1", "PATH": os.environ["PATH"],
    }  # fmt: skip
    expected = ["RANK=5", "LOCAL_RANK=1", "WORLD_SIZE=8", "MASTER_ADDR=n1", "MASTER_PORT=24567"]
    run = {"env": given, "capture_output": True, "text": True, "check": True}
    assert set(expected) <= set(subprocess.run(["cluster/rank.sh", "env"], **run).stdout.splitlines())
    prolog = subprocess.run(["cluster/rank.sh"], **run).stdout.splitlines()
    assert prolog == [f"export {word}" for word in expected]
