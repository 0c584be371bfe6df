"""The results of an evaluation: metrics.json, and the tables drawn from it."""

import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from contract.artifacts import git_revision, write_atomically
from contract.config import Config


@dataclass(frozen=True)
class Results:
    """What metrics.json holds. All of it is JSON-ready; `metrics.compare` makes `models` and `lead`.

    The first model is the one that is evaluated, the others are what it is compared with.
    """

    name: str  # of the experiment
    protocol: dict[str, str]  # facts in the order to show them, see `protocol`
    models: dict[str, dict[str, dict]]  # {model: {metric: {"mean", "low", "high"}}}; 95% intervals over users
    lead: dict[str, dict]  # {metric: {"mean", "low", "high", "over"}}: the first model minus the best other one


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
    weights = {name: weight for name, weight in dataclasses.asdict(loss).items() if weight}
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
    settings = config.eval
    if settings.ranks_by == "dense":
        return "all items by h(X_u) . h(X_i)"
    every = settings.exhaustive or settings.beams >= num_items
    found = "the GIDs of all items" if every else f"{settings.beams} beams over the GIDs of all items"
    if settings.ranks_by == "hybrid" and every:
        return f"{found}, ranked by log p + {settings.hybrid:g} h(X_u) . h(X_i)"
    if settings.ranks_by == "hybrid":
        return f"{found}; with as many by h(X_u) . h(X_i), ranked by log p + {settings.hybrid:g} of that"
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
    facts = [f"{key + ':':<12} {value}" for key, value in results.protocol.items()]
    return "\n".join([*(line.rstrip() for line in lines), "", "* best", *_notes(results), "", *facts])


def markdown(results: Results) -> str:
    """The same with the half-width of each interval; the best of each column is bold."""
    rows = _rows(
        results,
        lambda estimate, best: f"{'**' * best}{estimate['mean']:.4f}{'**' * best} ±{_half_width(estimate):.4f}",
        "{mean:+.4f} ±{half_width:.4f}",
    )
    rows.insert(1, ["---", *["---:"] * (len(rows[0]) - 1)])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    facts = [f"- {key}: {value}" for key, value in results.protocol.items()]
    return "\n".join([*lines, "", " ".join(["Bold: best.", *_notes(results)]), "", *facts]) + "\n"


def _rows(results: Results, cell: Callable[[dict, bool], str], lead: str) -> list[list[str]]:
    """A header, a row per model, and the lead of the first model when there are others."""
    names = _names_with_interval(results)
    # Compared as printed: what looks equal is equally good.
    best = {name: max(round(metrics[name]["mean"], 4) for metrics in results.models.values()) for name in names}
    rows = [["", *names]]
    for model, metrics in results.models.items():
        rows.append([model, *(cell(metrics[n], round(metrics[n]["mean"], 4) == best[n]) for n in names)])
    if results.lead:
        leads = [results.lead[name] for name in names]
        rows.append(["lead", *(lead.format(mean=x["mean"], half_width=_half_width(x)) for x in leads)])
    return rows


def _notes(results: Results) -> list[str]:
    names = _names_with_interval(results)
    widest = max(_half_width(metrics[name]) for metrics in results.models.values() for name in names)
    notes = [f"Intervals (95%, bootstrap over users) are ±{widest:.4f} or less."]
    ours = next(iter(results.models))
    if results.lead:
        notes.append(f"lead: {ours} minus the best other model, paired by user.")
    coverage = [name for name in results.models[ours] if name not in names]
    if coverage:
        shares = (f"{model} {metrics[coverage[-1]]['mean']:.0%}" for model, metrics in results.models.items())
        notes.append(f"{coverage[-1]}, the share of the catalog that is recommended: {', '.join(shares)}.")
    return notes


def _names_with_interval(results: Results) -> list[str]:
    """All metrics but coverage, which is not a mean over users."""
    first = next(iter(results.models.values()))
    return [name for name, estimate in first.items() if "low" in estimate]


def _half_width(estimate: dict) -> float:
    return (estimate["high"] - estimate["low"]) / 2
