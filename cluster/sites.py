"""What differs between sites and sizes: a TOML file of cluster/profiles/, or one of your own.

Top-level settings are the site's; [etl], [gid], [train] and [eval] say what a stage's job asks for.
"""

import dataclasses
import difflib
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

FOLDER = Path(__file__).parent / "profiles"


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
        ValueError: unknown setting, wrong type, a number that is negative.
    """
    file = Path(name) if Path(name).is_file() else FOLDER / f"{name}.toml"
    if not file.is_file():
        known = ", ".join(sorted(path.stem for path in FOLDER.glob("*.toml")))
        raise FileNotFoundError(f"profile {name} is no file and none of {FOLDER}: {known}")
    try:
        tables = tomllib.loads(file.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
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
            raise ValueError(f"{where}{f.name} = {value!r}: must be a {'table' if default == {} else 'list'} of texts")
        return tuple(value) if isinstance(default, tuple) else value
    if type(default) is float and type(value) is int:
        value = float(value)
    if type(value) is not type(default):
        raise ValueError(f"{where}{f.name} = {value!r}: must be of type {type(default).__name__}")
    low = 1 if f.name in ("nodes", "ranks", "cpus") else 0
    if type(value) in (int, float) and value < low:
        raise ValueError(f"{where}{f.name} = {value}: must be {low} or more")
    return value
