"""The results of an evaluation: metrics.json, the tables drawn from it, and the names of its numbers in MLflow."""

import dataclasses
import json
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from contract.artifacts import git_revision
from contract.disk import write_atomically
from contract.settings import Config

LINE = 110  # columns of a terminal that sentences are broken at


@dataclass(frozen=True)
class Results:
    """What metrics.json holds. All of it is JSON-ready; `metrics.compare` makes `models` and `lead`, `slices.measure`
    makes `slices`.

    The first model is the one that is evaluated, the others are what it is compared with.
    """

    name: str  # of the experiment
    protocol: dict[str, str]  # facts in the order to show them, see `protocol`
    models: dict[str, dict[str, dict]]  # {model: {metric: {"mean", "low", "high"}}}; 95% intervals over users
    lead: dict[str, dict]  # {metric: {"mean", "low", "high", "over"}}: the first model minus the best other one
    num_users: int = 0  # that all means but those of slices are over; 0 in results from before it was kept
    slices: list[dict] = field(default_factory=list)
    curves: dict[str, list[float]] = field(default_factory=dict)  # {model: recall@1, recall@2, ..}


def write(results: Results, file: Path) -> None:
    write_atomically(file, json.dumps(dataclasses.asdict(results), indent=1) + "\n")


def read(file: Path) -> Results:
    """Raises ValueError when the file is not what `write` wrote."""
    try:
        return Results(**json.loads(file.read_text()))
    except (json.JSONDecodeError, TypeError) as error:
        raise ValueError(f"{file} does not hold results ({error}); run again: deepspeed eval/main.py") from None


def _split(config: Config) -> str:
    etl = config.etl
    days = f"the last {etl.test_days:g} days test, the {etl.valid_days:g} before them valid"
    shares = ":".join(f"{share:g}" for share in etl.split_shares)
    return {
        "leave_one_out": "leave one out, in time order",
        "temporal": f"by time, {days}",
        "otto": f"OTTO's, {days}",
        "random": f"at random, {shares} of each user's items",
        "given": "as given",
    }[etl.split]


def protocol(config: Config, num_users: int, num_items: int, device: str, **facts: str) -> dict[str, str]:
    """What a reader must know to compare the numbers. `facts`: more of them, such as how long it was trained."""
    history, train, loss = config.history, config.train, config.loss
    weights = {name: weight for name, weight in loss.weights.items() if weight}
    model, valid_in_history = config.model, config.eval.split == "test" and config.etl.valid_in_history
    return {
        "data": f"{config.name}: {num_users:,} {config.eval.split} users, {num_items:,} items, all of them ranked",
        "split": _split(config),
        "history": f"train{' and valid' if valid_in_history else ''} items",
        "seen items": "masked" if config.eval.mask_seen else "not masked",
        "fitted on": "train",
        "model": f"T5 {model.num_encoder_layers}+{model.num_decoder_layers} layers, d_model {model.d_model}; "
        f"history {history.order}, {history.encoding}, {history.eval_items} items",
        "training": f"at most {train.epochs} epochs, global batch {train.global_batch}, lr {train.lr:g}; loss "
        + " + ".join(f"{weight:g} {name}" for name, weight in weights.items()),
        "decoding": _decoding(config, num_items),
        **facts,
        "device": device,
        "date": time.strftime("%Y-%m-%d"),
        "revision": git_revision(),
    }


def _decoding(config: Config, num_items: int) -> str:
    settings, score = config.eval, f"h(X_u) . {'v_i' if config.loss.softmax else 'h(X_i)'}"
    if settings.ranks_by == "dense":
        return f"all items by {score}"
    every = settings.exhaustive or settings.beams >= num_items
    found = "the GIDs of all items" if every else f"{settings.beams} beams over the GIDs of all items"
    if settings.ranks_by != "hybrid":
        return found
    total, others = "log p", []
    if settings.hybrid > 0:
        total, others = f"(log p + {settings.hybrid:g} {score}) / {1 + settings.hybrid:g}", [score]
    if settings.neighbours > 0:
        total, others = f"{total} + {settings.neighbours:g} c", [*others, "c, the neighbours"]
    return (
        f"{found}, ranked by {total}"
        if every
        else f"{found}; with as many by {' and by '.join(others)}, ranked by {total}"
    )


