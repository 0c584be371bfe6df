"""What a chain asks after a launcher whose exit status says nothing."""

import time

import pytest

from contract import made
from contract.config import to_toml
from tests import tiny


def test_an_artifact_of_before_is_not_what_the_chain_waits_for(tmp_path):
    config = tiny.tiny_config(tmp_path / "work")
    (tmp_path / "run.toml").write_text(to_toml(config))

    def look(since, *settings):
        made.main(["corpus", f"--since={since}", "--config", str(tmp_path / "run.toml"), *settings])

    began = int(time.time())
    with pytest.raises(FileNotFoundError, match=r"run first: spark-submit etl/build\.py"):
        look(began)
    tiny.write_corpus(config)
    look(began)
    with pytest.raises(ValueError, match=r"is still the one written .*: its stage ended without another"):
        look(int(time.time()) + 1)
    with pytest.raises(ValueError, match=r"was built with seed = 1, the config says 2"):
        look(began, "--seed=2")
