"""A request to stop, or to start again, ends a real Lightning trainer after the step that is under way, with a checkpoint of it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.exceptions import SIGTERMException
from torch.utils.data import DataLoader, TensorDataset

from raytrain2p.config.settings import CheckpointSettings, TrainingSettings
from raytrain2p.models.distributed import WorkerGroup
from raytrain2p.tracking.checkpoints import LAST
from raytrain2p.worker.callbacks import stop as stop_module
from raytrain2p.worker.callbacks.checkpoint import BestAndLastCheckpoints
from raytrain2p.worker.callbacks.stop import Regroup, StopOnRequest
from raytrain2p.worker.lightning_trainer import fit
from raytrain2p.worker.regroup import RegroupError
from raytrain2p.worker.resume import ResumePoint
from tests.training import ScriptedMetrics, trainer_in
from tests.worker.callbacks.test_checkpoint import Scripted

STEPS = 6


class Asking(pl.Callback):
    """Asks for a stop while a step is under way."""

    def __init__(self, request: Any, step: int) -> None:
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


@pytest.mark.parametrize("preempted", [False, True])
@pytest.mark.parametrize("steps_per_epoch", [1, 4])
def test_a_group_that_is_to_start_again_ends_with_a_checkpoint(
    tmp_path: Path, steps_per_epoch: int, preempted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Because it can grow, or because a node is taken away, which Ray answers."""
    monkeypatch.setattr(stop_module, "SECONDS_BETWEEN_CHECKS", 0.0)
    asked = list[bool]()

    def is_preempted() -> bool:
        asked.append(preempted and len(asked) == 2)
        return asked[-1]

    stop = StopOnRequest(None, WorkerGroup(), is_preempted if preempted else None)
    metrics = ScriptedMetrics({"train_loss": 1.0})
    checkpoints = BestAndLastCheckpoints(tmp_path, CheckpointSettings(every_steps=None), steps_per_epoch, metrics)
    asking = Asking(stop, STEPS + 1 if preempted else 3)
    asking.request = SimpleNamespace(requested=stop.regroup)
    trainer = trainer_in(tmp_path, [checkpoints, stop, asking], max_steps=STEPS, max_epochs=-1)
    module: Any = Scripted()
    module.training_settings = TrainingSettings(max_steps=STEPS, global_batch_size=1)
    batches: Any = DataLoader(TensorDataset(torch.zeros(steps_per_epoch, 1)))
    with pytest.raises(RegroupError) as raised:
        fit(trainer, module, batches, ResumePoint(None, 0))
    assert raised.value.preempted == preempted
    assert torch.load(tmp_path / LAST, weights_only=True)["global_step"] == 3


def test_a_stop_goes_before_a_new_start(tmp_path: Path) -> None:
    stop = StopOnRequest(None, WorkerGroup())
    stop.requested.set()
    stop.regroup.set()
    trainer = trainer_in(tmp_path, [stop], max_steps=STEPS, max_epochs=-1)
    with pytest.raises(SIGTERMException) as raised:
        trainer.fit(Scripted(), DataLoader(TensorDataset(torch.zeros(2, 1))))
    assert not isinstance(raised.value, Regroup)


def test_ray_is_not_asked_at_every_step(tmp_path: Path) -> None:
    """Each answer is a call of every worker to an actor."""
    ask = mock.Mock(return_value=False)
    stop = StopOnRequest(None, WorkerGroup(), ask)
    trainer_in(tmp_path, [stop], max_steps=STEPS, max_epochs=-1).fit(Scripted(), DataLoader(TensorDataset(torch.zeros(2, 1))))
    ask.assert_not_called()
