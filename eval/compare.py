"""Compares two finished evaluations, user by user: the second minus the first, with intervals.

    python eval/compare.py runs/phone runs/phone-tokens

Both must have scored the same users of the same corpus, with the same masking.
"""

import argparse
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from contract import cli, schema
from contract.artifacts import STAGES, Artifact, open_finished
from eval import metrics
from eval.metrics import Lists
from eval.users import EvalUsers, read_eval_users

MUST_AGREE = ("eval.split", "eval.mask_seen")
SEED = 1


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", type=Path, help="work folder of a finished evaluation")
    parser.add_argument("second", type=Path, help="work folder of another one")
    arguments = parser.parse_args(argv)
    print(compare(arguments.first, arguments.second))


def compare(first: Path, second: Path) -> str:
    """A table of both and of the second minus the first.

    Raises:
        FileNotFoundError: one of them has no finished evaluation, or no corpus is there to read the targets from.
        ValueError: they are not of the same users, a file is damaged, or the corpus was rebuilt since.
    """
    manifests = [_finished(work, "eval").manifest for work in (first, second)]
    _check_alike(first, second, *manifests)
    corpus = _corpus(first, manifests[0]["inputs"]["corpus"])
    users = read_eval_users(corpus, manifests[0]["config"]["eval.split"])
    cutoffs = sorted(set(manifests[0]["config"]["eval.cutoffs"]) & set(manifests[1]["config"]["eval.cutoffs"]))
    if not cutoffs:
        raise ValueError(f"{first} and {second} have no cutoff in common; evaluate again with --eval.cutoffs=5,10,20")
    num_train = schema.read_num_train(corpus.path, corpus.counts["num_items"])
    lists = [_read_lists(work, users, cutoffs, num_train) for work in (first, second)]
    # The lead is that of the first entry.
    models, lead = metrics.compare({"second": lists[1], "first": lists[0]}, users.targets, cutoffs, SEED)
    rows = [["", str(first), str(second), "difference", "from", "to", ""]]
    for name, of in models["second"].items():
        row = [name, f"{models['first'][name]['mean']:.4f}", f"{of['mean']:.4f}"]
        if name in lead:
            low, high = lead[name]["low"], lead[name]["high"]
            verdict = "" if low <= 0 <= high else "better" if low > 0 else "worse"
            row += [f"{lead[name]['mean']:+.4f}", f"{low:+.4f}", f"{high:+.4f}", verdict]
        rows.append(row + [""] * (len(rows[0]) - len(row)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    note = f"{len(users):,} users; the second minus the first, 95% intervals, paired by user"
    return "\n".join([*(line.rstrip() for line in lines), "", note])


def _check_alike(first: Path, second: Path, one: dict, other: dict) -> None:
    if one["inputs"]["corpus"] != other["inputs"]["corpus"]:
        raise ValueError(f"{first} and {second} are evaluations of different corpora, which cannot be paired by user")
    for key in MUST_AGREE:
        if one["config"][key] != other["config"][key]:
            raise ValueError(
                f"{key} is {one['config'][key]!r} in {first} and {other['config'][key]!r} in {second}; "
                f"evaluate one of them again with --{key}={one['config'][key]}"
            )


def _finished(work: Path, stage: str) -> Artifact:
    return open_finished(work / stage, f"{STAGES[stage].command} --config <your config>")


def _corpus(work: Path, digest: str) -> Artifact:
    corpus = _finished(work, "corpus")
    if corpus.digest != digest:
        raise ValueError(f"{corpus.path} was rebuilt after the evaluation; run again: {STAGES['eval'].command}")
    return corpus


def _read_lists(work: Path, users: EvalUsers, cutoffs: list[int], num_train: np.ndarray) -> Lists:
    file = work / "eval" / "recommendations.parquet"
    recommended = pq.read_table(file, columns=["user_idx", "item_idx"])
    if not np.array_equal(recommended["user_idx"].to_numpy(), users.user_idx):
        raise ValueError(f"{file} does not hold the users of the corpus; run again: {STAGES['eval'].command}")
    rows = schema.ragged(recommended["item_idx"])
    item_idx = np.zeros((len(rows), max(cutoffs)), np.int32)
    place = np.arange(len(rows.values)) - np.repeat(rows.offsets[:-1], rows.lengths)
    kept = place < max(cutoffs)
    item_idx[np.repeat(np.arange(len(rows)), rows.lengths)[kept], place[kept]] = rows.values[kept]
    return metrics.read_lists(item_idx, users.targets, cutoffs, num_train)


if __name__ == "__main__":
    cli.run(main)
