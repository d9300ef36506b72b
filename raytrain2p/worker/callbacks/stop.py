"""A request to stop: all workers stop between the same two steps, and a checkpoint is saved."""

import threading
from typing import Any

import pytorch_lightning as pl
import ray
from pytorch_lightning.utilities.exceptions import SIGTERMException

from raytrain2p.models.distributed import WorkerGroup
from raytrain2p.worker.callbacks.checkpoint import ends_epoch
from raytrain2p.worker.channel import RunChannel


class StopOnRequest(pl.Callback):
    """Ends training with a SIGTERMException at the first step after the request, or, if that step ends an epoch, after the
    epoch's end: this callback must come after those that log and save it. At the run's last step there is nothing to stop.

    Args:
        channel: brings the driver's request; None on every worker but the first.
        group: the workers, which stop together.
    """

    def __init__(self, channel: RunChannel | None, group: WorkerGroup) -> None:
        self.channel, self.group, self.requested = channel, group, threading.Event()
        self.seen_step = -1
        if channel is not None:
            threading.Thread(target=self._wait, args=(channel,), name="stop-request", daemon=True).start()

    def _wait(self, channel: RunChannel) -> None:
        try:
            channel.wait_for_stop()
        except ray.exceptions.RayError:
            return  # the driver is gone, and Ray ends this worker
        self.requested.set()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seen_step = trainer.global_step

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.channel is not None:
            self.channel.end_of_training()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        stepped = trainer.global_step != self.seen_step
        self.seen_step = trainer.global_step
        if stepped and not ends_epoch(trainer) and self._agreed(trainer):
            raise SIGTERMException

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step < trainer.max_steps and self._agreed(trainer):
            raise SIGTERMException

    def _agreed(self, trainer: pl.Trainer) -> bool:
        """Whether rank 0 has the request, on every worker: one that raised alone would leave the others waiting for it.

        Costs what Lightning's own check before each pass costs, which cannot be used: in it, rank 0 raises first.
        """
        return self.group.flag_of_first(self.requested.is_set(), trainer.strategy.root_device)
