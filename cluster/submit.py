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
import subprocess
from dataclasses import dataclass
from pathlib import Path

from cluster.sites import Job, Profile, load
from contract import cli
from contract import config as config_module
from contract.artifacts import FREE_IN_TRAINING, open_artifact, write_atomically
from contract.config import Config

ROOT = Path(__file__).parents[1]
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
            parser.error(f"unrecognized argument: {word}")
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


def comment(config: Config) -> str:
    """By which the jobs of a work folder are known."""
    return f"colarec {config.work_dir}"


@dataclass(frozen=True)
class Link:
    """A stage of the chain."""

    config: Config
    profile: Profile
    stage: str

    @property
    def job(self) -> Job:
        return getattr(self.profile, self.stage)

    @property
    def partition(self) -> str:
        return self.job.partition or self.profile.partition

    @property
    def logs(self) -> Path:
        return self.config.work_dir / "logs"

    def node_counts(self) -> list[int]:
        """The numbers of nodes that the stage can work on, largest first."""
        counts = range(self.job.nodes, self.job.fewest_nodes - 1, -1)
        return [count for count in counts if self.stage != "train" or not self._ranks_misfit(count)]

    def _ranks_misfit(self, nodes: int) -> str:
        train, ranks = self.config.train, nodes * self.job.ranks_per_node
        if train.streams % ranks:
            return (
                f"{nodes} x {self.job.ranks_per_node} ranks do not divide train.streams = {train.streams}; set it to "
                "a multiple of them (the corpus needs as many shards, etl.num_shards), or ask for other nodes"
            )
        if train.length_groups > train.global_batch // ranks:
            return (
                f"{nodes} x {self.job.ranks_per_node} ranks get {train.global_batch // ranks} targets each of "
                f"train.global_batch = {train.global_batch}, fewer than train.length_groups = {train.length_groups}"
            )
        return ""

    def misfits(self) -> list[str]:
        """What cannot work anywhere."""
        job, train, found = self.job, self.config.train, []
        if job.fewest_nodes > job.nodes:
            found.append(f"min_nodes = {job.min_nodes} is more than nodes = {job.nodes}")
        if job.ranks_per_node > job.cpus:
            found.append(f"{job.ranks_per_node} ranks a node need as many CPUs, and have cpus = {job.cpus}")
        if self.stage == "gid" and (job.nodes, job.ranks_per_node) != (1, 1):
            found.append("it is one process: nodes = 1, and ranks or gpus of 1 at most")
        if self.stage == "train" and (misfit := self._ranks_misfit(job.nodes)):
            found.append(misfit)
        if self.stage == "train" and train.global_batch % train.streams:
            found.append(f"train.global_batch = {train.global_batch} is no multiple of train.streams = {train.streams}")
        return [f"{self.stage}: {problem}" for problem in found]

    def unfit_for_site(self) -> list[str]:
        """What the cluster does not have, and what else SLURM itself refuses."""
        job = self.job
        wanted = [f"--partition={self.partition}"] if self.partition else []
        listed = run("sinfo", "--noheader", "--Node", *wanted, "--format=%R|%l|%c|%m|%G|%P").splitlines()
        nodes = [line.split("|") for line in listed if self.partition or line.endswith("*")]
        if not nodes:
            there = " ".join(sorted(set(run("sinfo", "--noheader", "--format=%R").split())))
            return [f"{self.stage}: partition '{self.partition}' is not there; there are: {there}"]
        limit = minutes(nodes[0][1])
        if limit and job.hours * 60 > limit:
            return [f"{self.stage}: hours = {job.hours:g}, partition {nodes[0][0]} allows {limit / 60:g}"]
        able = [
            n for n in nodes if int(n[2]) >= job.cpus and int(n[3]) >= job.memory_gb << 10 and gpus(n[4]) >= job.gpus
        ]
        if len(able) < job.fewest_nodes:
            return [
                f"{self.stage}: {job.fewest_nodes} nodes of {job.cpus} CPUs, {job.gpus} GPUs and {job.memory_gb} GB "
                f"are asked for; of the {len(nodes)} nodes in partition {nodes[0][0]} {len(able)} have that"
            ]
        try:
            run(*self.sbatch("", "--test-only"))
        except ValueError as error:
            return [f"{self.stage}: {error}"]
        return []

    def sbatch(self, after: str, *more: str) -> list[str]:
        """The words that submit the job, `after` another one."""
        job, profile, stage = self.job, self.profile, self.stage
        nodes = f"{job.fewest_nodes}-{job.nodes}" if job.fewest_nodes < job.nodes else str(job.nodes)
        options = {
            "job-name": f"{self.config.name}-{stage}",
            "comment": comment(self.config),
            "output": self.logs / f"{stage}-%j.log",
            "partition": self.partition,
            "account": profile.account,
            "qos": profile.qos,
            "exclude": profile.exclude,
            "nodes": nodes,
            # Per node. With tasks in its place, SLURM would take the fewest nodes for as many as it counts.
            "mincpus": job.cpus,
            "gres": f"{profile.gpu}:{job.gpus}" if job.gpus else "",
            "mem": f"{job.memory_gb}G" if job.memory_gb else "",
            "time": max(1, round(job.hours * 60)) if job.hours else "",
            "signal": f"USR1@{profile.signal_seconds}" if stage == "train" else "",
            "dependency": f"afterok:{after}" if after else "",
        }
        words = [f"--{name}={value}" for name, value in options.items() if value]
        fixed = ["--parsable", "--requeue", "--open-mode=append", "--kill-on-invalid-dep=yes"]
        script = [str(ROOT / "cluster" / f"{stage}.sbatch"), str(self.logs / f"{stage}.sh")]
        return ["sbatch", *fixed, *words, *profile.sbatch, *more, *script]

    def settings(self) -> str:
        """What cluster/stage.sh has to know, as bash."""
        profile, job = self.profile, self.job
        mounts = [mount if ":" in mount else f"{mount}:{mount}" for mount in profile.mounts]
        srun, prefix = [], []
        if profile.container and profile.runtime == "pyxis":
            srun = [f"--container-image={profile.container}", f"--container-workdir={Path.cwd()}"]
            srun += [f"--container-mounts={','.join(mounts)}"] if mounts else []
        elif profile.container:
            prefix = ["apptainer", "exec", *(["--nv"] if job.gpus else []), "--pwd", str(Path.cwd())]
            prefix += [word for mount in mounts for word in ("--bind", mount)] + [profile.container]
        values = {
            "STAGE": self.stage,
            "ROOT": ROOT,
            "CONFIG": self.logs / "config.toml",
            "LOGS": self.logs,
            "NODES": self.node_counts(),
            "RANKS": job.ranks_per_node if self.stage != "etl" else 1,
            "CPUS": job.cpus,
            "GPUS": job.gpus,
            "INTERFACE": profile.interface,
            "LOCAL_DISK": profile.local_disk,
            "MAX_REQUEUES": profile.max_requeues,
            "VENV": ROOT / profile.venv if profile.venv else "",
            "MODULES": profile.modules,
            "SRUN": srun,
            "EXEC": prefix,
            "SPARK": profile.spark,
        }
        lines = ["# Written by cluster/submit.py.", "# shellcheck shell=bash disable=SC2034"]
        for name, value in values.items():
            is_list = isinstance(value, (list, tuple))
            lines.append(f"{name}=({shlex.join(map(str, value))})" if is_list else f"{name}={shlex.quote(str(value))}")
        lines += [f"export {name}={shlex.quote(value)}" for name, value in profile.env.items()]
        return "\n".join(lines) + "\n"


def minutes(limit: str) -> float:
    """A time limit as sinfo prints it, [days-][[hours:]minutes:]seconds; 0 for none."""
    if not limit[0].isdigit():
        return 0
    days, _, clock = limit.rpartition("-")
    seconds = 0
    for part in clock.split(":"):
        seconds = seconds * 60 + int(part)
    return int(days or 0) * 1440 + seconds / 60


def gpus(gres: str) -> int:
    """How many GPUs a node has, of its generic resources as sinfo prints them."""
    return sum(int(number) for number in re.findall(r"gpu:(?:[^:,()]+:)?(\d+)", gres))


def run(*words: str) -> str:
    """The output of a program of SLURM. Raises ValueError with what it says when it fails."""
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{words[0]} refuses: {' '.join(done.stderr.split())}")
    return done.stdout


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
