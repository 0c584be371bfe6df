"""Says whether a stage has written its artifact since a chain of commands began; exit status 2 if not.

    since=$(date +%s); deepspeed trainer/main.py --config F && python -m contract.made model --since $since --config F

The exit status of a launcher does not say so: DeepSpeed's is 0 when a part of it is killed.
"""

import argparse
from datetime import datetime

from contract import cli
from contract.artifacts import STAGES, open_artifact


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("artifact", choices=STAGES, help="what the stage writes")
    parser.add_argument("--since", type=int, required=True, metavar="S", help="seconds, as `date +%%s` prints them")


def main(argv: list[str]) -> None:
    config, given = cli.parse_more(argv, __doc__, "ARTIFACT --since S", add_arguments)
    artifact = open_artifact(config, given.artifact)
    written = artifact.manifest["written"]
    if datetime.strptime(written, "%Y-%m-%dT%H:%M:%S%z").timestamp() < given.since:
        raise ValueError(
            f"{artifact.path} is still the one written {written}: its stage ended without another, though without an "
            f"error, as when its launcher is killed; run again: {STAGES[given.artifact].command}"
        )


if __name__ == "__main__":
    cli.run(main)
