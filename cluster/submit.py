"""Runs an experiment on a SLURM cluster, as a chain of jobs: etl, gid, train, eval.

    python cluster/submit.py configs/shop.toml --profile gpu
    python cluster/submit.py configs/shop.toml --profile my-site.toml --train.epochs=3 --dry-run
    python cluster/submit.py configs/shop.toml --from gid

Stages whose artifacts are complete and match the config are left out, so that the same command goes on with a chain
that broke. Relative paths are those of the folder that it is called in, which the jobs must see as well. All that the
jobs read and say lies in <work>/logs. docs/cluster.md has the rest.
"""

import argparse
import re
import shlex
import shutil

from cluster.chain import Link, comment, run
from cluster.sites import load
from contract import cli, urls
from contract import config as config_module
from contract.artifacts import FREE_IN_TRAINING, open_artifact
from contract.disk import write_atomically
from contract.settings import Config

ARTIFACTS = {"etl": "corpus", "gid": "gid", "train": "model", "eval": "eval"}  # of the stages, in their order


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        usage="%(prog)s CONFIG [--profile P] [--from STAGE] [--dry-run] [--SECTION.SETTING=VALUE ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("config", metavar="CONFIG", help="TOML file, see configs/")
    parser.add_argument("--profile", default="gpu", help="TOML file, or a name in cluster/profiles/; default: gpu")
    parser.add_argument("--from", dest="first", choices=ARTIFACTS, help="run this stage and those after it anew")
    parser.add_argument("--dry-run", action="store_true", help="check and print all, submit nothing")
    args, settings = parser.parse_known_args(argv)
    config, profile = config_module.load(args.config, overrides(parser, settings)), load(args.profile)
    stages = due(config, args.first)
    if not stages:
        print(f"all artifacts in {config.work_dir} are complete; --from STAGE runs a stage anew")
        return
    chain = [Link(config, profile, stage) for stage in stages]
    problems = [problem for link in chain for problem in link.misfits()]
    if shutil.which("sbatch"):
        problems += [problem for link in chain for problem in link.unfit_for_site()] or queued(config)
    elif not args.dry_run:
        raise FileNotFoundError("there is no sbatch here: submit from a login node of the cluster")
    if problems:
        raise ValueError("\n".join(problems))
    if args.dry_run:
        for link, before in zip(chain, [None, *chain], strict=False):
            print(shlex.join(link.sbatch(f"<{before.stage}>" if before else "")))
        return
    submit(chain)


def overrides(parser: argparse.ArgumentParser, words: list[str]) -> dict[str, str]:
    """{dotted key: text} of --SECTION.SETTING=VALUE; which are settings, the config knows."""
    for word in words:
        if not re.fullmatch(r"--\w+(\.\w+)?=.*", word, re.DOTALL):
            parser.error(f"unrecognized argument: {urls.hidden(word)}")
    return dict(word.removeprefix("--").split("=", 1) for word in words)


def due(config: Config, first: str | None) -> list[str]:
    """The stages to run: from the first whose artifact is not there or does not match, or from `first`."""
    for number, (stage, name) in enumerate(ARTIFACTS.items()):
        reason = "to be run anew" if stage == first else missing(config, name)
        if reason:
            print(f"{stage:<6} {reason}")
            return list(ARTIFACTS)[number:]
        print(f"{stage:<6} complete: {config.work_dir / name}")
    return []


def missing(config: Config, name: str) -> str:
    """Why an artifact has to be made, '' when it is complete and matches the config."""
    try:
        artifact = open_artifact(config, name)
    except FileNotFoundError:
        return "not there yet"
    except ValueError as error:
        return str(error).split(";")[0]
    trained = artifact.manifest.get("training", {}).get("train", {})
    for key, value in config_module.section(config, "train").items():
        was = trained.get(key.removeprefix("train."), value)
        if key not in FREE_IN_TRAINING and name == "model" and was != value:
            return f"{artifact.path} was trained with {key} = {was!r}, the config says {value!r}"
    return ""


def queued(config: Config) -> list[str]:
    """What to say of jobs that are at work on this folder."""
    found = run("squeue", "--me", "--noheader", "--format=%i|%j|%T %r|%k")
    jobs = [line.split("|") for line in found.splitlines() if line.endswith("|" + comment(config))]
    if not jobs:
        return []
    listed = ", ".join(f"{number} ({name}, {state})" for number, name, state, _ in jobs)
    numbers = " ".join(number for number, *_ in jobs)
    return [f"jobs are at work on {config.work_dir}: {listed}; wait for them, or: scancel {numbers}"]


def submit(chain: list[Link]) -> None:
    """Submits all jobs, or none, and says how to follow them."""
    logs = chain[0].logs
    logs.mkdir(parents=True, exist_ok=True)
    write_atomically(logs / "config.toml", config_module.to_toml(chain[0].config))
    numbers = []
    try:
        for link in chain:
            write_atomically(logs / f"{link.stage}.sh", link.settings())
            numbers.append(run(*link.sbatch(numbers[-1] if numbers else "")).strip().split(";")[0])
    except ValueError:
        if numbers:
            run("scancel", *numbers)
        raise
    for link, number in zip(chain, numbers, strict=True):
        job = link.job
        print(f"{link.stage:<6} job {number}, {job.nodes} x {job.ranks_per_node} ranks, {link.stage}-{number}.log")
    listed = ",".join(numbers)
    files = ",".join(f"{link.stage}-{number}.log" for link, number in zip(chain, numbers, strict=True))
    print(f"\nqueue   squeue --jobs={listed}")
    print(f"output  tail -F {shlex.quote(str(logs))}/{'{' + files + '}' if len(chain) > 1 else files}")
    print(f"ended   sacct --duplicates -X --jobs={listed} --format=JobID,JobName%24,State,ExitCode,Elapsed,NodeList")
    print(f"cancel  scancel {' '.join(numbers)}")


if __name__ == "__main__":
    cli.run(main)
