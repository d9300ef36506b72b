"""Every step's loss and learning rate, written once to metrics.jsonl and to MLflow, from a real Lightning trainer."""

import itertools
import json
import math
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from mlflow.exceptions import MlflowException
from torch.utils.data import DataLoader

from raytrain2p.config import load_settings
from raytrain2p.tracking.metrics import POINTS_PER_BATCH, MetricsWriter, Point, StepLog
from raytrain2p.tracking.plots import read_metrics
from raytrain2p.tracking.run import Run, get_or_create_run, prepare_store


class Counting(pl.LightningModule):
    """Pass n of the run has the loss n + 1; the learning rate halves at each step."""

    def __init__(self, accumulate: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.accumulate, self.number = accumulate, 0
        self.pass_loss = torch.zeros(())

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        self.number += 1
        self.pass_loss = torch.tensor(float(self.number)) / self.accumulate
        self.log("train_loss", float(self.number), on_step=False, on_epoch=True)
        return self.weight * 0

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def train(log: StepLog, folder: Path, passes: int, accumulate: int = 1, epochs: int = 1) -> None:
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        accumulate_grad_batches=accumulate,
        callbacks=[log],
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Counting(accumulate), DataLoader(torch.zeros(passes, 1)))  # type: ignore[arg-type]


class Kept:
    """What a StepLog hands on."""

    def __init__(self, every: int = 1, mean: Any = lambda losses: losses) -> None:
        self.writes: list[list[Point]] = []
        self.shown: list[dict[str, Any]] = []
        self.log = StepLog(every, 8, mean, lambda points: self.writes.append(list(points)), self.shown.append)

    def values(self, name: str) -> list[tuple[int, float]]:
        return [(point.step, point.value) for points in self.writes for point in points if point.name == name]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("run")
    settings = load_settings(1, None, [f"output.root={folder}/checkpoints", f"tracking.uri=sqlite:///{folder}/mlflow.db"])
    prepare_store(settings, "metrics")
    return get_or_create_run(settings, "alignment", "metrics", "launch-1")


@pytest.fixture
def fresh(run: Run) -> Run:
    """The same store, but a run and a directory of their own."""
    experiment = run.client.get_experiment_by_name("metrics")
    run_id = run.client.create_run(experiment.experiment_id).info.run_id
    folder = run.path.parent / f"{run_id}_20260101_000000"
    folder.mkdir()
    return Run(run_id, str(folder), "metrics", "20260101_000000", run_id, "alignment", run.tracking_uri)


