"""The unfinished run in <work>/checkpoints, and the finished model in <work>/model."""

import json
import shutil

import safetensors.torch
import torch
import torch.distributed as dist

from contract import config as config_module
from contract.artifacts import write_atomically
from contract.config import Config

# These may differ between the run that was interrupted and the one that goes on with it.
_FREE = {"train.workers", "train.log_every", "train.save_every", "train.resume"}


class Checkpoints:
    """<work>/checkpoints: what the run is (run.json), DeepSpeed's states, and the best weights so far."""

    def __init__(self, config: Config, inputs: dict[str, str], world_size: int):
        self.path = config.work_dir / "checkpoints"
        self.best = self.path / "best.safetensors"
        self._settings = config_module.section(config, "seed", "history", "model", "loss", "train")
        self._settings = {k: v for k, v in self._settings.items() if k not in _FREE}
        self._settings |= {f"digest of {name}/": digest for name, digest in inputs.items()}
        if config.train.zero_stage:
            self._settings["number of ranks"] = world_size
        self._resume = config.train.resume

    def find(self) -> str:
        """The MLflow run id of the run to go on with, '' when there is none. Writes nothing.

        Raises:
            ValueError: the run that is there has other settings.
        """
        if not self._resume or not (self.path / "latest").is_file():
            return ""
        run = json.loads((self.path / "run.json").read_text())
        for key, value in self._settings.items():
            if run["settings"].get(key) != value:
                raise ValueError(
                    f"{self.path} holds an unfinished run with {key} = {run['settings'].get(key)!r}, this one has "
                    f"{value!r}; set it back to go on, or delete that run with --train.resume=false"
                )
        return run["run_id"]

    def create(self, run_id: str) -> None:
        """Begins an empty folder (rank 0)."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir(parents=True)
        write_atomically(self.path / "run.json", json.dumps({"run_id": run_id, "settings": self._settings}, indent=1))

    def load(self, engine) -> dict:
        """Restores the engine (all ranks). Returns the state given to `save`."""
        path, state = engine.load_checkpoint(str(self.path))
        if path is None:
            raise ValueError(f"{self.path} cannot be read; start over with --train.resume=false")
        return {key: state[key] for key in ("step", "best_loss", "best_epoch", "stale_epochs")}

    def save(self, engine, state: dict) -> None:
        """Saves engine and state (all ranks); the checkpoint before stays until this one is complete."""
        tag = f"step-{state['step']}"
        engine.save_checkpoint(str(self.path), tag=tag, client_state=state)
        dist.barrier()
        if dist.get_rank() == 0:
            for old in self.path.glob("step-*"):
                if old.name != tag:
                    shutil.rmtree(old)

    def save_best(self, weights: dict[str, torch.Tensor]) -> None:
        temporary = self.best.with_name(".best.tmp")
        safetensors.torch.save_file(weights, temporary)
        temporary.rename(self.best)

    def best_weights(self) -> dict[str, torch.Tensor]:
        return safetensors.torch.load_file(self.best)

    def remove(self) -> None:
        """The run is finished and its model written (rank 0)."""
        shutil.rmtree(self.path)
