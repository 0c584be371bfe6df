"""The unfinished run in <work>/checkpoints, and the finished model in <work>/model.

    run.json              the MLflow run and the settings it was begun with
    step-N/               a state of the run, complete if it holds state.json, which is written last
        part-R.safetensors    of some parameters the weight, AdamW's moments and the average, whole and in float32
        rows-R.safetensors    of tables that are dealt to the ranks by rows: those of rank R
        state.json            bytes and sha256 of the files, the state of the loop, versions, settings
    best.safetensors      the best weights so far; best.json: their bytes and sha256

The .json hold a checksum of themselves. What else lies there, such as a copy step-N.bak, is left alone.

Nothing in it depends on the ZeRO stage or on the number of ranks. A folder is filled under a temporary name and
renamed, and those before it stay until then, so that neither a kill nor a full disk takes away what was there.
"""

import contextlib
import functools
import os
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import deepspeed
import safetensors
import safetensors.torch
import torch
import torch.distributed as dist

from contract import config as config_module
from contract.artifacts import ELSEWHERE, FREE_IN_TRAINING, git_revision
from contract.cli import RANK
from contract.disk import difference, fingerprint, follow_umask, read_record, write_record, writing
from contract.settings import Config
from trainer import engine_state

RUN, STATE = "run.json", "state.json"
_STEP = re.compile(r"step-(0|[1-9][0-9]*)")
# All that is ours in the folder, and what of it a kill left half written.
_OURS = re.compile(rf"{_STEP.pattern}|{RUN}|best\.safetensors|best\.json|\.({_STEP.pattern}|{RUN}|best(\.json)?)\.tmp")
Rows = dict[str, torch.Tensor]


