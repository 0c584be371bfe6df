import os
import resource
import shutil
import subprocess

import pytest
import torch

from trainer.distributed import process_group


@pytest.fixture(scope="session")
def group():
    """One process group of one rank for all runs of the trainer and of eval within this process: DeepSpeed remembers
    the first group it sees."""
    before = dict(os.environ)
    with process_group():
        yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def small_disk(tmp_path):
    """The folder of a file system of 64 kB; only root can make one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount") or "/bin/false"
    if subprocess.run([mount, "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("a file system can be mounted by root alone")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture
def largest_file():
    """Limits the size of a file that this process may write: a disk takes a part of it, then is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda num_bytes: resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def pytest_runtest_setup(item):
    if "gpu" in item.keywords and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
