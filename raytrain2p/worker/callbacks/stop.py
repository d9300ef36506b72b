"""A request to stop, as the workers hear it: all of them stop between the same two steps, and a checkpoint is kept."""

import threading
from typing import Any

import pytorch_lightning as pl
import ray
import torch
from pytorch_lightning.utilities.exceptions import SIGTERMException

from raytrain2p.worker.callbacks.checkpoint import ends_epoch


class StopOnRequest(pl.Callback):
    """Ends training with a SIGTERMException at the first step after the request; if that step ends an epoch, once the epoch has
    been ended: this callback must come after those that note and save it. At the run's last step there is nothing to stop.

    Args:
        channel: where the driver leaves the request; None on every worker but the first.
    """

    def __init__(self, channel: Any) -> None:
        self.channel, self.requested = channel, threading.Event()
        self.seen_step = -1
        if channel is not None:
            threading.Thread(target=self._wait, name="stop-request", daemon=True).start()

    def _wait(self) -> None:
        try:
            ray.get(self.channel.wait_for_stop.remote())
        except ray.exceptions.RayError:
            return  # the driver is gone, and Ray ends this worker
        self.requested.set()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seen_step = trainer.global_step

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.channel is not None:
            self.channel.stop_listening.remote()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        stepped = trainer.global_step != self.seen_step
        self.seen_step = trainer.global_step
        if stepped and not ends_epoch(trainer) and self._agreed(trainer):
            raise SIGTERMException

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step < trainer.max_steps and self._agreed(trainer):
            raise SIGTERMException

    def _agreed(self, trainer: pl.Trainer) -> bool:
        """What rank 0 knows, on every worker: one that raised alone would leave the others waiting for it.

        Costs what Lightning's own question before each pass costs, which cannot be used: in it, rank 0 raises first.
        """
        if trainer.world_size == 1:
            return self.requested.is_set()
        flag = torch.tensor([int(self.requested.is_set())], device=trainer.strategy.root_device)
        torch.distributed.broadcast(flag, src=0)
        return bool(flag.item())
