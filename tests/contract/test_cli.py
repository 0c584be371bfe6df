"""What a stage prints while it works, on a terminal and elsewhere."""

import argparse
import os
import pty
import subprocess
import sys

import pytest

from contract import cli

SCRIPT = """
from contract.cli import Progress
progress = Progress("train")
progress("begins")
progress.status("step 1")
progress.status("step 2 " + "x" * 500)
progress("epoch 1")
"""


def test_a_terminal_has_one_line_that_is_rewritten():
    leader, follower = pty.openpty()
    env = os.environ | {"COLUMNS": "40"}
    subprocess.run([sys.executable, "-c", SCRIPT], stdout=follower, env=env, check=True)
    output = os.read(leader, 10_000)
    os.close(leader)
    os.close(follower)
    lines = output.decode().split("\r\n")
    assert len(lines) == 3  # begins; the status, in the end replaced by epoch 1; nothing
    assert lines[0].endswith("begins")
    shown = lines[1].split("\r\x1b[K")
    assert [line.split("s] ")[-1][:6] for line in shown] == ["", "step 1", "step 2", "epoch "]
    assert len(shown[2]) == 39


def test_elsewhere_only_lines_are_printed():
    output = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True).stdout
    assert [line.split("] ")[1] for line in output.splitlines()] == ["begins", "epoch 1"]


def test_an_entry_may_have_arguments_of_its_own(tmp_path, capsys):
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("-k", type=int, help="items for each")

    (tmp_path / "shop.toml").write_text("")
    words = ["--config", str(tmp_path / "shop.toml"), "--train.lr=0.5", "--dry-run"]
    config, given = cli.parse_more([*words, "-k", "7"], "Ranks.", "[-k K]", add_arguments)
    assert (config.train.lr, given.k, given.dry_run) == (0.5, 7, True)
    assert cli.parse(words, "Ranks.") == (config, True)
    with pytest.raises(SystemExit):
        cli.parse([*words, "-k", "7"], "Ranks.")
    assert "unrecognized argument: -k" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"did you mean 'train.lr'"):
        cli.parse_more([*words, "--train.lrr=1"], "Ranks.", "[-k K]", add_arguments)

    with pytest.raises(SystemExit):
        cli.parse_more(["--help"], "Ranks.", "[-k K]", add_arguments)
    text = capsys.readouterr().out
    assert "--config FILE [--dry-run] [-k K] [--SECTION.SETTING=VALUE ...]" in " ".join(text.split())
    assert text.index("items for each") < text.index("settings:") < text.index("--train.lr V")
