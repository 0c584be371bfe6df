"""The ablations of the paper from one config: corpus/ and gid/ -> ablations/

    python eval/ablate.py --config configs/demo.toml
    python eval/ablate.py --config configs/demo.toml --only=no_distil,gid_random
    python eval/ablate.py --config configs/demo.toml --dry-run
    python eval/ablate.py --config configs/demo.toml --launcher="deepspeed"
    python eval/ablate.py --config configs/demo.toml \\
        --launcher="DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 deepspeed --num_accelerators 2"

--only       names of variants, separated by commas; the full model is always there. Default: all
--split      whose users are scored: valid, or test once nothing is tuned any more. Default: valid
--launcher   what starts training and evaluation. Default: this Python, one process

The programs of the stages train and evaluate each variant, one after another, in a work folder of its own,
<work>/ablations/<variant>; what they print goes to its log.txt. Ctrl-C stops, and the same command goes on: variants
that are complete are skipped, one that is not goes on from its checkpoint. Writes a table, a figure and the numbers.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

from contract import cli
from contract import config as config_module
from contract.artifacts import ELSEWHERE, Artifact, lock, open_artifact
from contract.cli import Progress
from contract.disk import read_record, write_atomically, write_record, writing
from contract.settings import Config
from contract.tracking import Run, track
from eval import contrast, table
from eval.programs import call, reason
from eval.variants import FULL, Variant, choose, is_there, link_inputs, shares, variant_config, write_config

ROOT = Path(__file__).parents[1]
PROGRAMS = {"gid": "gid/build.py", "model": "trainer/main.py", "eval": "eval/main.py"}


def main(argv: list[str]) -> None:
    own, rest = parse_own(argv)
    config, dry_run = cli.parse(rest, __doc__)
    config = config_module.replace(config, {"eval.split": own.split})
    variants, folder = choose(config, own.only), config.work_dir / "ablations"
    if dry_run:
        return show_plan(config, variants)
    corpus = open_artifact(config, "corpus")
    open_artifact(config, "gid")
    progress = Progress("ablate")
    with (
        lock(config, "ablations"),
        writing(folder, ELSEWHERE),
        track(config, "ablate", run_id=earlier_run(config)) as run,
    ):
        folder.mkdir(exist_ok=True)
        write_record(folder / "run.json", {"uri": config.tracking.uri, "run_id": run.run_id})
        configs = {variant.name: variant_config(config, variant, run.run_id) for variant in variants}
        problems = {}
        for number, variant in enumerate(variants, 1):
            progress(f"{variant.name} ({number} of {len(variants)}): {variant.what}")
            problem = complete(config, variant, configs[variant.name], shlex.split(own.launcher), progress)
            if problem:
                problems[variant.name] = problem
                progress(f"{variant.name}: {problem}")
        done = [variant for variant in variants if variant.name not in problems]
        if variants[0] in done:
            progress(f"wrote {folder}\n\n{write_results(folder, configs, done, corpus, run)}\n")
        if problems:
            raise ValueError("\n".join(f"{name}: {problem}" for name, problem in problems.items()))


def parse_own(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """What this program alone knows, and the words that all stages know."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--only", default="")
    parser.add_argument("--split", choices=("valid", "test"), default="valid")
    parser.add_argument("--launcher", default="")
    own, rest = parser.parse_known_args(argv)
    if any(word.startswith("--eval.split") for word in rest):
        raise ValueError("ablations are evaluated on valid, whatever eval.split says; for test, say --split=test")
    return own, rest


def show_plan(config: Config, variants: list[Variant]) -> None:
    folder = config.work_dir / "ablations"
    cli.show_plan(config, {name: config.work_dir / name for name in ("corpus", "gid")}, folder)
    for variant in variants:
        its_config = variant_config(config, variant)
        due = [name for name in PROGRAMS if not (shares(config, variant, name) or is_there(its_config, name))]
        settings = " ".join(f"{key}={value}" for key, value in variant.settings.items())
        print(f"{variant.name:<18} {'to make: ' + ', '.join(due) if due else 'complete':<26} {settings}")


def earlier_run(config: Config) -> str:
    """The MLflow run of the ablation that is there, '' when there is none in this store."""
    file = config.work_dir / "ablations" / "run.json"
    try:
        known = read_record(file, "")
    except (FileNotFoundError, ValueError):  # the variants that are complete stay, in a run of another number
        return ""
    return known["run_id"] if known.get("uri") == config.tracking.uri else ""


def complete(config: Config, variant: Variant, its_config: Config, launcher: list[str], progress: Progress) -> str:
    """Runs the stages of a variant that have not been run, up to one that fails. Returns what failed, or ''.

    Args:
        launcher: words before the program of a stage that may have several ranks.
    """
    link_inputs(config, variant, its_config)
    work = its_config.work_dir
    file, log = write_config(its_config), work / "log.txt"
    for stage in variant.stages:
        if is_there(its_config, stage):
            continue
        if (work / stage).is_symlink():
            (work / stage).unlink()
        words = ["env", *launcher] if launcher and stage != "gid" else [sys.executable]
        words += [str(ROOT / PROGRAMS[stage]), "--config", str(file)]
        progress(f"{variant.name}: {PROGRAMS[stage]}, see {log}")
        status = call(words, log, lambda line: progress.status(f"{variant.name}: {line}"))
        if status:
            return f"{PROGRAMS[stage]} ended with exit status {status}: {reason(log)}; see {log}"
        if not is_there(its_config, stage):  # as when a launcher is killed, which then returns 0
            return f"{PROGRAMS[stage]} ended without an error and without {work / stage}; see {log}"
    return ""


def write_results(folder: Path, configs: dict, variants: list[Variant], corpus: Artifact, run: Run) -> str:
    """Compares the variants, which are complete, and returns the table for the terminal."""
    any_config = configs[FULL]
    split = any_config.eval.split
    folders = {v.name: configs[v.name].work_dir / "eval" for v in variants}
    results = contrast.contrast(any_config, corpus, folders)
    metrics = contrast.shown(any_config.eval.cutoffs)
    generated = contrast.generated(variants, folders, metrics)
    facts = table.read(any_config.work_dir / "eval" / "metrics.json").protocol
    models = {v.name: open_artifact(configs[v.name], "model").counts for v in variants}
    training = {name: f"{m['seconds'] / 60:.1f} min, kept: epoch {m['best_epoch']:g}" for name, m in models.items()}
    write_atomically(folder / f"{split}.json", json.dumps(results, indent=1) + "\n")
    write_atomically(folder / f"{split}.md", contrast.markdown(variants, results, metrics, facts, training, generated))
    title = f"{folder.parent.name}: ablations on {split}"
    contrast.figure(variants, results, metrics, title).savefig(folder / f"{split}.png", dpi=150)
    for name in ("json", "md", "png"):
        run.artifact(folder / f"{split}.{name}")
    for variant, found in results.items():
        run.metrics({f"{split}_{metric}/{variant}": found[metric]["mean"] for metric in metrics})
    untrained = ", ".join(name for name, counts in models.items() if not counts["best_epoch"])
    warning = f"\n\nno step made these better on valid, so that they are untrained: {untrained}" if untrained else ""
    return contrast.terminal(variants, results, metrics, generated) + warning


if __name__ == "__main__":
    cli.run(main)
