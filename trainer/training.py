"""The training loop: steps, progress, validation, and when to stop."""

import contextlib
import math
import resource
import signal
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist

from contract.artifacts import Artifact
from contract.cli import Preempted, Progress
from contract.settings import Config
from contract.tracking import Run
from trainer import engine_state, loader, packing, tables
from trainer.checkpoint import Checkpoints
from trainer.flops import peak_flops, step_flops
from trainer.inputs import Catalog
from trainer.model import ColaRec
from trainer.pretrained import merged
from trainer.validation import validate

# Signals by urgency: of those that reached different ranks, all ranks obey the last.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


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
        self.eval_every = config.train.eval_every or self.epoch_steps
        self.state = {
            "step": 0,
            "skipped": 0,  # steps of these that were not applied
            "validated": -1,  # the step of the last validation
            "best": {},  # what was measured at the best one
            "best_epoch": -1,
            "stale": 0,  # validations since then
            "seconds": 0.0,
        }
        self._last_losses = ""  # as last reported
        self._saved_step = 0  # of the last checkpoint; there is nothing to save of step 0
        self._begin, self._seconds_before = time.monotonic(), 0.0
        self._signal = 0  # index in SIGNALS + 1

    @contextlib.contextmanager
    def _heeding_signals(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._request_stop) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _request_stop(self, number: int, _) -> None:
        self._signal = max(self._signal, SIGNALS.index(number) + 1)

    def resume(self) -> None:
        """Goes on from the newest checkpoint that is whole (all ranks)."""
        self.state = self.checkpoints.load(self.engine, self.progress, tables.state(self.engine.module))
        self._saved_step, self._seconds_before = self.state["step"], self.state["seconds"]
        self.progress(f"goes on from step {self.state['step']}")
        whole = torch.tensor(self.rank > 0 or not self.state["best"] or self.checkpoints.best_is_whole())
        whole = whole.int().to(self.engine.device)
        dist.all_reduce(whole, dist.ReduceOp.MIN)
        if not whole:
            self.progress("the best weights so far are damaged: the next validation begins anew with the comparison")
            self.state |= {"best": {}, "validated": -1}  # in the end there must have been one

    def facts(self) -> dict[str, str]:
        """What the model card says of the training."""
        state = self.state
        samples = "histories" if self.config.history.attention == "causal" else "targets"
        return {
            "training": f"{state['step']} steps of {self.config.train.global_batch} {samples}, seed {self.config.seed}",
            "valid loss": f"{state['best']['rec']:.4f}",
            **{f"valid {name}": f"{state['best'][name]:.4f}" for name in ("recall@10", "ndcg@10")},
            "kept": f"the weights after epoch {state['best_epoch']:g}, the best by {self.config.train.best}",
        }

    def fit(self) -> None:
        """Trains to the end.

        Raises:
            KeyboardInterrupt: a signal asked to stop and a checkpoint was saved; `Preempted` if it was the scheduler's.
            ValueError: a loss or gradient is not finite, or a checkpoint cannot be written.
        """
        with self._heeding_signals():
            self._fit()

    def _fit(self) -> None:
        batches = iter(self.batches())
        window = Window(self.engine.device)
        while True:
            if self._validation_is_due():
                self._validate()
                self._save()
                window = Window(self.engine.device)
            if self._is_done():
                return
            self.step(batches, window)
            step = self.state["step"]
            if step % self.config.train.log_every == 0 or step == self.num_steps:
                self._report(window)
                window = Window(self.engine.device)
            if step % self.config.train.save_every == 0 and not self._validation_is_due():
                self._save()

    def batches(self) -> torch.utils.data.DataLoader:
        steps = range(self.state["step"], self.num_steps)
        data = loader.TrainBatches(
            self.config, self.catalog, self.shards, self.rank, self.world_size, steps, self.epoch_steps
        )
        pin = self.engine.device.type == "cuda"
        return torch.utils.data.DataLoader(
            data, batch_size=None, collate_fn=packing.pack, num_workers=self.config.train.workers, pin_memory=pin
        )

    def _is_done(self) -> bool:
        if 0 < self.config.train.patience <= self.state["stale"]:
            self.progress(f"no better valid {self.config.train.best} for {self.state['stale']} validations: done")
            return True
        return self.state["step"] >= self.num_steps

    def step(self, batches: Iterator[packing.Packed], window: "Window") -> None:
        step, seen = self.state["step"], []  # (losses, shard) of each micro-batch
        # Dropout follows from (seed, step, rank), so that a resumed run draws what the unbroken one would.
        torch.manual_seed((self.config.seed * 1_000_003 + step) * 4099 + self.rank)
        lr = learning_rate(self.config, step, self.num_steps)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        begin = time.monotonic()
        micros = packing.unpack(next(batches), self.engine.device)
        window.loader_seconds += time.monotonic() - begin
        num_passes = self._agree(len(micros))
        micros += [loader.filler(micros[0])] * (num_passes - len(micros))
        for number, batch in enumerate(micros, 1):
            self.engine.set_gradient_accumulation_boundary(number == num_passes)
            losses = self.engine(batch)
            self.engine.backward(_spoilt_unless_finite(losses["loss"]), scale_wrt_gas=False)
            window.count(batch, step_flops(self.engine.module.config, batch["lengths"]))
            seen.append(({name: loss.detach() for name, loss in losses.items()}, batch["shard"]))
        self.engine.step()
        window.steps += 1
        window.grad_norm = float(self.engine.get_global_grad_norm())
        applied = math.isfinite(window.grad_norm)
        tables.step(self.engine.module, lr, self.config.train.clip, apply=applied)
        if applied:
            window.add([losses for losses, _ in seen])
            if self.config.train.ema:
                engine_state.update_ema(self.engine, self.config.train.ema)
        else:
            self._skip_or_stop(step, window.grad_norm, [(losses["loss"], shard) for losses, shard in seen])
        self.state["step"] = step + 1
        self.progress.status(self._status(window))

    def _agree(self, num_passes: int = 0) -> int:
        """The most passes that a rank needs for a step: all make as many, as gradients are reduced within them. Leaves
        when a signal has reached any rank since the ranks last agreed, before that step (all ranks)."""
        agreed = torch.tensor([num_passes, self._signal], device=self.engine.device)
        dist.all_reduce(agreed, dist.ReduceOp.MAX)
        num_passes, asked = agreed.tolist()
        if asked:
            self._stop(SIGNALS[asked - 1])
        return num_passes

    def _stop(self, number: signal.Signals) -> None:
        step = self.state["step"]
        if step != self._saved_step:
            self._save()
        self.progress(f"{number.name}: stopped at step {step}; the same command goes on from there")
        raise KeyboardInterrupt if number == signal.SIGINT else Preempted

    def _skip_or_stop(self, step: int, grad_norm: float, seen: list[tuple[torch.Tensor, str]]) -> None:
        """The engine did not apply the step, as its gradient is not finite; a loss on some rank may be the reason."""
        bad = [(loss.item(), shard) for loss, shard in seen if not loss.isfinite()]
        culprit = torch.tensor(self.rank if bad else self.world_size, device=self.engine.device)
        dist.all_reduce(culprit, dist.ReduceOp.MIN)
        if bad:
            what = f"the loss is {bad[0][0]} at step {step} on rank {self.rank}, shard {bad[0][1]}"
        elif culprit < self.world_size:
            what = f"the loss is not finite at step {step} on rank {int(culprit)}, which names the shard"
        else:
            shards = ", ".join(shard for _, shard in seen)
            what = f"the gradient norm is {grad_norm} at step {step}, on rank {self.rank} from shard {shards}"
        self.state["skipped"] += 1
        if self.config.train.non_finite == "stop" or self.state["skipped"] > self.config.train.max_skipped:
            before = self.state["skipped"] - 1
            raise ValueError(
                f"{what}; the weights are as before that step"
                + (f", {before} steps were skipped before" if before else "")
                + ". A lower --train.lr or --train.clip is the usual remedy"
            )
        if self.rank == 0 or bad:
            self.progress.everywhere(f"skipped: {what}")
        self.run.metrics({"train/skipped": self.state["skipped"]}, step + 1)

    def _save(self) -> None:
        step = self.state["step"]
        if step:
            self.state["seconds"] = self.seconds()
            self.checkpoints.save(self.engine, self.state, tables.state(self.engine.module))
            self._saved_step = step

    def seconds(self) -> float:
        """Of training, in this process and those that it goes on from."""
        return self._seconds_before + time.monotonic() - self._begin

    def _report(self, window: "Window") -> None:
        means, step, seconds = window.means(), self.state["step"], window.seconds()
        peak = peak_flops(self.engine.device)
        losses = {name: value for name, value in means.items() if name in window.names}
        self._last_losses = "  ".join(f"{name} {value:.4f}" for name, value in losses.items())
        if not self.progress.on_terminal:
            self.progress(self._status(window))
        self.run.metrics(
            {f"train/{name}": value for name, value in losses.items()}
            | {
                "train/grad_norm": window.grad_norm,
                "train/lr": learning_rate(self.config, step - 1, self.num_steps),
                "train/samples_per_second": window.steps * self.config.train.global_batch / seconds,
                "train/tokens_per_second": means["tokens"] * self.world_size / seconds,
                "train/padding_share": 1 - means["tokens"] / means["positions"],
                "train/loader_share": means["loader_seconds"] / seconds,
                "train/memory_gb": self._peak_memory_gb(),
                **({"train/mfu": means["flops"] / seconds / peak} if peak else {}),
            },
            step,
        )

    def _status(self, window: "Window") -> str:
        """Step, last reported losses, rate and time left, as a line."""
        step, seconds = self.state["step"], window.seconds()
        rate, left = window.steps * self.config.train.global_batch / seconds, self.num_steps - step
        left = round(left * seconds / window.steps)
        skipped = f"  {self.state['skipped']} skipped" if self.state["skipped"] else ""
        return (
            f"step {step}/{self.num_steps}  {rate:.0f} samples/s  {left // 60}:{left % 60:02} left{skipped}  "
            f"{self._last_losses}"
        )

    def _peak_memory_gb(self) -> float:
        """The most that a rank has held at once, on its GPU or else of main memory (all ranks)."""
        device = self.engine.device
        on_gpu = device.type == "cuda"
        held = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        held = torch.tensor(held, device=device)
        dist.all_reduce(held, dist.ReduceOp.MAX)
        return held.item() / 1e9

    def _validation_is_due(self) -> bool:
        step = self.state["step"]
        at_step = step % self.eval_every == 0 or step >= self.num_steps
        return at_step and self.state["validated"] != step

    def _validate(self) -> None:
        """Measures the weights on the valid sample, and keeps them if they are the best so far (all ranks)."""
        begin, step = time.monotonic(), self.state["step"]
        with self._model_to_evaluate() as model:
            device = self.engine.device
            measured = validate(self.config, self.corpus, self.catalog, model, device, self._agree)
        best, epoch = self.state["best"], round(step / self.epoch_steps, 2)
        name, sign = ("ndcg@10", 1) if self.config.train.best == "ndcg" else ("rec", -1)
        better = not best or sign * measured[name] > sign * best[name]
        if better:
            self.state |= {"best": measured | {"step": step}, "best_epoch": epoch, "stale": 0}
            weights = engine_state.full_weights(self.engine, self._evaluated)
            weights = {name: weight.cpu().clone() for name, weight in weights if self.rank == 0}
            weights |= tables.whole(self.engine.module)
            self.checkpoints.save_best(weights, self.engine.device)
        else:
            self.state["stale"] += 1
        self.state["validated"] = step
        measured |= {"seconds": time.monotonic() - begin}
        self.progress(f"epoch {epoch:g}: {self._describe(measured)}" + (", the best so far" if better else ""))
        self.run.metrics({f"valid/{name}": value for name, value in measured.items()}, step)

    def _describe(self, measured: dict[str, float]) -> str:
        levels = ", ".join(f"{value:.3f}" for name, value in measured.items() if name.startswith("rec_level"))
        chance = f"by chance {math.log(self.config.gid.branching):.3f}" + (
            " or less at the last" if self.engine.module.config.leaves_are_items else ""
        )
        halves = ""
        if "hybrid" in measured:
            alone = (f"{half} {measured[f'{half}_ndcg@10']:.4f}" for half in ("generative", "dense"))
            halves = f" ({', '.join(alone)}; weights {measured['hybrid']:g} and {measured['neighbours']:g})"
        return (
            f"valid loss {measured['rec']:.4f} (levels {levels}; {chance}), recall@10 {measured['recall@10']:.4f}, "
            f"ndcg@10 {measured['ndcg@10']:.4f}{halves} of {measured['num_users']:.0f} users, "
            f"in {measured['seconds']:.1f} s"
        )

    @property
    def _evaluated(self) -> str:
        """The weights that are validated and kept."""
        return engine_state.EMA if self.config.train.ema else engine_state.WEIGHT

    @contextlib.contextmanager
    def _model_to_evaluate(self) -> Iterator[ColaRec]:
        """The engine's model in eval mode; a copy where that one is in parts, or where averages stand in its place."""
        model = self.engine.module
        if self.engine.zero_optimization_stage() == 3 or self.config.train.ema:
            weights = dict(engine_state.full_weights(self.engine, self._evaluated))
            with torch.device("meta"):
                copy = ColaRec(model.config)
            for name, table in tables.rowwise(model).items():
                copy.set_submodule(name, table)
            copy.load_state_dict(merged(weights), assign=True)
            model = copy
        model.eval()
        yield model
        self.engine.module.train()


