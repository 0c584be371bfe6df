"""A link of the chain: what a stage's job asks for, whether it can have that, and what it is told."""

import re
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

from cluster.sites import Job, Profile
from contract.settings import Config

ROOT = Path(__file__).parents[1]


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
        if self.stage == "train" and 0 < job.hours * 3600 <= self.profile.signal_seconds:
            found.append(f"hours = {job.hours:g} leave nothing before signal_seconds = {self.profile.signal_seconds}")
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


def comment(config: Config) -> str:
    """By which the jobs of a work folder are known."""
    return f"colarec {config.work_dir}"