class Checkpoints:
    """The folder <work>/checkpoints. All methods but `find` are for the ranks together or for rank 0, as they say."""

    def __init__(self, config: Config, inputs: dict[str, str]):
        self.path = config.work_dir / "checkpoints"
        self.best = self.path / "best.safetensors"
        self._settings = config_module.section(config, "seed", "history", "model", "loss", "train")
        self._settings = {k: v for k, v in self._settings.items() if k not in FREE_IN_TRAINING}
        self._settings |= {f"digest of {name}/": digest for name, digest in inputs.items()}
        self._resume, self._keep_last = config.train.resume, config.train.keep_last
        self._run_id = ""

    def find(self) -> str:
        """The MLflow run id of the run to go on with, '' when there is none. Writes nothing.

        Raises:
            ValueError: the run that is there has other settings, or nothing says any more which it is.
        """
        if not self._resume or not self._folders():
            return ""
        run = self._run()
        for key, value in self._settings.items():
            if run["settings"].get(key) != value:
                raise ValueError(
                    f"{self.path} holds an unfinished run with {key} = {run['settings'].get(key)!r}, this one has "
                    f"{value!r}; set it back to go on, or delete that run with --train.resume=false"
                )
        self._run_id = run["run_id"]
        return self._run_id

    def _run(self) -> dict:
        """run_id and settings of the run that is there: of run.json or, where that is lost, of a checkpoint."""
        remedy = "start over with --train.resume=false, which removes the checkpoints there"
        problems = []
        for file in (self.path / RUN, *(folder / STATE for folder in self._folders()[::-1])):
            try:
                run = read_record(file, remedy)
            except (FileNotFoundError, ValueError) as problem:
                problems.append(problem)
                continue
            if problems and RANK == 0:
                told = str(problems[0]).removesuffix(f"; {remedy}")
                print(f"{told}; {file.parent.name} says of which run it was", file=sys.stderr, flush=True)
            return run
        raise ValueError(f"{problems[0]}; no checkpoint beside it is whole")

    def create(self, run_id: str) -> None:
        """Begins anew, without what another run left (rank 0). Raises ValueError when the folder cannot be written."""
        with writing(self.path, ELSEWHERE):
            self.path.mkdir(parents=True, exist_ok=True)
            self._remove_ours()
            write_record(self.path / RUN, {"run_id": run_id, "settings": self._settings})
        self._run_id = run_id

    def save(self, engine, state: dict, rows: Rows | None = None) -> None:
        """Saves engine and state (all ranks); the checkpoints before stay until this one is complete.

        Args:
            state: what the loop needs, for JSON, with "step".
            rows: by name the rows of a table that this rank holds: (n, ...), row j is row rank + j * world_size of
                the table. Equal names on all ranks.

        Raises:
            ValueError: a rank cannot write, as when the disk is full; the checkpoints before are whole.
        """
        rank = dist.get_rank()
        files = {f"part-{rank:05d}.safetensors": _own_part(engine)}
        if rows:
            files[f"rows-{rank:05d}.safetensors"] = {name: part.detach().cpu() for name, part in rows.items()}
        files = {name: tensors for name, tensors in files.items() if tensors}
        record = {"state": state, "num_updates": engine_state.num_updates(engine), "world_size": dist.get_world_size()}
        problem = self._write(state["step"], files, record, engine.device)
        if problem and len(self._folders()) > 1:
            # Room for the new one may be where old ones lie; the newest stays.
            self._remove_old(state["step"], keep=1, device=engine.device)
            problem = self._write(state["step"], files, record, engine.device)
        if problem:
            newest = (self._folders() or [None])[-1]
            whole = f"{newest.name} is whole, and the same command goes on from it" if newest else "there is none yet"
            raise ValueError(
                f"checkpoint step-{state['step']} in {self.path} cannot be written: {problem}; {whole}. Make room, or "
                "choose another disk with --work=..."
            )
        self._remove_old(state["step"], self._keep_last, engine.device)

    def load(self, engine, say: Callable[[str], None], rows: Rows | None = None) -> dict:
        """Restores the engine from the newest checkpoint that is whole (all ranks).

        Args:
            say: takes a line for the user about each checkpoint that is not.
            rows: as given to `save`, by now perhaps at another world size; the tensors are filled in place.

        Returns:
            The state given to `save`.

        Raises:
            ValueError: none is whole.
        """
        for folder in self._folders()[::-1]:
            problem = _problem(folder, engine.device)
            if not problem:
                break
            say(f"checkpoint {folder.name} is not used: {problem}")
        else:
            raise ValueError(f"no checkpoint in {self.path} is whole; start over with --train.resume=false")
        record = read_record(folder / STATE, "run the same command again")
        tensors = _Tensors(folder, [name for name in record["files"] if name.startswith("part-")])
        engine_state.restore(engine, lambda name, key: tensors.read(f"{name}/{key}"), record["num_updates"])
        if rows:
            read_rows(folder, record["world_size"], rows, dist.get_rank(), dist.get_world_size())
        dist.barrier()
        return record["state"]

    def save_best(self, weights: Rows, device: torch.device) -> None:
        """Keeps the weights that rank 0 has as the best (all ranks). Raises ValueError when they cannot be written."""

        def write() -> None:
            temporary = self.best.with_name(".best.tmp")
            _write_file(weights, temporary)
            of_file = fingerprint(temporary)
            temporary.rename(self.best)
            write_record(self.best.with_suffix(".json"), of_file)

        if problem := _together(write if dist.get_rank() == 0 else None, device):
            raise ValueError(
                f"the best weights cannot be written to {self.best}: {problem}. Make room; the same command goes on "
                "from the last checkpoint"
            )

    def best_is_whole(self) -> bool:
        try:
            expected = read_record(self.best.with_suffix(".json"), "")
        except (FileNotFoundError, ValueError):
            return False
        return not difference(self.best, expected)

    def best_weights(self) -> dict[str, torch.Tensor]:
        """Raises ValueError when they are no longer as they were written."""
        if not self.best_is_whole():
            raise ValueError(
                f"{self.best} or its .json is damaged; the same command goes on from the last checkpoint, and measures "
                "its weights again"
            )
        return safetensors.torch.load_file(self.best)

    def remove(self) -> None:
        """The run is finished and its model written (rank 0)."""
        self._remove_ours()
        with contextlib.suppress(OSError):  # what others put there stays
            self.path.rmdir()

    def _remove_ours(self) -> None:
        for path in self.path.iterdir():
            if _OURS.fullmatch(path.name):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _folders(self) -> list[Path]:
        """The checkpoints, the newest last."""
        return sorted((path for path in self.path.glob("step-*") if _STEP.fullmatch(path.name)), key=_step)

    def _write(self, step: int, files: dict[str, Rows], record: dict, device: torch.device) -> str:
        """Writes the folder of a step; '' when it is complete, else the problem (all ranks)."""
        folder, rank = self.path / f"step-{step}", dist.get_rank()
        temporary = self.path / f".{folder.name}.tmp"
        checksums = {}

        def begin() -> None:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()

        def write() -> None:
            for name, tensors in files.items():
                _write_file(tensors, temporary / name)
                checksums[name] = fingerprint(temporary / name)

        def complete() -> None:
            about = {"run_id": self._run_id, "settings": self._settings, "versions": _versions()}
            write_record(temporary / STATE, record | about)
            shutil.rmtree(folder, ignore_errors=True)  # of the same step, and found damaged or begun anew
            temporary.rename(folder)

        problem = _together(begin if rank == 0 else None, device) or _together(write, device)
        if not problem:
            record = record | {"files": _gather_checksums(checksums, device)}
            problem = _together(complete if rank == 0 else None, device)
        if problem and rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        return problem

    def _remove_old(self, step: int, keep: int, device: torch.device) -> None:
        """Removes all but the newest `keep`, and those of steps that lie ahead: damaged ones that were passed over."""

        def remove() -> None:
            folders = self._folders()
            past = [folder for folder in folders if _step(folder) <= step]
            for folder in folders:
                if folder not in past[-keep:]:
                    shutil.rmtree(folder)

        _together(remove if dist.get_rank() == 0 else None, device)


