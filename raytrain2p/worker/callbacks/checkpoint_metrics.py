"""What is measured when a checkpoint competes for the best."""

from collections.abc import Iterable
from typing import Any

import pytorch_lightning as pl

from raytrain2p.phases.base import Batch, PhaseModule
from raytrain2p.tracking.run_writer import RunWriter
from raytrain2p.worker.callbacks.step_logger import StepLogger
from raytrain2p.worker.job import OBJECTIVE


class CheckpointMetrics:
    """Measures and writes metrics at a checkpoint; its time is not part of the speed of training.

    Args:
        log: has the training losses.
        val_loader: None measures no validation loss.
        objective: metric that a sweep compares; None outside of one.
        writer: None on every worker but the first.
    """

    def __init__(self, log: StepLogger, val_loader: Iterable[Batch] | None, objective: str | None, writer: RunWriter | None) -> None:
        self.log, self.val_loader, self.objective, self.writer = log, val_loader, objective, writer

    def flush(self, trainer: pl.Trainer) -> None:
        """Write the losses so far: metrics on disk must never lag behind a checkpoint. And no checkpoint is not finite.

        Raises:
            DivergedError: too many steps were not finite, or the weights are not.
        """
        self.log.flush(trainer)
        module: Any = trainer.lightning_module
        self.log.nonfinite.check_weights(trainer.global_step, module.weights_norm())

    def measure(self, trainer: pl.Trainer, module: PhaseModule) -> dict[str, float]:
        """The mean training loss since the last call, the validation loss, and the objective; alike on every worker."""
        metrics = {"train_loss": self.log.since_checkpoint.take()}
        if self.val_loader is not None:
            with self.log.clock_stopped():
                metrics["val/loss"] = module.validate(self.val_loader)
        if self.objective is not None:
            metrics[OBJECTIVE] = metrics[self.objective]
        if self.writer is not None:  # the training loss is written step by step
            self.writer.write_metrics({name: value for name, value in metrics.items() if name != "train_loss"}, trainer.global_step)
        return metrics
