"""What each training step did: kept on the device, and noted every few steps."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import pytorch_lightning as pl
import torch

from raytrain2p.tracking.metrics_file import MetricPoint


class Mean:
    """A running mean that a checkpoint can hold."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def add(self, value: float) -> None:
        self.total, self.count = self.total + value, self.count + 1

    def take(self) -> float:
        """The mean, or NaN of nothing; begins anew."""
        value = self.total / self.count if self.count else float("nan")
        self.total, self.count = 0.0, 0
        return value


class StepLogger(pl.Callback):
    """Keeps every step's loss and learning rate, and hands them on every few steps.

    Losses stay on the device until then: reading one forces a GPU to catch up with Python.

    Args:
        every: steps between two hand-overs.
        records_per_step: of all workers together.
        steps_per_epoch: to tell the epoch of a step.
        mean: the mean over the workers; a collective, so called equally often on each.
        write: takes the points; None on every worker but the first.
        show: called with the latest numbers after each hand-over; likewise.
    """

    def __init__(
        self,
        every: int,
        records_per_step: int,
        steps_per_epoch: int,
        mean: Callable[[torch.Tensor], torch.Tensor],
        write: Callable[[Sequence[MetricPoint]], None] | None,
        show: Callable[[dict[str, Any]], None] | None,
    ) -> None:
        self.every, self.records_per_step, self.steps_per_epoch = every, records_per_step, steps_per_epoch
        self.mean, self.write, self.show = mean, write, show
        self.losses: list[torch.Tensor] = []
        self.steps: list[tuple[int, float, float]] = []
        self.passes: torch.Tensor | float = 0.0
        self.seen = -1
        self.since = 0.0
        self.of_epoch, self.since_scored = Mean(), Mean()

    def state_dict(self) -> dict[str, Any]:
        return {name: [mean.total, mean.count] for name, mean in (("epoch", self.of_epoch), ("judged", self.since_scored))}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.of_epoch.total, self.of_epoch.count = state_dict["epoch"]
        self.since_scored.total, self.since_scored.count = state_dict["judged"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seen, self.since = trainer.global_step, time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.passes = self.passes + pl_module.pass_loss
        if trainer.global_step == self.seen:
            return  # not the last pass of its step
        self.seen = trainer.global_step
        assert isinstance(self.passes, torch.Tensor)
        self.losses.append(self.passes)
        self.steps.append((self.seen, trainer.optimizers[0].param_groups[0]["lr"], time.time()))
        self.passes = 0.0
        if self.seen % self.every == 0:
            self.hand_over(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.hand_over(trainer)
        if self.of_epoch.count and self.write is not None:
            self.write([MetricPoint("train_loss_epoch", self.of_epoch.total / self.of_epoch.count, trainer.global_step, time.time())])
        self.of_epoch.take()

    def hand_over(self, trainer: pl.Trainer) -> None:
        """Write what has been kept."""
        if not self.losses:
            return
        values = self.mean(torch.stack(self.losses)).tolist()
        now = time.perf_counter()
        speed = len(values) * self.records_per_step / (now - self.since)
        points = []
        for value, (step, rate, at) in zip(values, self.steps, strict=True):
            self.of_epoch.add(value)
            self.since_scored.add(value)
            epoch = float((step - 1) // self.steps_per_epoch)
            points += [
                MetricPoint("train_loss", value, step, at),
                MetricPoint("learning_rate", rate, step, at),
                MetricPoint("epoch", epoch, step, at),
            ]
        step, _, at = self.steps[-1]
        points.append(MetricPoint("samples_per_second", speed, step, at))
        if self.write is not None:
            self.write(points)
        if self.show is not None:
            left = (trainer.max_steps - step) * (now - self.since) / len(values)
            epoch = (step - 1) // self.steps_per_epoch
            self.show({"epoch": epoch, "step": step, "loss": values[-1], "samples_per_second": speed, "seconds_left": left})
        self.losses, self.steps, self.since = [], [], now
