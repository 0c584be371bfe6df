"""The training loop: steps, progress, validation, and when to stop."""

import math
import signal
import time

import torch
import torch.distributed as dist

from contract.artifacts import Artifact
from contract.cli import Progress
from contract.config import Config
from contract.tracking import Run
from trainer import distributed, loader, tables
from trainer.checkpoint import Checkpoints
from trainer.inputs import Catalog


class Training:
    """The loop over steps, and its state: what a checkpoint must hold beside the engine."""

    def __init__(
        self,
        config: Config,
        corpus: Artifact,
        catalog: Catalog,
        engine,
        checkpoints: Checkpoints,
        run: Run,
        progress: Progress,
    ):
        self.config, self.corpus, self.catalog, self.engine = config, corpus, catalog, engine
        self.checkpoints, self.run, self.progress = checkpoints, run, progress
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.shards = loader.shard_paths(corpus, "train")
        loader.check_batch_sizes(config, len(self.shards), self.world_size)
        self.epoch_steps = loader.steps_per_epoch(config, corpus)
        self.num_steps = config.train.max_steps or config.train.epochs * self.epoch_steps
        self.state = {"step": 0, "best_loss": math.inf, "best_epoch": -1, "stale_epochs": 0}
        self.stop_requested = False
        self.start = time.monotonic()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._request_stop)

    def _request_stop(self, *_) -> None:
        self.stop_requested = True

    def seconds(self) -> float:
        return time.monotonic() - self.start

    def fit(self) -> None:
        """Trains to the end. Raises KeyboardInterrupt, after a checkpoint, when a signal asks to stop."""
        if self.state["step"] == 0:
            self.validate()
        batches = torch.utils.data.DataLoader(
            loader.TrainBatches(
                self.config,
                self.catalog,
                self.shards,
                self.rank,
                self.world_size,
                range(self.state["step"], self.num_steps),
                self.epoch_steps,
            ),
            batch_size=None,
            num_workers=self.config.train.workers,
            pin_memory=self.engine.device.type == "cuda",
        )
        batches = iter(batches)
        window = Window()
        while self.state["step"] < self.num_steps:
            self._step(batches, window)
            step = self.state["step"]
            if step % self.config.train.log_every == 0 or step == self.num_steps:
                self._report(window)
                window = Window()
            if step % self.epoch_steps == 0 or step == self.num_steps:
                self.validate()
                self.checkpoints.save(self.engine, self.state)
                window = Window()
                if 0 < self.config.train.patience <= self.state["stale_epochs"]:
                    self.progress(f"no better valid loss for {self.state['stale_epochs']} epochs: done")
                    return
            elif step % self.config.train.save_every == 0:
                self.checkpoints.save(self.engine, self.state)

    def _step(self, batches, window: "Window") -> None:
        step = self.state["step"]
        # Dropout follows from (seed, step, rank), so that a resumed run draws what the unbroken one would.
        torch.manual_seed((self.config.seed * 1_000_003 + step) * 4099 + self.rank)
        lr = learning_rate(self.config, step, self.num_steps)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        for _ in range(self.engine.gradient_accumulation_steps()):
            begin = time.monotonic()
            batch = loader.to_device(next(batches), self.engine.device)
            window.loader_seconds += time.monotonic() - begin
            losses = self.engine(batch)
            self._agree(step, losses["loss"], batch["shard"])
            self.engine.backward(losses["loss"])
            self.engine.step()
            window.add(losses)
        tables.step(self.engine.module, lr, self.config.train.clip)
        window.steps += 1
        self.state["step"] = step + 1

    def _agree(self, step: int, loss: torch.Tensor, shard: str) -> None:
        """All ranks stop together, before the weights change, when one of them must."""
        bad = not math.isfinite(loss.item())
        flags = torch.tensor([bad, self.stop_requested], dtype=torch.float32, device=loss.device)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        if bad:
            raise ValueError(
                f"the loss is {loss.item()} at step {step} on rank {self.rank}, shard {shard}; the weights are as "
                "before that step. A lower --train.lr or --train.clip is the usual remedy"
            )
        if flags[0]:
            raise ValueError(f"another rank met a loss that is not finite at step {step}")
        if flags[1]:
            self.checkpoints.save(self.engine, self.state)
            self.progress(f"stopped at step {step}; the same command goes on from there")
            raise KeyboardInterrupt

    def _report(self, window: "Window") -> None:
        means, step = window.means(), self.state["step"]
        rate = window.steps * self.config.train.global_batch / window.seconds()
        left = (self.num_steps - step) * window.seconds() / window.steps
        parts = "  ".join(f"{name} {value:.4f}" for name, value in means.items())
        self.progress(
            f"step {step}/{self.num_steps}  {parts}  {rate:.0f} samples/s  {left // 60:.0f}:{left % 60:02.0f} left"
        )
        norm = self.engine.get_global_grad_norm()
        self.run.metrics(
            {f"train/{name}": value for name, value in means.items()}
            | ({"train/grad_norm": float(norm)} if norm is not None else {})
            | {
                "train/lr": learning_rate(self.config, step - 1, self.num_steps),
                "train/samples_per_second": rate,
                "train/loader_share": window.loader_seconds / window.seconds(),
            },
            step,
        )

    @torch.no_grad()
    def validate(self) -> None:
        """L_rec over all valid targets; keeps the weights if it is the lowest so far."""
        self.engine.eval()
        total = torch.zeros(1 + self.catalog.gids.shape[1], dtype=torch.float64)
        batches = loader.eval_batches(
            self.config, self.catalog, self.corpus, "valid", self.config.eval.batch, self.rank, self.world_size
        )
        for batch in batches:
            likelihood = self.engine(loader.to_device(batch, self.engine.device))
            total[0] += len(likelihood)
            total[1:] -= likelihood.double().sum(0).cpu()
        self.engine.train()
        total = total.to(self.engine.device)
        dist.all_reduce(total)
        per_level = (total[1:] / total[0]).tolist()
        loss, step = sum(per_level) / len(per_level), self.state["step"]
        epoch = step / self.epoch_steps
        better = loss < self.state["best_loss"]
        if better:
            self.state |= {"best_loss": loss, "best_epoch": round(epoch, 2), "stale_epochs": 0}
            weights = distributed.full_weights(self.engine)
            if self.rank == 0:
                self.checkpoints.save_best(weights)
        else:
            self.state["stale_epochs"] += 1
        levels, chance = ", ".join(f"{value:.3f}" for value in per_level), math.log(self.config.gid.branching)
        self.progress(
            f"epoch {epoch:g}: valid loss {loss:.4f} (levels {levels}; by chance {chance:.3f})"
            + (", the best so far" if better else "")
        )
        self.run.metrics(
            {"valid/rec": loss} | {f"valid/rec_level_{t + 1}": value for t, value in enumerate(per_level)}, step
        )


class Window:
    """Sums between two lines of progress."""

    def __init__(self):
        self.start, self.steps, self.loader_seconds = time.monotonic(), 0, 0.0
        self._sums: torch.Tensor | None = None
        self._names: list[str] = []
        self._count = 0

    def add(self, losses: dict[str, torch.Tensor]) -> None:
        values = torch.stack([loss.detach().float() for loss in losses.values()])
        self._sums = values if self._sums is None else self._sums + values
        self._names, self._count = list(losses), self._count + 1

    def means(self) -> dict[str, float]:
        """Over the window and all ranks; collective."""
        dist.all_reduce(self._sums)
        values = (self._sums / self._count / dist.get_world_size()).tolist()
        return dict(zip(self._names, values, strict=True))

    def seconds(self) -> float:
        return time.monotonic() - self.start


def learning_rate(config: Config, step: int, num_steps: int) -> float:
    """Rises linearly over the share `train.warmup` of the steps, then falls linearly to 0."""
    warmup = max(1, round(config.train.warmup * num_steps))
    return config.train.lr * min((step + 1) / warmup, (num_steps - step) / max(1, num_steps - warmup))
