"""Every step's loss and learning rate, written once and in time by a real Lightning trainer."""

import itertools
import math
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from raytrain2p.config.settings import CheckpointSettings
from raytrain2p.tracking.checkpoints import last_checkpoint
from raytrain2p.tracking.metrics_file import MetricPoint
from raytrain2p.worker.callbacks.checkpoint import BestAndLastCheckpoints
from raytrain2p.worker.callbacks.nonfinite import NonFinite
from raytrain2p.worker.callbacks.step_logger import Mean, StepLogger
from raytrain2p.worker.channel import StepProgress
from tests.training import ScriptedMetrics, trainer_in

SPEEDS = {"samples_per_second", "tokens_per_second", "peak_memory_megabytes"}  # at each write
pytestmark = pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")


class Counting(pl.LightningModule):
    """Pass n of the run has the loss n; the learning rate halves at each step."""

    def __init__(self, accumulate: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.accumulate = accumulate
        self.pass_loss, self.pass_tokens = torch.zeros(()), 5
        self.gradient_norm = torch.ones(())

    def flops_per_token(self, positions: float) -> float:
        return 1000 * positions

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        self.pass_loss = torch.tensor(float(self.trainer.fit_loop.epoch_loop.total_batch_idx + 1)) / self.accumulate
        return self.weight * 0

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class DiedError(Exception):
    """As a kill would have it: no epoch ends, and nothing more is saved."""


class DieAt(pl.Callback):
    """Ends training after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise DiedError


def train(
    folder: Path, *callbacks: pl.Callback, passes: int, accumulate: int = 1, epochs: int = 1, steps: int = -1, resume: Path | None = None
) -> None:
    trainer = trainer_in(folder, callbacks, max_epochs=epochs, max_steps=steps, accumulate_grad_batches=accumulate)
    data: DataLoader[torch.Tensor] = DataLoader(torch.zeros(passes, 1))  # type: ignore[arg-type]
    trainer.fit(Counting(accumulate), data, ckpt_path=str(resume) if resume else None, weights_only=resume is not None)


class Kept:
    """What a StepLogger writes and shows."""

    def __init__(self, every: int = 1, steps_per_epoch: int = 100, mean: Any = lambda losses: losses) -> None:
        self.writes: list[list[MetricPoint]] = []
        self.shown: list[StepProgress] = []
        write = lambda points: self.writes.append(list(points))  # noqa: E731
        self.log = StepLogger(every, 8, steps_per_epoch, mean, write, self.shown.append, NonFinite(3, lambda step: [], None))

    def values(self, name: str) -> list[tuple[int, float]]:
        return [(point.step, point.value) for points in self.writes for point in points if point.name == name]

    def saving(self, folder: Path, every_steps: int) -> BestAndLastCheckpoints:
        """The checkpoints of a run that this log is kept of, in the way that the workers do it; none is judged."""
        return BestAndLastCheckpoints(folder, CheckpointSettings(every_steps=every_steps), 100, ScriptedMetrics({}, self.log.flush))


@pytest.mark.parametrize("every", [1, 3, 100])
def test_each_step_is_written_once_whenever_that_is(tmp_path: Path, every: int) -> None:
    kept = Kept(every)
    train(tmp_path, kept.log, passes=5, epochs=2)
    assert kept.values("train_loss") == [(step, float(step)) for step in range(1, 11)]
    assert [step for step, _ in kept.values("learning_rate")] == list(range(1, 11))
    assert [step for step, _ in kept.values("epoch")] == list(range(1, 11))


def test_no_metric_has_two_points_at_one_step(tmp_path: Path) -> None:
    kept = Kept()
    train(tmp_path, kept.log, passes=3, epochs=2)
    counts = Counter((point.name, point.step) for points in kept.writes for point in points)
    assert {name for name, _ in counts} == {"train_loss", "learning_rate", "epoch", *SPEEDS, "train_loss_epoch"}
    assert {place: count for place, count in counts.items() if count > 1} == {}


def test_speeds_are_of_the_same_time_and_memory_is_that_of_the_process(tmp_path: Path) -> None:
    kept = Kept(every=2)
    train(tmp_path, kept.log, passes=6, accumulate=3)
    ((_, samples),), ((_, tokens),), ((_, memory),) = (
        kept.values(name) for name in ("samples_per_second", "tokens_per_second", "peak_memory_megabytes")
    )
    assert tokens / samples == pytest.approx(3 * 5 / 8), "three passes a step of five tokens each, eight records a step"
    assert memory * 1e6 > psutil.Process().memory_info().rss / 2


def test_the_share_of_the_peak_is_that_of_the_flops_that_the_tokens_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raytrain2p.worker.callbacks.step_logger.peak_flops", lambda device: 1e9)
    kept = Kept(every=2)
    train(tmp_path, kept.log, passes=6, accumulate=3)
    ((_, tokens),), ((_, mfu),) = (kept.values(name) for name in ("tokens_per_second", "mfu"))
    assert mfu == pytest.approx(tokens * 1000 * (3 * 5 / 8) / 1e9), "fifteen tokens in eight records"


def test_accumulated_passes_sum_to_the_loss_of_their_step(tmp_path: Path) -> None:
    kept = Kept()
    train(tmp_path, kept.log, passes=6, accumulate=3)
    assert kept.values("train_loss") == [(1, (1 + 2 + 3) / 3), (2, (4 + 5 + 6) / 3)]


def test_points_are_written_at_multiples_and_the_rest_at_the_epochs_end(tmp_path: Path) -> None:
    kept = Kept(every=2)
    train(tmp_path, kept.log, passes=5, epochs=2)
    written = [[point.step for point in points if point.name == "train_loss"] for points in kept.writes]
    assert [steps for steps in written if steps] == [[1, 2], [3, 4], [5], [6], [7, 8], [9, 10]]


def test_a_resumed_run_writes_at_the_same_multiples(tmp_path: Path) -> None:
    first, second = Kept(every=4), Kept(every=4)
    with pytest.raises(DiedError):
        train(tmp_path, first.log, first.saving(tmp_path, 3), DieAt(3), passes=8)
    train(tmp_path, second.log, second.saving(tmp_path, 100), passes=8, resume=last_checkpoint(tmp_path))
    written = [[point.step for point in points if point.name == "train_loss"] for points in second.writes]
    assert [steps for steps in written if steps] == [[4], [5, 6, 7, 8]]


def test_epoch_and_learning_rate_come_with_each_step(tmp_path: Path) -> None:
    kept = Kept(steps_per_epoch=2)
    train(tmp_path, kept.log, passes=2, epochs=2)
    assert kept.values("epoch") == [(1, 0), (2, 0), (3, 1), (4, 1)]
    rates = [value for _, value in kept.values("learning_rate")]
    assert all(after == before / 2 for before, after in itertools.pairwise(rates))


@pytest.mark.parametrize("every", [1, 3])
def test_the_mean_of_each_epoch_is_at_its_last_step(tmp_path: Path, every: int) -> None:
    kept = Kept(every)
    train(tmp_path, kept.log, passes=5, epochs=2)
    assert kept.values("train_loss_epoch") == [(5, 3.0), (10, 8.0)]


def test_the_mean_of_a_last_epoch_that_is_cut_short_is_of_what_there_was(tmp_path: Path) -> None:
    kept = Kept()
    train(tmp_path, kept.log, passes=4, epochs=-1, steps=6)
    assert kept.values("train_loss_epoch") == [(4, 2.5), (6, 5.5)]


def test_the_mean_over_workers_is_what_is_written(tmp_path: Path) -> None:
    kept = Kept(every=2, mean=lambda losses: losses + 100)
    train(tmp_path, kept.log, passes=3)
    assert kept.values("train_loss") == [(1, 101), (2, 102), (3, 103)]
    assert kept.values("train_loss_epoch") == [(3, 102)]


def test_every_worker_joins_the_mean_though_it_writes_nothing(tmp_path: Path) -> None:
    sizes: list[int] = []

    def mean(losses: torch.Tensor) -> torch.Tensor:
        sizes.append(losses.shape[1])
        return losses

    train(tmp_path, StepLogger(2, 8, 3, mean, None, None, NonFinite(3, lambda step: [], None)), passes=3)
    assert sizes == [2, 1]


def test_what_is_shown_are_the_latest_numbers(tmp_path: Path) -> None:
    kept = Kept(every=2, steps_per_epoch=4)
    train(tmp_path, kept.log, passes=4, epochs=-1, steps=6)
    assert [(shown.epoch, shown.step, shown.loss) for shown in kept.shown] == [(0, 2, 2.0), (0, 4, 4.0), (1, 6, 6.0)]
    assert kept.shown[0].seconds_left > 0
    assert kept.shown[-1].seconds_left == 0
    assert all(shown.samples_per_second > 0 for shown in kept.shown)


def test_nothing_is_written_twice_when_a_save_asks_for_it(tmp_path: Path) -> None:
    kept = Kept(every=3)
    train(tmp_path, kept.log, kept.saving(tmp_path, 2), passes=6)
    written = [[point.step for point in points if point.name == "train_loss"] for points in kept.writes]
    assert [steps for steps in written if steps] == [[1, 2], [3], [4], [5, 6]]


def test_a_run_resumed_within_an_epoch_has_the_mean_of_all_of_it(tmp_path: Path) -> None:
    first, second = Kept(every=100), Kept(every=100)
    with pytest.raises(DiedError):
        train(tmp_path, first.log, first.saving(tmp_path, 4), DieAt(5), passes=6, epochs=2)
    assert first.values("train_loss") == [(step, float(step)) for step in range(1, 5)]
    train(tmp_path, second.log, second.saving(tmp_path, 100), passes=6, epochs=2, resume=last_checkpoint(tmp_path))
    assert second.values("train_loss") == [(step, float(step)) for step in range(5, 13)]
    assert second.values("train_loss_epoch") == [(6, 3.5), (12, 9.5)]


def test_the_mean_since_the_last_checkpoint_is_part_of_a_checkpoint(tmp_path: Path) -> None:
    first, second = Kept(), Kept()
    with pytest.raises(DiedError):
        train(tmp_path, first.log, first.saving(tmp_path, 4), DieAt(5), passes=6)
    train(tmp_path, second.log, second.saving(tmp_path, 100), passes=6, resume=last_checkpoint(tmp_path))
    assert second.log.since_checkpoint.take() == 3.5


def test_a_loss_that_is_not_a_number_is_written_and_leaves_the_other_steps_alone(tmp_path: Path) -> None:
    kept = Kept(every=3, mean=lambda losses: torch.where(losses == 2, math.nan, losses))
    train(tmp_path, kept.log, passes=3)
    (_, one), (_, two), (_, three) = kept.values("train_loss")
    assert (one, three) == (1, 3)
    assert math.isnan(two)
    assert kept.values("train_loss_epoch") == [(3, 2.0)]  # of the other steps


def test_the_mean_of_nothing_is_nan_and_taking_it_starts_over() -> None:
    mean = Mean()
    assert math.isnan(mean.take())
    for value in (1.0, 2.0, 6.0):
        mean.add(value)
    assert mean.take() == 3
    assert math.isnan(mean.take())