class _Tensors:
    """Named tensors in several safetensors files, read one at a time."""

    def __init__(self, folder: Path, files: Sequence[str]):
        opened = [safetensors.safe_open(folder / name, framework="pt") for name in files]
        self._file_of = {name: file for file in opened for name in file.keys()}  # noqa: SIM118 - not a dict

    def read(self, name: str) -> torch.Tensor:
        return self._file_of[name].get_tensor(name)


def _own_part(engine) -> Rows:
    """The tensors that this rank writes, on the CPU. All ranks gather each parameter; one of them keeps it."""
    parameters = dict(engine.module.named_parameters())
    sizes = {name: getattr(p, "ds_numel", p.numel()) for name, p in parameters.items()}
    writer = deal(sizes, dist.get_world_size())
    part = {}
    for name, parameter in parameters.items():
        for key in engine_state.keys(engine, parameter):
            tensor = engine_state.full(engine, parameter, key)
            if writer[name] == dist.get_rank():
                part[f"{name}/{key}"] = tensor.cpu().contiguous()
    return part


def deal(sizes: dict[str, int], world_size: int) -> dict[str, int]:
    """Deals what has a size to ranks: the largest first, each to the rank that has least. Returns {name: rank}."""
    loads, rank_of = [0] * world_size, {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        rank_of[name] = loads.index(min(loads))
        loads[rank_of[name]] += sizes[name]
    return rank_of


def read_rows(folder: Path, num_writers: int, rows: Rows, rank: int, world_size: int) -> None:
    """Fills in `rows`, those of tables that `rank` of `world_size` holds, from the files of so many writers."""
    for writer in range(num_writers):
        if world_size == num_writers and writer != rank:
            continue
        tensors = _Tensors(folder, [f"rows-{writer:05d}.safetensors"])
        for name, own in rows.items():
            part = tensors.read(name)
            row = writer + torch.arange(len(part)) * num_writers
            mine = row % world_size == rank
            own[(row[mine] // world_size).to(own.device)] = part[mine].to(own.device, own.dtype)


def _problem(folder: Path, device: torch.device) -> str:
    """What is wrong with a checkpoint, '' when it is whole (all ranks, each of which checks a part of the files)."""
    try:
        record = read_record(folder / STATE, "")
    except FileNotFoundError:
        return f"it has no {STATE}: it was never completed"
    except ValueError:
        return f"{STATE} is damaged"
    names = sorted(record["files"])
    mine = range(dist.get_rank(), len(names), dist.get_world_size())
    bad = next((i for i in mine if difference(folder / names[i], record["files"][names[i]])), len(names))
    first = torch.tensor(bad, device=device)
    dist.all_reduce(first, dist.ReduceOp.MIN)
    if first == len(names):
        return ""
    name = names[int(first)]
    return f"{name} {difference(folder / name, record['files'][name]) or 'is damaged'}"


def _together(action: Callable[[], None] | None, device: torch.device) -> str:
    """Does something that may fail on a disk, on some ranks or all. Returns what failed to all ranks, or ''."""
    problem = ""
    try:
        if action:
            action()
    except (OSError, safetensors.SafetensorError) as error:
        problem = str(error)
        print(f"rank {dist.get_rank()}: {problem}", file=sys.stderr, flush=True)
    failed = torch.tensor(dist.get_rank() if problem else dist.get_world_size(), device=device)
    dist.all_reduce(failed, dist.ReduceOp.MIN)
    if failed == dist.get_world_size():
        return ""
    return problem or f"rank {int(failed)} failed, and said why"


def _gather_checksums(mine: dict[str, dict], device: torch.device) -> dict[str, dict]:
    """The checksums of the files of all ranks, which have no names but those that follow from the rank."""
    table = torch.zeros(dist.get_world_size(), 2, 33, dtype=torch.long)
    for name, checksum in mine.items():
        row = torch.tensor([checksum["bytes"], *bytes.fromhex(checksum["sha256"])])
        table[dist.get_rank(), int(name.startswith("rows-"))] = row
    table = table.to(device)
    dist.all_reduce(table)
    return {
        f"{kind}-{rank:05d}.safetensors": {"bytes": size, "sha256": bytes(digest).hex()}
        for rank, rows in enumerate(table.tolist())
        for kind, (size, *digest) in zip(("part", "rows"), rows, strict=True)
        if size
    }


def _write_file(tensors: Rows, file: Path) -> None:
    safetensors.torch.save_file(tensors, file)
    follow_umask(file)
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


@functools.cache
def _versions() -> dict[str, str]:
    return {"colarec": git_revision(), "torch": torch.__version__, "deepspeed": deepspeed.__version__}


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))
