"""A request to stop or to start again: all workers end between the same two steps, and a checkpoint is saved."""

import threading
import time
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import ray
from pytorch_lightning.utilities.exceptions import SIGTERMException

from raytrain2p.models.distributed import NumberOfFirst, WorkerGroup
from raytrain2p.worker.callbacks.checkpoint import ends_epoch
from raytrain2p.worker.channel import RunChannel

# What rank 0 sends to the others after each step, which is read after the next one
CONTINUE, STOP, REGROUP, CHECK = range(4)
# Ray's own answer to whether a node is taken away is a call to an actor by every worker: 1 to 2 ms, so not at each step.
SECONDS_BETWEEN_CHECKS = 2.0


class Regroup(SIGTERMException):
    """The workers are to start again. `preempted`: because a node is taken away."""

    def __init__(self, preempted: bool) -> None:
        super().__init__()
        self.preempted = preempted


class StopOnRequest(pl.Callback):
    """Ends training with a SIGTERMException at the first step after the request (with several workers, at the second), or, if that step
    ends an epoch, after the epoch's end: this callback must come after those that log and save it. At the run's last step there is
    nothing to stop. With Regroup, if the group is to start again.

    Args:
        channel: brings requests; None on every worker but the first.
        group: the workers, which stop together.
        preempted: whether a node of the group is taken away; a collective.
    """

    def __init__(self, channel: RunChannel | None, group: WorkerGroup, preempted: Callable[[], bool] | None = None) -> None:
        self.channel, self.preempted = channel, preempted
        self.of_first = NumberOfFirst(group)
        self.requested, self.regroup = threading.Event(), threading.Event()
        self.seen_step, self.checked = -1, time.monotonic()
        if channel is not None:
            threading.Thread(target=self._wait, args=(channel,), name="requests", daemon=True).start()

    def _wait(self, channel: RunChannel) -> None:
        try:
            (self.requested if channel.next_request() else self.regroup).set()  # one: the next group has the next one
        except ray.exceptions.RayError:
            return  # the driver is gone, and Ray ends this worker

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seen_step = trainer.global_step

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.channel is not None:
            self.channel.end_of_training()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        stepped = trainer.global_step != self.seen_step
        self.seen_step = trainer.global_step
        if stepped and not ends_epoch(trainer):
            self._end_if_requested(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step < trainer.max_steps:
            self._end_if_requested(trainer)

    def _end_if_requested(self, trainer: pl.Trainer) -> None:
        """Raise what rank 0 was asked for, on every worker: one that raised alone would leave the others waiting for it."""
        asked = self.of_first.exchange(self._asked())
        if asked == STOP:
            raise SIGTERMException
        preempted = asked == CHECK and self.preempted is not None and self.preempted()
        if asked == REGROUP or preempted:
            if self.channel is not None:
                self.channel.end_of_training()
                if preempted:
                    self.channel.say(f"a node is taken away: the workers start again elsewhere, from step {trainer.global_step}")
            raise Regroup(preempted)

    def _asked(self) -> int:
        if self.requested.is_set():
            return STOP
        if self.regroup.is_set():
            return REGROUP
        if time.monotonic() - self.checked < SECONDS_BETWEEN_CHECKS:
            return CONTINUE
        self.checked = time.monotonic()
        return CHECK
