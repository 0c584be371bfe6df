"""What an experiment would take on a cluster: memory, time and cost of each stage, before anything is run.

    python cluster/plan.py configs/shop.toml --events 2e11 --users 1e9 --items 1e8 --nodes 64 --gpus 1024
    python cluster/plan.py configs/shop.toml --events 2e9 --users 1e7 --items 1e6 --model.d_model=512 --json

Settings can be given as to every stage. It knows rates of CPU cores that were measured (docs/scale.md), and what the
code allocates. What it says of GPUs is the vendor's peak times --mfu, a share that is assumed, not measured.
"""

import argparse
import dataclasses
import json
from dataclasses import dataclass

from cluster import cost
from cluster.stages import GPU_MEMORY, STAGES, Machines, Row
from contract import cli
from contract import config as config_module
from contract.settings import Config

WIDTH = 100  # columns of a terminal


@dataclass(frozen=True)
class Plan:
    """A row for each stage, in their order."""

    rows: list[Row]

    @property
    def dollars(self) -> float | None:
        known = [row.dollars for row in self.rows]
        return None if None in known else sum(known)


def parse(argv: list[str]) -> tuple[Config, cost.Scale, Machines, bool]:
    """Raises ValueError when the numbers do not fit together."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s CONFIG --events N --users N --items N [options] [--SECTION.SETTING=VALUE ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("config", metavar="CONFIG", help="TOML file, see configs/")
    parser.add_argument("--events", type=float, required=True, help="rows of the log")
    parser.add_argument("--users", type=float, required=True, help="users that are left")
    parser.add_argument("--items", type=float, required=True, help="items that are left")
    parser.add_argument("--kept", type=float, default=cost.etl_kept(), help="share of the rows left (%(default).2f)")
    parser.add_argument("--tokens", type=float, help="content tokens of an item (etl.max_item_tokens)")
    parser.add_argument("--nodes", type=int, default=1, help="machines of the CPU stages (%(default)s)")
    parser.add_argument("--cores", type=int, default=64, help="cores of a machine (%(default)s)")
    parser.add_argument("--memory", type=float, default=512, help="GB of memory of a machine (%(default)s)")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs, 8 a machine; 0: a rank on each core of --nodes")
    parser.add_argument("--gpu", default="h100", choices=sorted(GPU_MEMORY), help="their kind (%(default)s)")
    parser.add_argument("--mfu", type=float, default=0.3, help="ASSUMED share of the peak in training (%(default)s)")
    parser.add_argument("--decode-mfu", type=float, default=0.05, help="the same in beam search (%(default)s)")
    parser.add_argument("--step-ms", type=float, default=50, help="ASSUMED least time of a GPU step (%(default)s)")
    parser.add_argument("--price", type=float, help="of a GPU for an hour")
    parser.add_argument("--node-price", type=float, help="of a machine without GPUs for an hour")
    parser.add_argument("--json", action="store_true", help="print JSON, all numbers in seconds and bytes")
    known, unknown = parser.parse_known_args(argv)
    overrides = {}
    for word in unknown:
        key, equals, value = word.removeprefix("--").partition("=")
        if not (word.startswith("--") and "." in key and equals):
            raise ValueError(f"unknown argument {word}; settings are given as --SECTION.SETTING=VALUE, others: --help")
        overrides[key] = value
    config = config_module.load(known.config, overrides)
    tokens = config.etl.max_item_tokens if known.tokens is None else known.tokens
    scale = cost.Scale(known.events, known.users, known.items, known.kept, tokens)
    names = [field.name for field in dataclasses.fields(Machines)]
    machines = Machines(**{name: getattr(known, name) for name in names})
    _check(scale, machines)
    return config, scale, machines, known.json


def _check(scale: cost.Scale, machines: Machines) -> None:
    for name, value, low, high in (
        ("events", scale.rows, 1, 1e15),
        ("users", scale.users, 1, 2**31 - 1),
        ("items", scale.items, 2, 2**31 - 1),
        ("kept", scale.kept, 1e-6, 1),
        ("tokens", scale.tokens, 0, 1e4),
        ("nodes", machines.nodes, 1, 1e6),
        ("cores", machines.cores, 1, 1e4),
        ("memory", machines.memory, 1, 1e6),
        ("gpus", machines.gpus, 0, 1e6),
        ("mfu", machines.mfu, 1e-6, 1),
        ("decode-mfu", machines.decode_mfu, 1e-6, 1),
        ("step-ms", machines.step_ms, 0, 1e6),
        ("price", machines.price or 0, 0, 1e6),
        ("node-price", machines.node_price or 0, 0, 1e6),
    ):
        if not low <= value <= high:
            raise ValueError(f"--{name} {value:g}: must be from {low:g} to {high:g}")
    if scale.events < max(scale.users, scale.items):
        raise ValueError(
            f"--events {scale.rows:g}, of which {scale.kept:.0%} are left (--kept), are fewer than the "
            f"{scale.users:g} users or {scale.items:g} items: each of these has one at least"
        )


def plan(config: Config, scale: cost.Scale, machines: Machines) -> Plan:
    return Plan([stage(config, scale, machines) for stage in STAGES])


def table(result: Plan, scale: cost.Scale, machines: Machines) -> str:
    """The plan as text of at most WIDTH columns."""
    head = ["stage", "work", "time", "on", "memory", "cost", "known by"]
    rows = [head]
    for row in result.rows:
        price = "" if row.dollars is None else f"{row.dollars:,.0f}"
        rows.append([row.stage, row.work, _time(row.seconds), row.place, row.memory, price, row.basis])
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    right = (2, 5)  # columns of numbers
    lines = [
        "  ".join(c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    lines.insert(1, "-" * max(map(len, lines)))
    lines = [line.rstrip() for line in lines]
    gpus = f"{machines.gpus} x {machines.gpu}" if machines.gpus else "no GPU"
    title = (
        f"{scale.rows:.3g} rows, {scale.events:.3g} events, {scale.users:.3g} users, {scale.items:.3g} items; "
        f"{machines.nodes} x {machines.cores} cores, {gpus}"
    )
    notes = [f"{row.stage}: {note}" for row in result.rows for note in row.notes]
    text = [title, "", *lines, "", *(_wrapped("  ", note) for note in notes)]
    warnings = [f"{row.stage}: {warning}" for row in result.rows for warning in row.warnings]
    text += ["", *(_wrapped("! ", warning) for warning in warnings)] if warnings else []
    if result.dollars is not None:
        text += ["", f"cost of all: {result.dollars:,.0f}"]
    text += [
        "",
        "measured: within what was run on 2 CPU cores. computed: from that, larger. assumed: no such machine",
        f"was measured; GPUs are the vendor's peak x {machines.mfu:g} (--mfu), {machines.decode_mfu:g} (--decode-mfu).",
    ]
    return "\n".join(text)


def _wrapped(mark: str, text: str) -> str:
    lines, line = [], mark
    for word in text.split(" "):
        if len(line) + 1 + len(word) > WIDTH and line.strip():
            lines.append(line.rstrip())
            line = " " * len(mark) + "  "
        line += word + " "
    return "\n".join([*lines, line.rstrip()])


def _time(seconds: float) -> str:
    for unit, size in (("years", 365 * 86400), ("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.3g} {unit}" if seconds < 1000 * size else f"{seconds / size:,.0f} {unit}"
    return f"{seconds:.0f} s"


def main(argv: list[str]) -> None:
    config, scale, machines, as_json = parse(argv)
    result = plan(config, scale, machines)
    if as_json:
        stages = [dataclasses.asdict(row) for row in result.rows]
        about = {"scale": dataclasses.asdict(scale), "machines": dataclasses.asdict(machines)}
        return print(json.dumps(about | {"stages": stages, "dollars": result.dollars}, indent=1))
    print(table(result, scale, machines))


if __name__ == "__main__":
    cli.run(main)
