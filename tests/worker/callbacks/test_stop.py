"""A request to stop ends a real Lightning trainer after the step that is under way, with a checkpoint of it."""

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.exceptions import SIGTERMException
from torch.utils.data import DataLoader, TensorDataset

from raytrain2p.config.settings import CheckpointSettings
from raytrain2p.models.distributed import WorkerGroup
from raytrain2p.tracking.checkpoints import LAST
from raytrain2p.worker.callbacks.checkpoint import BestAndLastCheckpoints
from raytrain2p.worker.callbacks.stop import StopOnRequest
from tests.training import ScriptedMetrics, trainer_in
from tests.worker.callbacks.test_checkpoint import Scripted

STEPS = 6


class Asking(pl.Callback):
    """Asks for a stop while a step is under way."""

    def __init__(self, request: StopOnRequest, step: int) -> None:
        self.request, self.step = request, step

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step + 1 == self.step:
            self.request.requested.set()


def stopped_at(folder: Path, steps_per_epoch: int, asked_in_step: int) -> int:
    """Train `STEPS` steps, with a request in one of them; the step of the checkpoint that is left."""
    stop = StopOnRequest(None, WorkerGroup())
    metrics = ScriptedMetrics({"train_loss": 1.0})
    checkpoints = BestAndLastCheckpoints(folder, CheckpointSettings(every_steps=None), steps_per_epoch, metrics)
    trainer = trainer_in(folder, [checkpoints, stop, Asking(stop, asked_in_step)], max_steps=STEPS, max_epochs=-1)
    try:
        trainer.fit(Scripted(), DataLoader(TensorDataset(torch.zeros(steps_per_epoch, 1))))
    except SIGTERMException:
        trainer.strategy.checkpoint_io.wait()
        assert trainer.global_step == asked_in_step, "it continued"
    else:
        assert trainer.global_step == STEPS
    checkpoint = torch.load(folder / LAST, weights_only=True)
    assert checkpoint["state_dict"]["weight"].item() == -checkpoint["global_step"], "of another step than its own"
    return int(checkpoint["global_step"])


@pytest.mark.parametrize("asked_in_step", [1, 2, 4, 5])
@pytest.mark.parametrize("steps_per_epoch", [1, 2, 4])
def test_training_stops_after_the_step_in_which_it_is_asked_to(tmp_path: Path, steps_per_epoch: int, asked_in_step: int) -> None:
    assert stopped_at(tmp_path, steps_per_epoch, asked_in_step) == asked_in_step


def test_a_request_in_the_last_step_stops_nothing(tmp_path: Path) -> None:
    assert stopped_at(tmp_path, steps_per_epoch=2, asked_in_step=STEPS) == STEPS
