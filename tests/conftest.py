import os

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


def pytest_runtest_setup(item):
    if "gpu" in item.keywords and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
