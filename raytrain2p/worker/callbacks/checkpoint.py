"""Lightning's part in the two checkpoints, really the best and really the latest, written while training goes on."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities.exceptions import SIGTERMException

from raytrain2p.tracking.checkpoints import LAST, CheckpointScore, settle


class BestAndLastCheckpoints(pl.Callback):
    """Saves every few steps, at each epoch's end and at the end of training; keeps the latest and the best.

    Which one is the best is part of the checkpoint itself, so that a run that goes on, from whatever it found, knows it.

    Args:
        directory: of the checkpoints.
        monitor: name of the metric.
        mode: `min` or `max`.
        every_steps: steps between two saves within an epoch; None saves at epochs' ends alone.
        best_of: `epochs`, or `saves`: which checkpoints compete for the best.
        steps_per_epoch: to tell the epoch of a step.
        measure: the metrics at this moment, as on every worker: called when a checkpoint competes.
        before_save: called before anything is saved, so that metrics never lag behind a checkpoint.
        judged: told each score, on every worker.
        saved: told it again once its checkpoint is on disk; waits for that. None: nobody waits.
    """

    def __init__(
        self,
        directory: Path,
        monitor: str,
        mode: str,
        every_steps: int | None,
        best_of: str,
        steps_per_epoch: int,
        measure: Callable[[pl.Trainer, Any], dict[str, float]],
        before_save: Callable[[pl.Trainer], None],
        judged: Callable[[dict[str, float], CheckpointScore], None] | None = None,
        saved: Callable[[dict[str, float], CheckpointScore], None] | None = None,
    ) -> None:
        self.directory, self.monitor, self.sign = directory, monitor, 1 if mode == "min" else -1
        self.every_steps, self.best_of, self.steps_per_epoch = every_steps, best_of, steps_per_epoch
        self.measure, self.before_save, self.judged, self.saved = measure, before_save, judged, saved
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
        step = trainer.global_step
        if step == self.seen_step:
            return  # not the last pass of its step
        self.seen_step = step
        due = self.every_steps is not None and step % self.every_steps == 0
        if due and not ends_epoch(trainer):
            self.save(trainer, pl_module, competes=self.best_of == "saves")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.saved_step != trainer.global_step:
            self.save(trainer, pl_module, competes=True)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """A request to stop comes between two steps, on all workers alike: keep what has been done."""
        if isinstance(exception, SIGTERMException) and self.saved_step != trainer.global_step:
            self.save(trainer, pl_module, competes=False)

    def save(self, trainer: pl.Trainer, pl_module: Any, competes: bool) -> None:
        """Write the latest; it is the best as well, if it competes and wins. A metric that is missing or NaN never wins."""
        self.before_save(trainer)
        name, score = None, None
        if competes:
            metrics, step = self.measure(trainer, pl_module), trainer.global_step
            score = CheckpointScore((step - 1) // self.steps_per_epoch, step, self.monitor, metrics.get(self.monitor, math.nan))
            if self._wins(score.value):
                name = score.file_name()
                self.best = {"file": name, "value": score.value, "step": score.step}
            if self.judged is not None:
                self.judged(metrics, score)
        self.saved_step = trainer.global_step
        trainer.save_checkpoint(self.directory / LAST, storage_options=name)
        if self.saved is not None and score is not None:
            trainer.strategy.checkpoint_io.wait()
            self.saved(metrics, score)

    def _wins(self, value: float) -> bool:
        if not math.isfinite(value):
            return False
        return self.best is None or self.sign * value < self.sign * self.best["value"]


def ends_epoch(trainer: pl.Trainer) -> bool:
    """Whether the pass that has just ended was the epoch's or the run's last: its end follows, and saves."""
    return trainer.fit_loop.epoch_loop.batch_progress.is_last_batch or trainer.global_step >= trainer.max_steps > 0
