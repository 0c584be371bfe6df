"""What each ablation costs: metrics of the variants over the same users, and their differences to the full model.

N: users, k: recommendations per user.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from contract.artifacts import Artifact
from contract.metrics import ranking_metrics
from contract.schema import ragged
from contract.settings import Config
from eval import table
from eval.metrics import bootstrap_interval
from eval.users import read_eval_users
from eval.variants import FULL, Variant

BETTER, WORSE, NEITHER = "#1b7837", "#b2182b", "#808080"


def contrast(config: Config, corpus: Artifact, folders: dict[str, Path]) -> dict[str, dict]:
    """Compares the lists of the variants.

    Args:
        config: of any variant: the split, the cutoffs and the seed of the bootstrap.
        folders: {variant: its eval/}, the full model first.

    Returns:
        {variant: {metric: {"mean", "low", "high", "difference": {"mean", "low", "high"}}}}, JSON-ready. Intervals
        (95%) are of a bootstrap over users, paired for the difference to the full model, which has none itself.

    Raises:
        ValueError: the lists are not of the users of the split.
    """
    users, cutoffs = read_eval_users(corpus, config.eval.split), config.eval.cutoffs
    columns: dict[tuple[str, str, str], np.ndarray] = {}
    for variant, folder in folders.items():
        user_idx, item_idx = read_lists(folder / "recommendations.parquet", max(cutoffs))
        if not np.array_equal(user_idx, users.user_idx):
            raise ValueError(f"{folder} does not hold the list of every {config.eval.split} user; delete it, run again")
        for metric, values in ranking_metrics(item_idx, users.targets, cutoffs).items():
            columns[variant, metric, "value"] = values
            if variant != FULL:
                columns[variant, metric, "difference"] = values - columns[FULL, metric, "value"]
    intervals = bootstrap_interval(columns, config.seed)
    results: dict[str, dict] = {variant: {} for variant in folders}
    for (variant, metric, kind), values in columns.items():
        low, high = intervals[variant, metric, kind]
        estimate = {"mean": float(values.mean()), "low": low, "high": high}
        if kind == "value":
            results[variant][metric] = estimate
        else:
            results[variant][metric]["difference"] = estimate
    return results


def read_lists(file: Path, k: int) -> tuple[np.ndarray, np.ndarray]:
    """user_idx int64 (N,) and the first k of each list, int32 (N, k), of recommendations.parquet; 0 fills up."""
    columns = pq.read_table(file, columns=["user_idx", "item_idx"])
    lists = ragged(columns["item_idx"])
    items = np.zeros((len(lists), max(k, int(lists.lengths.max(initial=0)))), np.int32)
    items[np.arange(items.shape[1]) < lists.lengths[:, None]] = lists.values
    return columns["user_idx"].to_numpy(), items[:, :k]


def shown(cutoffs: Sequence[int]) -> list[str]:
    """The metrics of the table and the figure: at cutoff 10, or the first where 10 is none."""
    cutoff = 10 if 10 in cutoffs else cutoffs[0]
    return [f"recall@{cutoff}", f"ndcg@{cutoff}"]


def generated(variants: list[Variant], folders: dict[str, Path], metrics: list[str]) -> dict[str, list[str]]:
    """{a column: its cells, one a variant} of the lists by log p alone, where they are not the ones that are shown.

    Args:
        folders: {variant: its eval/}.
    """
    models = [table.read(folders[variant.name] / "metrics.json").models for variant in variants]
    found = [model.get("ColaRec, generative") for model in models]
    if not any(found):
        return {}
    return {f"generated {m}": [f"{lists[m]['mean']:.4f}" if lists else "" for lists in found] for m in metrics}


def markdown(
    variants: list[Variant], results: dict, metrics: list[str], facts: dict[str, str], training: dict, beside: dict
) -> str:
    """The table. A difference whose interval does not hold 0 is bold.

    Args:
        results: see `contrast`.
        facts: what a reader must know to compare the numbers, in the order to show them.
        training: {variant: how long it was trained, in words}.
        beside: more columns, see `generated`.
    """
    header = ["variant", "", *(cell for metric in metrics for cell in (metric, "difference")), *beside, "training"]
    rows = [header, ["---", "---", *["---:"] * (len(header) - 2)]]
    for number, variant in enumerate(variants):
        cells = []
        for metric in metrics:
            estimate = results[variant.name][metric]
            cells += [f"{estimate['mean']:.4f} ±{(estimate['high'] - estimate['low']) / 2:.4f}", ""]
            if difference := estimate.get("difference"):
                bold = "**" * bool(_verdict(difference))
                cells[-1] = (
                    f"{bold}{difference['mean']:+.4f}{bold} [{difference['low']:+.4f}, {difference['high']:+.4f}]"
                )
        rows.append(
            [variant.name, variant.what, *cells, *(of[number] for of in beside.values()), training[variant.name]]
        )
    lines = [f"| {' | '.join(row)} |" for row in rows]
    notes = (
        "difference: to the full model, with its 95% interval (bootstrap over users, paired by user); bold where that "
        "does not hold 0. One training per variant: the intervals know nothing of other seeds. The full model:"
    )
    return "\n".join([*lines, "", notes, "", *(f"- {key}: {value}" for key, value in facts.items())]) + "\n"


def terminal(variants: list[Variant], results: dict, metrics: list[str], beside: dict) -> str:
    """The same in short, aligned; a star marks a difference whose interval does not hold 0."""
    rows = [["", *(cell for metric in metrics for cell in (f"{metric} ", "difference ")), *beside]]
    for number, variant in enumerate(variants):
        cells = []
        for metric in metrics:
            estimate = results[variant.name][metric]
            cells += [f"{estimate['mean']:.4f} ", ""]
            if difference := estimate.get("difference"):
                cells[-1] = f"{difference['mean']:+.4f}{'*' if _verdict(difference) else ' '}"
        rows.append([variant.name, *cells, *(of[number] for of in beside.values())])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        row[0].ljust(widths[0]) + "".join(f"  {cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join([*(line.rstrip() for line in lines), "", "* the 95% interval does not hold 0 (paired by user)"])


def _verdict(difference: dict) -> int:
    """1 better and -1 worse than the full model, 0 where the interval holds 0."""
    return (difference["low"] > 0) - (difference["high"] < 0)


def figure(variants: list[Variant], results: dict, metrics: list[str], title: str) -> Figure:
    """A panel per metric: the difference of each ablation to the full model, with its interval."""
    ablations = variants[1:]
    drawn = Figure(figsize=(11, 1.6 + 0.42 * len(ablations)), layout="constrained")
    panels = drawn.subplots(1, len(metrics), sharey=True)
    for axes, metric in zip(panels, metrics, strict=True):
        full = results[FULL][metric]["mean"]
        for row, variant in enumerate(ablations):
            difference = results[variant.name][metric]["difference"]
            color = (NEITHER, BETTER, WORSE)[_verdict(difference)]
            axes.plot([difference["low"], difference["high"]], [row, row], color=color, linewidth=2)
            axes.plot(difference["mean"], row, "o", color=color)
        axes.axvline(0, color="black", linewidth=1)
        axes.set_xlabel(f"{metric} minus the full model's {full:.4f}")
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(left=False)
    panels[0].set_yticks(range(len(ablations)), [f"{variant.what}  ({variant.name})" for variant in ablations])
    panels[0].set_ylim(len(ablations) - 0.5, -0.5)
    drawn.suptitle(f"{title}, 95% intervals paired by user; gray: they hold 0", fontsize=11)
    return drawn
