"""Loss and learning rate of each training step: kept on the device, and written every few steps."""

import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch

from raytrain2p.models.gpus import gpu_of
from raytrain2p.tracking.metrics_file import MetricPoint
from raytrain2p.worker.callbacks.nonfinite import NonFinite
from raytrain2p.worker.channel import StepProgress


class Mean:
    """A running mean that a checkpoint can hold."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def add(self, value: float) -> None:
        self.total, self.count = self.total + value, self.count + 1

    def take(self) -> float:
        """The mean, or NaN of nothing; starts over."""
        value = self.total / self.count if self.count else float("nan")
        self.total, self.count = 0.0, 0
        return value


class StepLogger(pl.Callback):
    """Writes every step's loss and learning rate, several steps at a time, and checks that loss and gradient are finite.

    They stay on the device until then: reading one makes Python wait for the GPU.

    Args:
        every: steps between two writes.
        records_per_step: of all workers together.
        steps_per_epoch: gives the epoch of a step.
        mean: the mean over the workers; a collective, so called equally often on each.
        write: takes the points; None on every worker but the first.
        show: takes the latest numbers after each write; None likewise.
        nonfinite: is given every step, on every worker.
    """

    def __init__(
        self,
        every: int,
        records_per_step: int,
        steps_per_epoch: int,
        mean: Callable[[torch.Tensor], torch.Tensor],
        write: Callable[[Sequence[MetricPoint]], None] | None,
        show: Callable[[StepProgress], None] | None,
        nonfinite: NonFinite,
    ) -> None:
        self.every, self.records_per_step, self.steps_per_epoch = every, records_per_step, steps_per_epoch
        self.mean, self.write, self.show, self.nonfinite = mean, write, show, nonfinite
        self.losses: list[torch.Tensor] = []
        self.gradient_norms: list[torch.Tensor] = []
        self.steps: list[tuple[int, float, float]] = []  # number, learning rate, time
        self.passes: torch.Tensor | float = 0.0
        self.tokens, self.pass_tokens = list[int](), 0  # of this worker, by step, and of the passes of a step that is not over
        self.seen_step = -1
        self.since = 0.0
        self.of_epoch, self.since_checkpoint = Mean(), Mean()

    def state_dict(self) -> dict[str, list[float]]:
        return {name: [mean.total, mean.count] for name, mean in self._means().items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, mean in self._means().items():
            mean.total, mean.count = state_dict[name]

    def _means(self) -> dict[str, Mean]:
        return {"epoch": self.of_epoch, "judged": self.since_checkpoint}  # names in checkpoints

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seen_step, self.since = trainer.global_step, time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.passes = self.passes + pl_module.pass_loss
        self.pass_tokens += pl_module.pass_tokens
        if trainer.global_step == self.seen_step:
            return  # not the last pass of its step
        self.seen_step = trainer.global_step
        assert isinstance(self.passes, torch.Tensor)
        self.losses.append(self.passes)
        self.gradient_norms.append(pl_module.gradient_norm)
        group = trainer.optimizers[0].param_groups[0]
        self.steps.append((self.seen_step, group["lr"] / group.get("rate_factor", 1.0), time.time()))
        self.tokens.append(self.pass_tokens)
        self.passes, self.pass_tokens = 0.0, 0
        if self.seen_step % self.every == 0:
            self.flush(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.flush(trainer)
        if self.of_epoch.count and self.write is not None:
            self.write([MetricPoint("train_loss_epoch", self.of_epoch.total / self.of_epoch.count, trainer.global_step, time.time())])
        self.of_epoch.take()

    @contextmanager
    def clock_stopped(self) -> Iterator[None]:
        """The time within does not count in the speed of training."""
        since = time.perf_counter()
        yield
        self.since += time.perf_counter() - since

    def flush(self, trainer: pl.Trainer) -> None:
        """Write what has been kept.

        Raises:
            DivergedError: too many steps in a row were not finite.
        """
        if not self.losses:
            return
        here = torch.stack(self.losses)
        means = self.mean(torch.stack([here, torch.tensor(self.tokens).to(here)]))
        losses, tokens, norms = torch.stack([*means, torch.stack(self.gradient_norms).to(means)]).tolist()
        now = time.perf_counter()
        seconds_per_step = (now - self.since) / len(losses)
        speed = self.records_per_step / seconds_per_step
        if self.write is not None:
            speeds = {"samples_per_second": speed}
            if any(tokens):
                speeds |= self._token_speeds(sum(tokens) * trainer.world_size, len(losses), now - self.since, trainer)
            self.write(self._points(losses, speeds | {"peak_memory_megabytes": peak_megabytes(trainer.strategy.root_device)}))
        for (number, *_), loss, norm in zip(self.steps, losses, norms, strict=True):
            if self.nonfinite.check(number, loss, norm):  # a step that is left out does not hide the others' mean
                self.of_epoch.add(loss)
                self.since_checkpoint.add(loss)
        if self.show is not None:
            step = self.steps[-1][0]
            left = (trainer.max_steps - step) * seconds_per_step
            self.show(StepProgress(self._epoch(step), step, trainer.max_steps, losses[-1], speed, left))
        self.losses, self.gradient_norms, self.steps, self.tokens, self.since = [], [], [], [], now

    def _token_speeds(self, tokens: float, steps: int, seconds: float, trainer: pl.Trainer) -> dict[str, float]:
        """And, on a GPU whose peak is known, the model FLOPs utilization.

        Args:
            tokens: of these steps, over all workers.
        """
        speeds, peak = {"tokens_per_second": tokens / seconds}, peak_flops(trainer.strategy.root_device)
        if peak is not None and (needed := trainer.lightning_module.flops_per_token(tokens / steps / self.records_per_step)) is not None:
            speeds["mfu"] = needed * tokens / seconds / trainer.world_size / peak
        return speeds

    def _points(self, losses: list[float], speeds: dict[str, float]) -> list[MetricPoint]:
        points = []
        for loss, (step, rate, at) in zip(losses, self.steps, strict=True):
            values = {"train_loss": loss, "learning_rate": rate, "epoch": float(self._epoch(step))}
            points += [MetricPoint(name, value, step, at) for name, value in values.items()]
        step, _, at = self.steps[-1]
        return [*points, *(MetricPoint(name, value, step, at) for name, value in speeds.items())]

    def _epoch(self, step: int) -> int:
        return (step - 1) // self.steps_per_epoch


def peak_flops(device: torch.device) -> float | None:
    """Of a GPU in bfloat16, a second."""
    gpu = gpu_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return gpu.flops if gpu else None


def peak_megabytes(device: torch.device) -> float:
    """The most memory that was in use at once so far: of a GPU what PyTorch's tensors took, or else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