def numbers(results: Results) -> dict[str, float]:
    """{name: value} for MLflow. The first model's metrics have their own names, others are below the model's, slices
    below slice/<kind>/<name>: `recall@10`, `item_knn/recall@10`, `slice/popularity/tail/recall@10`."""
    ours = next(iter(results.models))
    found = {"num_users": results.num_users}
    parts = [("", results.models, results.lead)]
    for one in results.slices:
        place = f"slice/{one['kind']}/{one['name']}/"
        parts.append((place, one["models"], one["lead"]))
        found |= {f"{place}{name}": one[name] for name in ("num_users", "num_targets")}
    for place, models, lead in parts:
        for model, metrics in models.items():
            prefix = place if model == ours else f"{model}/{place}"
            found |= {f"{prefix}{name}": estimate["mean"] for name, estimate in metrics.items()}
        found |= {f"lead/{place}{name}": estimate["mean"] for name, estimate in lead.items()}
    return found


def terminal(results: Results) -> str:
    """An aligned table; a star marks the best of each column."""
    rows = _rows(results, lambda estimate, best: f"{estimate['mean']:.4f}{'*' if best else ' '}", "{mean:+.4f} ")
    rows[0][1:] = [f"{name} " for name in rows[0][1:]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        row[0].ljust(widths[0]) + "".join(f"  {cell:>{w}}" for cell, w in zip(row[1:], widths[1:], strict=True))
        for row in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    notes = [line for note in notes_of(results) for line in textwrap.wrap(note, LINE, subsequent_indent="  ")]
    facts = [f"{key + ':':<12} {value}" for key, value in results.protocol.items()]
    return "\n".join([*(line.rstrip() for line in lines), "", "* best", *notes, "", *facts])


def markdown(results: Results) -> str:
    """The same with the half-width of each interval; the best of each column is bold."""
    rows = _rows(
        results,
        lambda estimate, best: f"{'**' * best}{estimate['mean']:.4f}{'**' * best} ±{half_width(estimate):.4f}",
        "{mean:+.4f} ±{half_width:.4f}",
    )
    rows.insert(1, ["---", *["---:"] * (len(rows[0]) - 1)])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    facts = [f"- {key}: {value}" for key, value in results.protocol.items()]
    return "\n".join([*lines, "", " ".join(["Bold: best.", *notes_of(results)]), "", *facts]) + "\n"


def _rows(results: Results, cell: Callable[[dict, bool], str], lead: str) -> list[list[str]]:
    """A header, a row per model, and the lead of the first model when there are others."""
    names = columns(results)
    # Compared as printed: what looks equal is equally good.
    best = {name: max(round(metrics[name]["mean"], 4) for metrics in results.models.values()) for name in names}
    rows = [["", *names]]
    for model, metrics in results.models.items():
        rows.append([model, *(cell(metrics[n], round(metrics[n]["mean"], 4) == best[n]) for n in names)])
    if results.lead:
        leads = [results.lead[name] for name in names]
        rows.append(["lead", *(lead.format(mean=x["mean"], half_width=half_width(x)) for x in leads)])
    return rows


def notes_of(results: Results) -> list[str]:
    """What the table does not show, in sentences."""
    names = columns(results)
    widest = max(half_width(metrics[name]) for metrics in results.models.values() for name in names)
    notes = [f"Intervals (95%, bootstrap over users) are ±{widest:.4f} or less."]
    ours = next(iter(results.models))
    if results.lead:
        notes.append(f"lead: {ours} minus the best other model, paired by user.")
    for family, what, style in (
        ("coverage", "the share of the catalog that is recommended", ".0%"),
        ("arp", "how many train events an item that is recommended has, on average", ",.1f"),
    ):
        last = [name for name in results.models[ours] if name.startswith(family)][-1:]
        for name in last:
            values = (f"{model} {metrics[name]['mean']:{style}}" for model, metrics in results.models.items())
            notes.append(f"{name}, {what}: {', '.join(values)}.")
    return notes


def columns(results: Results) -> list[str]:
    """The metrics of the table: recall and ndcg at each cutoff, mrr at the largest, OTTO's total."""
    first = next(iter(results.models.values()))
    mrr = [name for name in first if name.startswith("mrr")]
    return [name for name in first if name.startswith(("recall", "ndcg", "otto@"))] + mrr[-1:]


def half_width(estimate: dict) -> float:
    return (estimate["high"] - estimate["low"]) / 2
