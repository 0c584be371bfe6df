"""What differs between sites and sizes: a TOML file of cluster/profiles/, or one of your own.

Top-level settings are the site's; [etl], [gid], [train] and [eval] say what a stage's job asks for.
"""

import dataclasses
import difflib
import math
import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

from contract import texts, urls

FOLDER = Path(__file__).parent / "profiles"
# What a job's script sets, for cluster/stage.sh: see `chain.Link.settings`.
SET_BY_STAGES = (
    *("STAGE", "ROOT", "CONFIG", "LOGS", "NODES", "RANKS", "CPUS", "GPUS", "INTERFACE", "LOCAL_DISK", "MAX_REQUEUES"),
    *("VENV", "MODULES", "SRUN", "EXEC", "SPARK"),
)
SET_BY_BASH = ("BASHOPTS", "BASH_VERSINFO", "EUID", "PPID", "SHELLOPTS", "UID")  # and cannot be set by others
_IN_THE_SHELL = "leave it out, and export it in the shell that submits: jobs get its environment"
# Of variables that hold the secret itself, and not a name, a file or a switch.
_SECRET = r"(?i:password|passwd|passphrase|secret|token|(api|access|account|private|secret)[._-]?key)"


@dataclass(frozen=True)
class Job:
    """A stage's job."""

    nodes: int = 1
    min_nodes: int = 0  # with fewer it does not start or go on; 0: as `nodes`
    gpus: int = 0  # per node; each has one rank
    ranks: int = 1  # per node, where gpus = 0
    cpus: int = 1  # per node
    memory_gb: int = 0  # per node; 0: what the partition gives
    hours: float = 0.0  # time limit; 0: the partition's
    partition: str = ""  # empty: the site's

    @property
    def ranks_per_node(self) -> int:
        return self.gpus or self.ranks

    @property
    def fewest_nodes(self) -> int:
        return self.min_nodes or self.nodes


@dataclass(frozen=True)
class Profile:
    """A site."""

    partition: str = ""  # empty: the default one
    account: str = ""
    qos: str = ""
    exclude: str = ""  # nodes not to be used, as SLURM writes them: n[3-4],n9
    sbatch: tuple[str, ...] = ()  # more of sbatch's options
    gpu: str = "gpu"  # the name of GPUs in --gres: gpu, gpu:h100
    venv: str = ".venv"  # Python environment, relative to the repository; empty: the container's or the modules'
    modules: tuple[str, ...] = ()  # of `module load`
    container: str = ""  # image; empty: none
    runtime: str = "pyxis"  # what runs it: pyxis (enroot) or apptainer
    mounts: tuple[str, ...] = ()  # into the container: source or source:target
    interface: str = ""  # network interface of NCCL and gloo, such as ib0; empty: they choose
    local_disk: str = "/tmp"  # of a node: Spark's shuffles
    spark: tuple[str, ...] = ()  # more of spark-submit's options
    signal_seconds: int = 300  # so long before the time limit training is told to save and to be queued again
    max_requeues: int = 50  # that the job itself asks for
    env: dict[str, str] = field(default_factory=dict)  # of all processes
    etl: Job = Job()
    gid: Job = Job()
    train: Job = Job()
    eval: Job = Job()


def load(name: str) -> Profile:
    """Reads a profile: a file, or the name of one in cluster/profiles/.

    Raises:
        FileNotFoundError: there is none.
        ValueError: unknown setting, wrong type, a number that is negative, a text that the jobs' shell cannot take, a
            secret.
    """
    file = Path(name) if Path(name).is_file() else FOLDER / f"{name}.toml"
    if not file.is_file():
        known = ", ".join(sorted(path.stem for path in FOLDER.glob("*.toml")))
        raise FileNotFoundError(f"profile {name} is no file and none of {FOLDER}: {known}")
    try:
        tables = tomllib.loads(texts.read_text(file))
    except (ValueError, RecursionError) as error:  # TOMLDecodeError is one; so is a number of thousands of digits
        raise ValueError(f"profile {file} is not valid TOML: {error}") from None
    profile = _build(Profile, tables, f"profile {file}: ")
    if profile.runtime not in ("pyxis", "apptainer"):
        raise ValueError(f"profile {file}: runtime = {profile.runtime!r}: must be 'pyxis' or 'apptainer'")
    return profile


def _build(cls, table: dict, where: str):
    known = {f.name: f for f in dataclasses.fields(cls)}
    values = {}
    for key, value in table.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0)[0]
            raise ValueError(f"{where}unknown setting '{key}'; did you mean '{near}'?")
        values[key] = _checked(known[key], value, where)
    return cls(**values)


def _checked(f: dataclasses.Field, value, where: str):
    default = f.default_factory() if f.default is dataclasses.MISSING else f.default
    if isinstance(default, Job):
        if not isinstance(value, dict):
            raise ValueError(f"{where}{f.name} = {value!r}: must be a table, [{f.name}]")
        return _build(Job, value, f"{where}{f.name}.")
    if isinstance(default, (tuple, dict)):
        texts = list(value.values()) if isinstance(value, dict) else value
        if type(value) is not (dict if isinstance(default, dict) else list) or not all(type(t) is str for t in texts):
            if default == {}:
                raise ValueError(f"{where}{f.name}: must be a table of texts")  # some of which may be secrets
            raise ValueError(f"{where}{f.name} = {value!r}: must be a list of texts")
        for text in texts:
            _check_text(f"{where}{f.name}", text, breaks=default == {})
        for name in value if isinstance(value, dict) else ():
            _check_variable(f"{where}env", name)
        return tuple(value) if isinstance(default, tuple) else value
    if type(default) is float and type(value) is int:
        value = float(value)
    if type(value) is not type(default):
        raise ValueError(f"{where}{f.name} = {value!r}: must be of type {type(default).__name__}")
    if isinstance(value, str):
        _check_text(f"{where}{f.name}", value)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where}{f.name} = {value}: must be a finite number")
    low = 1 if f.name in ("nodes", "ranks", "cpus") else 0
    if type(value) in (int, float) and value < low:
        raise ValueError(f"{where}{f.name} = {value}: must be {low} or more")
    return value


def _check_text(what: str, text: str, breaks: bool = False) -> None:
    """`breaks`: it may hold line breaks and tabs."""
    if secret := urls.secret(text):
        raise ValueError(f"{what} holds {secret}: it would be written into the jobs' files; {_IN_THE_SHELL}")
    if named := re.search(
        rf"[\w.-]*{_SECRET}(?==\S)", text
    ):  # of an option: --conf x.secret.key=..., --export=X_TOKEN=...
        raise ValueError(f"{what}: {named[0]} would be written into the jobs' files; {_IN_THE_SHELL}")
    if re.search(r"[\0\x01-\x08\x0b\x0c\x0e-\x1f\x7f]" if breaks else r"[\0-\x1f\x7f]", text):
        raise ValueError(f"{what}: {text!r} holds a control character; leave it out")


def _check_variable(what: str, name: str) -> None:
    """Whether the jobs' script can export it."""
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise ValueError(f"{what}: {name!r} is no name of a variable: letters, digits and _ alone, no digit first")
    if name in (*SET_BY_STAGES, *SET_BY_BASH):
        raise ValueError(f"{what}: {name} is set by the jobs' script itself; leave it out")
    if re.search(f"{_SECRET}$", name):
        raise ValueError(f"{what}: {name} would be written into the jobs' files; {_IN_THE_SHELL}")