def lines_of(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("every", [1, 3, 100])
def test_each_step_is_written_once_to_the_file_and_to_mlflow(fresh: Run, tmp_path: Path, every: int) -> None:
    train(StepLog(every, 8, lambda losses: losses, MetricsWriter(fresh).write, None), tmp_path, passes=5, epochs=2)
    expected = [(step, float(step)) for step in range(1, 11)]
    assert [(line["step"], line["value"]) for line in lines_of(fresh) if line["name"] == "train_loss"] == expected
    sent = fresh.client.get_metric_history(fresh.run_id, "train_loss")
    assert sorted((metric.step, metric.value) for metric in sent) == expected
    rates = fresh.client.get_metric_history(fresh.run_id, "learning_rate")
    assert sorted(metric.step for metric in rates) == list(range(1, 11))
    epochs = fresh.client.get_metric_history(fresh.run_id, "train_loss_epoch")
    assert sorted((metric.step, metric.value) for metric in epochs) == [(5, 3.0), (10, 8.0)]


def test_file_and_mlflow_hold_the_same_points(fresh: Run, tmp_path: Path) -> None:
    train(StepLog(2, 8, lambda losses: losses, MetricsWriter(fresh).write, None), tmp_path, passes=3, epochs=2)
    written = Counter((line["name"], line["step"], line["value"]) for line in lines_of(fresh))
    names = {name for name, _, _ in written}
    assert names == {"train_loss", "learning_rate", "epoch", "samples_per_second", "train_loss_epoch"}
    sent = [metric for name in names for metric in fresh.client.get_metric_history(fresh.run_id, name)]
    assert {(metric.key, metric.step, metric.value) for metric in sent} == set(written)


def test_no_metric_has_two_points_at_one_step(tmp_path: Path) -> None:
    kept = Kept()
    train(kept.log, tmp_path, passes=3, epochs=2)
    counts = Counter((point.name, point.step) for points in kept.writes for point in points)
    assert {place: count for place, count in counts.items() if count > 1} == {}


def test_accumulated_passes_sum_to_the_loss_of_their_step(tmp_path: Path) -> None:
    kept = Kept()
    train(kept.log, tmp_path, passes=6, accumulate=3)
    assert kept.values("train_loss") == [(1, (1 + 2 + 3) / 3), (2, (4 + 5 + 6) / 3)]


def test_points_are_handed_on_every_few_steps_and_the_rest_at_the_end(tmp_path: Path) -> None:
    kept = Kept(every=2)
    train(kept.log, tmp_path, passes=5)
    handed = [[point.step for point in points if point.name == "train_loss"] for points in kept.writes]
    assert [steps for steps in handed if steps] == [[1, 2], [3, 4], [5]]


def test_epoch_and_learning_rate_come_with_each_step(tmp_path: Path) -> None:
    kept = Kept()
    train(kept.log, tmp_path, passes=2, epochs=2)
    epochs = dict(kept.values("epoch"))
    assert [epochs[step] for step in (1, 2, 3, 4)] == [0, 0, 1, 1]
    rates = [value for _, value in kept.values("learning_rate")]
    assert rates == sorted(rates, reverse=True)
    assert all(after == before / 2 for before, after in itertools.pairwise(rates))


def test_the_mean_over_workers_is_what_is_written(tmp_path: Path) -> None:
    kept = Kept(every=2, mean=lambda losses: losses + 100)
    train(kept.log, tmp_path, passes=3)
    assert kept.values("train_loss") == [(1, 101), (2, 102), (3, 103)]


def test_every_worker_joins_the_mean_though_it_writes_nothing(tmp_path: Path) -> None:
    sizes: list[int] = []

    def mean(losses: torch.Tensor) -> torch.Tensor:
        sizes.append(len(losses))
        return losses

    train(StepLog(2, 8, mean, None, None), tmp_path, passes=3)
    assert sizes == [2, 1]


def test_what_is_shown_are_the_latest_numbers(tmp_path: Path) -> None:
    kept = Kept(every=2)
    train(kept.log, tmp_path, passes=4)
    assert [(word["step"], word["loss"]) for word in kept.shown] == [(2, 2.0), (4, 4.0)]
    assert kept.shown[0]["seconds_left"] > 0
    assert kept.shown[-1]["seconds_left"] == 0
    assert all(word["samples_per_second"] > 0 for word in kept.shown)


def points_of(values: Sequence[float]) -> list[Point]:
    return [Point("train_loss", value, step, 1700000000.1234) for step, value in enumerate(values, 1)]


def test_more_points_than_one_request_takes_all_arrive(fresh: Run) -> None:
    MetricsWriter(fresh).write(points_of([0.5] * (POINTS_PER_BATCH + 1)))
    assert len(lines_of(fresh)) == POINTS_PER_BATCH + 1
    assert len(fresh.client.get_metric_history(fresh.run_id, "train_loss")) == POINTS_PER_BATCH + 1


def test_points_keep_their_time(fresh: Run) -> None:
    MetricsWriter(fresh).write(points_of([0.5]))
    assert lines_of(fresh) == [{"step": 1, "name": "train_loss", "value": 0.5, "time": 1700000000.123}]
    (sent,) = fresh.client.get_metric_history(fresh.run_id, "train_loss")
    assert sent.timestamp == 1700000000123


def test_a_second_writer_of_a_resumed_run_appends(fresh: Run) -> None:
    MetricsWriter(fresh).write(points_of([0.5]))
    MetricsWriter(fresh).write([Point("train_loss", 0.25, 2, 1700000001.0)])
    assert [line["value"] for line in lines_of(fresh)] == [0.5, 0.25]


def test_a_loss_that_is_not_a_number_is_written_and_read_as_such(fresh: Run) -> None:
    MetricsWriter(fresh).write(points_of([1.0, math.nan]))
    steps, values = read_metrics(fresh.path / "metrics.jsonl")["train_loss"]
    assert steps.tolist() == [1, 2]
    assert math.isnan(values[1])


def test_points_are_on_disk_before_the_store_is_asked(fresh: Run) -> None:
    fresh.client.delete_run(fresh.run_id)  # the store now refuses points
    with suppress(MlflowException):
        MetricsWriter(fresh).write(points_of([0.5]))
    assert [line["value"] for line in lines_of(fresh)] == [0.5]
