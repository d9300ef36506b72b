"""A loss or gradient that is not finite: the step is left out, and a few of them in a row end the run, its checkpoint kept."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from raytrain2p.config.settings import CheckpointSettings, LaunchSettings, TrainingSettings
from raytrain2p.phases.base import PhaseModule
from raytrain2p.tracking.checkpoints import LAST
from raytrain2p.worker.callbacks.checkpoint import BestAndLastCheckpoints
from raytrain2p.worker.callbacks.checkpoint_metrics import CheckpointMetrics
from raytrain2p.worker.callbacks.nonfinite import DivergedError, NonFinite, listed
from raytrain2p.worker.callbacks.step_logger import StepLogger
from tests.training import trainer_in

STEPS = 12


class Numbers(Dataset[dict[str, Any]]):
    """Record n has the number n, or the one given."""

    def __init__(self, bad: dict[int, float]) -> None:
        self.bad = bad

    def __len__(self) -> int:
        return STEPS

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"x": torch.tensor([self.bad.get(index, 1.0 + index)])}


class Small(PhaseModule):
    def __init__(self, **settings: Any) -> None:
        super().__init__(TrainingSettings(max_steps=STEPS, global_batch_size=1, warmup_steps=0, **settings), LaunchSettings(), 0, STEPS)
        self.weight = nn.Parameter(torch.ones(2, 1))
        self.after: list[torch.Tensor] = []  # the weights after each step

    def total_loss(self, batch: dict[str, Any]) -> torch.Tensor:
        return (self.weight * batch["x"]).square().mean()

    def on_train_batch_end(self, outputs: Any, batch: Any, index: int) -> None:
        self.after.append(self.weight.detach().clone())


def train(folder: Path, bad: dict[int, float], most: int = 3, every: int = 1, **settings: Any) -> tuple[Small, list[str]]:
    """Train on one record a step, in order; step n + 1 has record n. The module, and the lines for the user."""
    torch.manual_seed(0)
    module, lines = Small(**settings), list[str]()
    nonfinite = NonFinite(most, lambda step: [f"/data/a.jsonl:{step}"], lines.append)
    log = StepLogger(every, 1, STEPS, lambda losses: losses, None, None, nonfinite)
    metrics = CheckpointMetrics(log, None, None, None)
    saving = BestAndLastCheckpoints(folder, CheckpointSettings(every_steps=4), STEPS, metrics)
    clip = module.training_settings.gradient_clip
    trainer = trainer_in(folder, [log, saving], max_steps=STEPS, max_epochs=-1, limit_val_batches=0, gradient_clip_val=clip)
    data: Any = DataLoader(Numbers(bad), batch_size=None)
    try:
        trainer.fit(module, data)
    finally:
        trainer.strategy.checkpoint_io.wait()
    return module, lines


@pytest.mark.parametrize("number", [math.inf, math.nan, 1e30])
@pytest.mark.parametrize("clip", [1.0, None])
def test_a_step_that_is_not_finite_changes_nothing_and_the_next_ones_train(tmp_path: Path, number: float, clip: float | None) -> None:
    module, lines = train(tmp_path, {5: number}, gradient_clip=clip)
    after = module.after
    assert torch.equal(after[5], after[4])
    assert all(not torch.equal(after[step], after[step - 1]) for step in range(1, STEPS) if step != 5)
    assert all(bool(weights.isfinite().all()) for weights in after)
    assert len(lines) == 1
    assert lines[0].startswith("not finite, left out: step 6: loss ")
    assert lines[0].endswith("records /data/a.jsonl:6")
    checkpoint = torch.load(tmp_path / LAST, weights_only=True)
    assert checkpoint["global_step"] == STEPS
    state = checkpoint["optimizer_states"][0]["state"][0]
    assert state["step"] == STEPS - 1, "the optimizer counts what it has applied"
    assert math.isfinite(torch.load(tmp_path / LAST, weights_only=True)["callbacks"]["BestAndLastCheckpoints"]["best"]["value"])


@pytest.mark.parametrize("every", [1, 3, 100])
@pytest.mark.parametrize("most", [0, 2])
def test_too_many_in_a_row_end_training_with_step_and_records_and_the_last_finite_checkpoint_stays(
    tmp_path: Path, most: int, every: int
) -> None:
    with pytest.raises(DivergedError) as caught:
        train(tmp_path, dict.fromkeys(range(5, STEPS), math.nan), most, every)
    message = str(caught.value)
    assert "\n" not in message
    assert "first step 6: loss nan, gradient norm nan, records /data/a.jsonl:6;" in message
    assert f"training.max_nonfinite_steps={most}" in message
    checkpoint = torch.load(tmp_path / LAST, weights_only=True)
    assert checkpoint["global_step"] in (4, 8), "those of later steps were never written"
    assert checkpoint["state_dict"]["weight"].isfinite().all()


def test_finite_steps_between_them_start_the_count_again(tmp_path: Path) -> None:
    _, lines = train(tmp_path, dict.fromkeys((0, 1, 3, 4, 6, 7), math.inf), most=2)
    assert len(lines) == 6


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    """The gradient is finite, the step is too large: no loss tells of it before the checkpoint at the end."""
    with pytest.raises(DivergedError, match=r"the norm of the weights is (inf|nan) at step 4"):
        train(tmp_path, {}, most=100, learning_rate=1e38)
    assert not (tmp_path / LAST).exists()


def test_places_are_listed_by_file_in_one_line() -> None:
    places = [f"/a.jsonl:{number}" for number in range(14)] + [f"/b.json:byte {number}" for number in range(5)]
    assert listed(places[:2]) == "/a.jsonl:0, 1"
    assert listed(places).endswith("12, 13; /b.json:byte 0, byte 1 and 3 more")
