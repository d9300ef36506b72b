"""Metric points: on disk first (metrics.jsonl), then to MLflow in batches."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from mlflow.entities import Metric

from raytrain2p.tracking.run import Run

POINTS_PER_BATCH = 1000  # MLflow's limit for one request


@dataclass(frozen=True)
class Point:
    """One value of one metric at one step."""

    name: str
    value: float
    step: int
    time: float


class MetricsWriter:
    """Appends points to a run's metrics.jsonl and sends them to MLflow."""

    def __init__(self, run: Run) -> None:
        self.run, self.client, self.path = run, run.client, run.path / "metrics.jsonl"
        if self.path.is_file() and not self.path.read_bytes().endswith(b"\n"):
            with self.path.open("a") as stream:  # a kill has torn the last line: what follows must not be glued to it
                stream.write("\n")

    def write(self, points: Sequence[Point]) -> None:
        lines = [json.dumps({"step": p.step, "name": p.name, "value": p.value, "time": round(p.time, 3)}) + "\n" for p in points]
        with self.path.open("a") as stream:
            stream.writelines(lines)
        for start in range(0, len(points), POINTS_PER_BATCH):
            batch = points[start : start + POINTS_PER_BATCH]
            self.client.log_batch(self.run.run_id, metrics=[Metric(p.name, p.value, round(p.time * 1000), p.step) for p in batch])


class StepLog(pl.Callback):
    """Keeps every step's loss and learning rate, and hands them on every few steps.

    Losses stay on the device until then: reading one forces a GPU to catch up with Python.

    Args:
        every: steps between two hand-overs.
        records_per_step: of all workers together.
        mean: the mean over the workers; a collective, so called equally often on each.
        write: takes the points; None on every worker but the first.
        show: called with the latest numbers after each hand-over; likewise.
    """

    def __init__(
        self,
        every: int,
        records_per_step: int,
        mean: Callable[[torch.Tensor], torch.Tensor],
        write: Callable[[Sequence[Point]], None] | None,
        show: Callable[[dict[str, Any]], None] | None,
    ) -> None:
        self.every, self.records_per_step, self.mean, self.write, self.show = every, records_per_step, mean, write, show
        self.losses: list[torch.Tensor] = []
        self.steps: list[tuple[int, float, int, float]] = []
        self.passes: torch.Tensor | float = 0.0
        self.seen = -1
        self.since = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seen, self.since = trainer.global_step, time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.passes = self.passes + pl_module.pass_loss
        if trainer.global_step == self.seen:
            return  # not the last pass of its step
        self.seen = trainer.global_step
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        assert isinstance(self.passes, torch.Tensor)
        self.losses.append(self.passes)
        self.steps.append((self.seen, rate, trainer.current_epoch, time.time()))
        self.passes = 0.0
        if len(self.losses) >= self.every:
            self.hand_over(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.hand_over(trainer)
        metrics = trainer.callback_metrics
        names = {"train_loss": "train_loss_epoch"}
        now = time.time()
        points = [Point(names.get(name, name), float(value), trainer.global_step, now) for name, value in metrics.items()]
        if self.write is not None:
            self.write(points)

    def hand_over(self, trainer: pl.Trainer) -> None:
        """Write what has been kept."""
        if not self.losses:
            return
        values = self.mean(torch.stack(self.losses)).tolist()
        now = time.perf_counter()
        speed = len(values) * self.records_per_step / (now - self.since)
        points = []
        for value, (step, rate, epoch, at) in zip(values, self.steps, strict=True):
            points += [Point("train_loss", value, step, at), Point("learning_rate", rate, step, at), Point("epoch", float(epoch), step, at)]
        points.append(Point("samples_per_second", speed, self.steps[-1][0], self.steps[-1][3]))
        if self.write is not None:
            self.write(points)
        if self.show is not None:
            step, _, epoch, _ = self.steps[-1]
            left = (trainer.estimated_stepping_batches - step) * (now - self.since) / len(values)
            self.show({"epoch": epoch, "step": step, "loss": values[-1], "samples_per_second": speed, "seconds_left": left})
        self.losses, self.steps, self.since = [], [], now
