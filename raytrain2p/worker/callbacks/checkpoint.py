"""When checkpoints are saved, and which one is the best."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import pytorch_lightning as pl
from pytorch_lightning.utilities.exceptions import SIGTERMException

from raytrain2p.config.settings import CheckpointSettings
from raytrain2p.tracking.checkpoints import LAST, CheckpointScore, settle

ScoreListener = Callable[[dict[str, float], CheckpointScore], None]


class Metrics(Protocol):
    """What BestAndLastCheckpoints needs of CheckpointMetrics."""

    def flush(self, trainer: pl.Trainer) -> None: ...

    def measure(self, trainer: pl.Trainer, module: Any) -> dict[str, float]: ...


class BestAndLastCheckpoints(pl.Callback):
    """Saves every few steps, at each epoch's end and at the end of training; keeps the latest and the best.

    Which one is the best is part of the checkpoint itself, so that a run resumed from any checkpoint has it.

    Args:
        directory: of the checkpoints.
        settings: how often to save, and which metric decides.
        steps_per_epoch: gives the epoch of a step.
        metrics: flushed before every save; measured, on every worker alike, when a checkpoint competes.
        scored: called with each competing checkpoint's metrics before it is saved.
        saved: called with the same once the checkpoint is on disk; training waits for that.
    """

    def __init__(
        self,
        directory: Path,
        settings: CheckpointSettings,
        steps_per_epoch: int,
        metrics: Metrics,
        scored: ScoreListener | None = None,
        saved: ScoreListener | None = None,
    ) -> None:
        self.directory, self.settings, self.steps_per_epoch = directory, settings, steps_per_epoch
        self.metrics, self.scored, self.saved = metrics, scored, saved
        self.best: dict[str, Any] | None = None
        self.saved_step = -1
        self.seen_step = -1

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.saved_step = self.seen_step = trainer.global_step
        if trainer.is_global_zero and self.best is not None and trainer.global_step:
            settle(self.directory, self.best["file"], trainer.global_step == self.best["step"])

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step, every = trainer.global_step, self.settings.every_steps
        if step == self.seen_step:
            return  # not the last pass of its step
        self.seen_step = step
        if every is not None and step % every == 0 and not ends_epoch(trainer):
            self.save(trainer, pl_module, competes=self.settings.best_of == "saves")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.saved_step != trainer.global_step:
            self.save(trainer, pl_module, competes=True)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """A request to stop comes between two steps, on all workers alike: what has been done is saved."""
        if isinstance(exception, SIGTERMException) and self.saved_step != trainer.global_step:
            self.save(trainer, pl_module, competes=False)

    def save(self, trainer: pl.Trainer, pl_module: pl.LightningModule, competes: bool) -> None:
        """Write the latest checkpoint; it is also the best if it competes and has the best metric so far."""
        self.metrics.flush(trainer)
        metrics, score = self._measured(trainer, pl_module) if competes else ({}, None)
        name = None
        if score is not None:
            if self._is_best(score.value):
                name = score.file_name()
                self.best = {"file": name, "value": score.value, "step": score.step}
            if self.scored is not None:
                self.scored(metrics, score)
        self.saved_step = trainer.global_step
        trainer.save_checkpoint(self.directory / LAST, storage_options=name)
        if self.saved is not None and score is not None:
            trainer.strategy.checkpoint_io.wait()
            self.saved(metrics, score)

    def _measured(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> tuple[dict[str, float], CheckpointScore]:
        metrics, step, monitor = self.metrics.measure(trainer, pl_module), trainer.global_step, self.settings.monitor
        return metrics, CheckpointScore((step - 1) // self.steps_per_epoch, step, monitor, metrics.get(monitor, math.nan))

    def _is_best(self, value: float) -> bool:
        """A metric that is missing or NaN never is."""
        if not math.isfinite(value) or self.best is None:
            return math.isfinite(value)
        return value < self.best["value"] if self.settings.mode == "min" else value > self.best["value"]


def ends_epoch(trainer: pl.Trainer) -> bool:
    """Whether the last pass was the epoch's or the run's last: the hook at the epoch's end follows, and saves."""
    return trainer.fit_loop.epoch_loop.batch_progress.is_last_batch or trainer.global_step >= trainer.max_steps > 0