class Window:
    """Sums between two lines of progress; the losses of a step are the sums of those of its micro-batches."""

    def __init__(self, device: torch.device):
        self.start, self.steps, self.loader_seconds = time.monotonic(), 0, 0.0
        self.names: list[str] = []  # of the losses; none before a step was applied
        self.grad_norm = math.nan  # of the last step
        self._sums = torch.zeros(0, device=device)
        self._applied = 0  # steps
        self._counts = torch.zeros(3, dtype=torch.float64)  # tokens, positions, FLOPs

    def add(self, micros: list[dict[str, torch.Tensor]]) -> None:
        """Adds the losses of the micro-batches of a step that was applied."""
        values = torch.stack([torch.stack([loss.float() for loss in losses.values()]) for losses in micros]).sum(0)
        self._sums = self._sums + values if self.names else values
        self.names, self._applied = list(micros[0]), self._applied + 1

    def count(self, micro: dict, flops: float) -> None:
        """Counts what a micro-batch took, see `loader.TrainBatches`."""
        self._counts += torch.tensor([micro["num_tokens"], micro["num_positions"], flops])

    def means(self) -> dict[str, float]:
        """Means over the ranks: of the losses, which are means over the steps; of tokens, positions, FLOPs and
        seconds spent waiting for the loader, which are sums over the window (all ranks)."""
        counts = torch.cat([self._counts, torch.tensor([self.loader_seconds])])
        values = torch.cat([self._sums.double() / max(1, self._applied), counts.to(self._sums.device)])
        dist.all_reduce(values)
        names = [*self.names, "tokens", "positions", "flops", "loader_seconds"]
        return dict(zip(names, (values / dist.get_world_size()).tolist(), strict=True))

    def seconds(self) -> float:
        return time.monotonic() - self.start


def learning_rate(config: Config, step: int, num_steps: int) -> float:
    """Rises linearly over the share `train.warmup` of the steps, then goes as `train.schedule` says."""
    warmup = max(1, round(config.train.warmup * num_steps))
    if step < warmup:
        share = (step + 1) / warmup
    else:
        left = (num_steps - step) / max(1, num_steps - warmup)
        falling = {"linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2, "constant": 1.0}
        share = falling[config.train.schedule]
    return config.train.lr * share


def _spoilt_unless_finite(loss: torch.Tensor) -> torch.Tensor:
    """The loss; if it is not finite, with a gradient that is not either, at which no rank's engine applies the step."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)
