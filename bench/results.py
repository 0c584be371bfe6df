"""What a bench has measured: rows in bench/results/<name>.json, and <name>.md drawn from them."""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from contract.artifacts import git_revision

RESULTS = Path(__file__).parent / "results"


def merge(name: str, rows: list[dict], key: Sequence[str], markdown: Callable[[list[dict]], str]) -> None:
    """Adds rows, with revision and date, to those that are there, in the place of any that are alike in `key`."""
    file = RESULTS / f"{name}.json"
    stamp = {"revision": git_revision(), "date": time.strftime("%Y-%m-%d")}
    of_key = {}
    for row in [*(json.loads(file.read_text()) if file.exists() else []), *(row | stamp for row in rows)]:
        of_key[tuple(row.get(part) for part in key)] = row
    rows = list(of_key.values())
    file.write_text(json.dumps(rows, indent=1) + "\n")
    (RESULTS / f"{name}.md").write_text(markdown(rows))


def table(head: Sequence[str], rows: Sequence[Sequence]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)
