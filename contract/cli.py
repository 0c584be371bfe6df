"""The command line that all stages share: --config, --dry-run, and an override for every setting."""

import argparse
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

from contract import config as config_module
from contract import urls
from contract.settings import Config

RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

EXIT_ERROR, EXIT_INTERRUPTED = 2, 130
USER_ERRORS = (ValueError, FileNotFoundError, BlockingIOError, ConnectionError)  # one message and no traceback
# The scheduler took the machine away (SIGTERM, SIGUSR1) and the state is saved: to be queued again. EX_TEMPFAIL.
EXIT_PREEMPTED = 75

_CLEAR = "\r\x1b[K"  # to the first column of a terminal, and empty to its end


class Preempted(KeyboardInterrupt):
    """A stage stopped because the scheduler asked for it; the same command goes on."""


def parse(argv: list[str], doc: str) -> tuple[Config, bool]:
    """Returns (config, dry_run). `doc`, the entry's docstring, heads its --help."""
    config, given = parse_more(argv, doc, "", lambda parser: None)
    return config, given.dry_run


def parse_more(
    argv: list[str], doc: str, usage: str, add_arguments: Callable[[argparse.ArgumentParser], None]
) -> tuple[Config, argparse.Namespace]:
    """`parse` for an entry with arguments of its own.

    Args:
        usage: of its arguments, for the first line of --help.
        add_arguments: adds them to the parser.

    Returns:
        the config; dry_run and the entry's arguments.
    """
    parser = argparse.ArgumentParser(
        usage=" ".join(filter(None, ["%(prog)s --config FILE [--dry-run]", usage, "[--SECTION.SETTING=VALUE ...]"])),
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="TOML file, see configs/")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config, inputs and outputs; stop")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    add_arguments(parser)
    settings = parser.add_argument_group("settings", "They override those of the config file.")
    for key, _, f in config_module.fields():
        choices = f" One of: {', '.join(map(str, f.metadata['choices']))}." if f.metadata["choices"] else ""
        text = f"{f.metadata['doc']}.{choices} Default: {config_module.toml_value(f.default)}"
        settings.add_argument(f"--{key}", metavar="V", dest=f"set {key}", help=text.replace("%", "%%"))
    # argparse would take --train.l for --train.lr; only whole names are settings.
    parser.allow_abbrev = False
    known, unknown = parser.parse_known_args(argv)
    overrides = {k.removeprefix("set "): v for k, v in vars(known).items() if k.startswith("set ") and v is not None}
    for word in unknown:
        if not (word.startswith("--") and "." in word):
            parser.error(f"unrecognized argument: {urls.hidden(word)}")
        key, _, value = word.removeprefix("--").partition("=")
        overrides[key] = value  # refused by load, which names the nearest setting
    own = {name: value for name, value in vars(known).items() if not name.startswith("set ")}
    return config_module.load(known.config, overrides), argparse.Namespace(**own)


def show_plan(
    config: Config,
    reads: dict[str, Path | str | tuple[str, ...]],
    writes: Path | str,
    is_there: Callable[[Path | str], bool] = os.path.exists,
) -> None:
    """What --dry-run prints: the resolved config, what would be read and whether it is there, what is written."""
    print(config_module.to_toml(config))
    for what, paths in reads.items():
        for path in paths if isinstance(paths, tuple) else (paths,):
            print(f"reads  {what:<12} {path}{'' if is_there(path) else '   (missing)'}")
    print(f"writes {'':<12} {writes}{'   (would be replaced)' if Path(writes).exists() else ''}")


def run(main: Callable[[list[str]], None]) -> None:
    """Calls `main(argv)` and turns errors that a user can mend into one message and exit status 2."""
    try:
        main(sys.argv[1:])
    except USER_ERRORS as error:
        if RANK > 0:
            time.sleep(5)  # rank 0 meets the same error; let its message be the one that is read
        # Of the settings themselves none holds a secret; what a library says of its own may.
        message = textwrap.indent(urls.hidden(str(error)), "  ").lstrip()
        print(f"error: {message}", file=sys.stderr, flush=True)
        if os.environ.get("COLAREC_TRACEBACK"):
            raise
        sys.exit(EXIT_ERROR)
    except KeyboardInterrupt as stop:
        if RANK == 0:
            print("\ninterrupted; finished artifacts are as they were", file=sys.stderr, flush=True)
        sys.exit(EXIT_PREEMPTED if isinstance(stop, Preempted) else EXIT_INTERRUPTED)


class Progress:
    """Prints what a stage is doing, with the seconds since it began. Silent on ranks above 0.

    On a terminal one last line is rewritten in place by `status`; anywhere else there is none.
    """

    def __init__(self, stage: str):
        self.stage = stage
        self.start = time.monotonic()
        self.on_terminal = RANK == 0 and sys.stdout.isatty()

    def __call__(self, message: str) -> None:
        if RANK == 0:
            print(f"{_CLEAR if self.on_terminal else ''}{self._line(message)}", flush=True)

    def everywhere(self, message: str) -> None:
        """As a call, but from any rank: for what only that one knows."""
        print(f"{_CLEAR if self.on_terminal else ''}{self._line(f'rank {RANK}: {message}')}", flush=True)

    def status(self, message: str) -> None:
        """Rewrites the last line of a terminal, cut to its width."""
        if self.on_terminal:
            width = shutil.get_terminal_size().columns
            print(f"{_CLEAR}{self._line(message)[: width - 1]}", end="", flush=True)

    def _line(self, message: str) -> str:
        return f"[{self.stage} {time.monotonic() - self.start:6.1f}s] {message}"
