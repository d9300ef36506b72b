"""Two checkpoints, kept by a real Lightning trainer: the best by the monitored metric, and really the latest; whole, always."""

import math
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.exceptions import SIGTERMException
from torch.utils.data import DataLoader

from raytrain2p.config.settings import CheckpointSettings
from raytrain2p.storage.errors import StorageError
from raytrain2p.tracking.checkpoints import (
    LAST,
    CheckpointScore,
    best_checkpoint,
    last_checkpoint,
    resumable_checkpoint,
)
from raytrain2p.worker.callbacks.checkpoint import BestAndLastCheckpoints
from raytrain2p.worker.checkpoint_io import AsyncCheckpointIO
from tests.tracking.checkpoint_files import content, flip_bit, load, names, tear
from tests.training import ScriptedMetrics, trainer_in

Values = Callable[[int], dict[str, float]]
pytestmark = pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")


class Scripted(pl.LightningModule):
    """A weight that falls by one per step: it shows the step of a checkpoint. The rest of it takes space."""

    def __init__(self, size: int = 1) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(size))

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        return self.weight.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


class Raising(pl.Callback):
    """Raises after a step."""

    def __init__(self, step: int, exception: BaseException) -> None:
        self.step, self.exception = step, exception

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise self.exception


class NotedFiles(AsyncCheckpointIO):
    """Notes when a save is asked for."""

    def __init__(self, notes: list[tuple[str, int]]) -> None:
        super().__init__()
        self.notes = notes

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: str | None = None) -> None:
        self.notes.append(("save", checkpoint["global_step"]))
        super().save_checkpoint(checkpoint, path, storage_options)


def by_epoch(*values: float, name: str = "train_loss", per_epoch: int = 2) -> Values:
    """Metrics that the test dictates, one for each epoch."""
    return lambda step: {name: values[(step - 1) // per_epoch]}


def fit(
    folder: Path,
    values: Values,
    epochs: int,
    monitor: str = "train_loss",
    mode: str = "min",
    every_steps: int | None = None,
    best_of: str = "epochs",
    passes: int = 2,
    accumulate: int = 1,
    max_steps: int = -1,
    resume: Path | None = None,
    others: Sequence[pl.Callback] = (),
    size: int = 1,
    notes: list[tuple[str, int]] | None = None,
    saved: Callable[[dict[str, float], CheckpointScore], None] | None = None,
) -> tuple[list[tuple[str, int]], list[int]]:
    """Train, and return what was done before and at each save, and at which steps a checkpoint competed."""
    notes = [] if notes is None else notes
    scored: list[int] = []
    checkpoints = BestAndLastCheckpoints(
        folder,
        CheckpointSettings.model_validate({"monitor": monitor, "mode": mode, "every_steps": every_steps, "best_of": best_of}),
        passes // accumulate,
        ScriptedMetrics(values, lambda trainer: notes.append(("before", trainer.global_step))),
        lambda metrics, score: scored.append(score.step),
        saved,
    )
    trainer = trainer_in(
        folder,
        [checkpoints, *others],
        NotedFiles(notes),
        max_epochs=epochs,
        max_steps=max_steps,
        accumulate_grad_batches=accumulate,
    )
    data: DataLoader[torch.Tensor] = DataLoader(torch.zeros(passes, 1))  # type: ignore[arg-type]
    trainer.fit(Scripted(size), data, ckpt_path=str(resume) if resume else None, weights_only=resume is not None)
    return notes, scored


def step_of(path: Path | None) -> int:
    """The step of a checkpoint; its weight must agree."""
    found = load(path)
    assert found["state_dict"]["weight"][0].item() == -found["global_step"]
    return int(found["global_step"])


def saved_steps(notes: list[tuple[str, int]]) -> list[int]:
    return [step for what, step in notes if what == "save"]


# which are kept


def test_under_a_rising_metric_the_first_is_best_and_the_latest_is_last(tmp_path: Path) -> None:
    fit(tmp_path, by_epoch(1.0, 2.0, 3.0), 3)
    assert names(tmp_path) == ["best-epoch=00-train_loss=1.0000.ckpt", "last.ckpt"]
    assert step_of(best_checkpoint(tmp_path)) == 2
    assert step_of(last_checkpoint(tmp_path)) == 6


def test_under_a_falling_metric_both_are_the_latest(tmp_path: Path) -> None:
    fit(tmp_path, by_epoch(3.0, 2.0, 1.23456), 3)
    assert names(tmp_path) == ["best-epoch=02-train_loss=1.2346.ckpt", "last.ckpt"]
    assert step_of(best_checkpoint(tmp_path)) == step_of(last_checkpoint(tmp_path)) == 6


def test_the_best_in_the_middle_is_kept(tmp_path: Path) -> None:
    fit(tmp_path, by_epoch(3.0, 1.0, 2.0), 3)
    assert names(tmp_path) == ["best-epoch=01-train_loss=1.0000.ckpt", "last.ckpt"]
    assert step_of(best_checkpoint(tmp_path)) == 4


def test_a_larger_value_is_better_in_mode_max(tmp_path: Path) -> None:
    fit(tmp_path, by_epoch(1.0, 3.0, 2.0), 3, mode="max")
    assert names(tmp_path) == ["best-epoch=01-train_loss=3.0000.ckpt", "last.ckpt"]
    assert step_of(best_checkpoint(tmp_path)) == 4


def test_of_two_equal_values_the_first_stays_the_best(tmp_path: Path) -> None:
    fit(tmp_path, by_epoch(1.0, 1.0), 2)
    assert names(tmp_path) == ["best-epoch=00-train_loss=1.0000.ckpt", "last.ckpt"]


def test_the_slash_of_a_metric_makes_no_folder(tmp_path: Path) -> None:
    fit(tmp_path, by_epoch(0.5, 0.25, 0.75, name="val/loss"), 3, monitor="val/loss")
    assert names(tmp_path) == ["best-epoch=01-val_loss=0.2500.ckpt", "last.ckpt"]


@pytest.mark.parametrize("nothing", [math.nan, math.inf, -math.inf, None], ids=str)
@pytest.mark.parametrize("mode", ["min", "max"])
def test_a_metric_that_is_missing_or_not_a_number_never_displaces_the_best(tmp_path: Path, nothing: float | None, mode: str) -> None:
    def values(step: int) -> dict[str, float]:
        value = [nothing, 2.0, nothing][(step - 1) // 2]
        return {} if value is None else {"train_loss": value}

    fit(tmp_path, values, 3, mode=mode)
    assert names(tmp_path) == ["best-epoch=01-train_loss=2.0000.ckpt", "last.ckpt"]
    assert step_of(best_checkpoint(tmp_path)) == 4
    assert step_of(last_checkpoint(tmp_path)) == 6


def test_without_any_number_there_is_a_last_and_no_best(tmp_path: Path) -> None:
    fit(tmp_path, by_epoch(math.nan, math.nan), 2)
    assert names(tmp_path) == ["last.ckpt"]
    assert step_of(last_checkpoint(tmp_path)) == 4


# when they are saved


@pytest.mark.parametrize(("best_of", "competed"), [("epochs", [5, 10]), ("saves", [2, 4, 5, 6, 8, 10])])
def test_every_few_steps_and_at_each_epochs_end_it_is_saved_once(tmp_path: Path, best_of: str, competed: list[int]) -> None:
    notes, scored = fit(tmp_path, lambda step: {"train_loss": 1.0}, 2, every_steps=2, best_of=best_of, passes=5)
    assert saved_steps(notes) == [2, 4, 5, 6, 8, 10]
    assert scored == competed


def test_saved_is_called_once_the_checkpoint_of_that_step_is_on_disk(tmp_path: Path) -> None:
    """A trial's weights may be taken over then."""
    calls: list[tuple[int, int | None]] = []

    def saved(metrics: dict[str, float], score: CheckpointScore) -> None:
        calls.append((score.step, step_of(last_checkpoint(tmp_path))))

    fit(tmp_path, lambda step: {"train_loss": 1.0}, 2, every_steps=2, best_of="saves", passes=5, saved=saved)
    assert calls == [(step, step) for step in (2, 4, 5, 6, 8, 10)]


@pytest.mark.parametrize(
    ("best_of", "name", "step"),
    [("epochs", "best-epoch=00-train_loss=4.0000.ckpt", 4), ("saves", "best-epoch=01-train_loss=1.0000.ckpt", 6)],
)
def test_a_value_within_an_epoch_counts_only_where_every_save_competes(tmp_path: Path, best_of: str, name: str, step: int) -> None:
    values = {2: 5.0, 4: 4.0, 6: 1.0, 8: 6.0}
    fit(tmp_path, lambda step: {"train_loss": values[step]}, 2, every_steps=2, best_of=best_of, passes=4)
    assert names(tmp_path) == [name, "last.ckpt"]
    assert step_of(best_checkpoint(tmp_path)) == step


def test_without_a_number_of_steps_it_is_saved_at_epochs_ends_alone(tmp_path: Path) -> None:
    notes, _ = fit(tmp_path, by_epoch(1.0, 2.0), 2)
    assert saved_steps(notes) == [2, 4]


def test_a_run_that_ends_within_an_epoch_is_saved_and_scored_at_its_end(tmp_path: Path) -> None:
    notes, scored = fit(tmp_path, by_epoch(1.0, 2.0, per_epoch=4), -1, every_steps=2, passes=4, max_steps=6)
    assert saved_steps(notes) == [2, 4, 6]
    assert scored == [4, 6]
    assert step_of(last_checkpoint(tmp_path)) == 6


def test_accumulated_passes_are_one_step(tmp_path: Path) -> None:
    notes, scored = fit(tmp_path, by_epoch(1.0, 2.0), 2, every_steps=1, passes=6, accumulate=3)
    assert saved_steps(notes) == [1, 2, 3, 4]
    assert scored == [2, 4]


def test_what_must_come_before_a_save_comes_before_each(tmp_path: Path) -> None:
    notes, _ = fit(tmp_path, by_epoch(3.0, 2.0, per_epoch=3), 2, every_steps=2, passes=3)
    assert notes == [(what, step) for step in (2, 3, 4, 6) for what in ("before", "save")]


def test_a_request_to_stop_saves_the_step_that_has_been_done(tmp_path: Path) -> None:
    with pytest.raises(SIGTERMException):
        fit(tmp_path, by_epoch(1.0, per_epoch=5), 1, every_steps=2, passes=5, others=[Raising(3, SIGTERMException())])
    assert names(tmp_path) == ["last.ckpt"]
    assert step_of(last_checkpoint(tmp_path)) == 3


def test_a_request_to_stop_at_a_step_that_was_saved_saves_it_no_second_time(tmp_path: Path) -> None:
    notes: list[tuple[str, int]] = []
    with pytest.raises(SIGTERMException):
        fit(tmp_path, by_epoch(1.0, per_epoch=5), 1, every_steps=2, passes=5, others=[Raising(2, SIGTERMException())], notes=notes)
    assert saved_steps(notes) == [2]
    assert step_of(last_checkpoint(tmp_path)) == 2


def test_an_error_saves_nothing_of_what_may_be_broken(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="broken"):
        fit(tmp_path, by_epoch(1.0, per_epoch=5), 1, every_steps=2, passes=5, others=[Raising(3, RuntimeError("broken"))])
    assert step_of(last_checkpoint(tmp_path)) == 2


# resuming


@pytest.mark.parametrize(
    ("values", "name", "step"),
    [((2.0, 3.0, 2.5, 4.0), "best-epoch=00-train_loss=2.0000.ckpt", 2), ((2.0, 3.0, 1.0, 4.0), "best-epoch=02-train_loss=1.0000.ckpt", 6)],
)
def test_a_resumed_run_keeps_the_best_of_before(tmp_path: Path, values: tuple[float, ...], name: str, step: int) -> None:
    fit(tmp_path, by_epoch(*values), 2)
    assert names(tmp_path) == ["best-epoch=00-train_loss=2.0000.ckpt", "last.ckpt"]
    fit(tmp_path, by_epoch(*values), 4, resume=last_checkpoint(tmp_path))
    assert names(tmp_path) == [name, "last.ckpt"]
    assert step_of(best_checkpoint(tmp_path)) == step
    assert step_of(last_checkpoint(tmp_path)) == 8


@pytest.mark.parametrize("stopped", [2, 3])
def test_a_run_that_stopped_within_an_epoch_does_the_rest_of_it(tmp_path: Path, stopped: int) -> None:
    with pytest.raises(SIGTERMException):
        fit(tmp_path, by_epoch(1.0, per_epoch=5), 1, every_steps=2, passes=5, others=[Raising(stopped, SIGTERMException())])
    notes, scored = fit(tmp_path, by_epoch(1.0, 2.0, per_epoch=5), 2, every_steps=2, passes=5, resume=last_checkpoint(tmp_path))
    assert saved_steps(notes) == [4, 5, 6, 8, 10]
    assert scored == [5, 10]
    assert step_of(last_checkpoint(tmp_path)) == 10


def test_a_kill_between_naming_the_new_best_and_removing_the_old_one_leaves_one_after_a_resume(tmp_path: Path) -> None:
    values = by_epoch(2.0, 1.0, 3.0)
    fit(tmp_path, values, 1)
    old = shutil.copy(tmp_path / "best-epoch=00-train_loss=2.0000.ckpt", tmp_path / "kept")
    fit(tmp_path, values, 2, resume=last_checkpoint(tmp_path))
    Path(old).rename(tmp_path / "best-epoch=00-train_loss=2.0000.ckpt")
    fit(tmp_path, values, 3, resume=last_checkpoint(tmp_path))
    assert names(tmp_path) == ["best-epoch=01-train_loss=1.0000.ckpt", "last.ckpt"]
    assert step_of(best_checkpoint(tmp_path)) == 4


@pytest.mark.parametrize("old", [[], ["best-epoch=00-train_loss=2.0000.ckpt"]], ids=["none before", "one before"])
def test_after_a_kill_before_the_best_was_named_it_is_made_from_the_last(tmp_path: Path, old: list[str]) -> None:
    values = by_epoch(2.0, 1.0, 3.0)
    fit(tmp_path, values, 2)
    (tmp_path / "best-epoch=01-train_loss=1.0000.ckpt").rename(tmp_path / "gone")
    for name in old:
        (tmp_path / "gone").rename(tmp_path / name)
    (tmp_path / "gone").unlink(missing_ok=True)
    fit(tmp_path, values, 3, resume=last_checkpoint(tmp_path))
    assert names(tmp_path) == ["best-epoch=01-train_loss=1.0000.ckpt", "last.ckpt"]
    assert step_of(best_checkpoint(tmp_path)) == 4


# which one to go on from


@pytest.mark.parametrize("harm", [tear, flip_bit, lambda path: path.write_bytes(b"")], ids=["torn", "a bit flipped", "empty"])
def test_a_damaged_last_is_named_and_the_best_is_resumed_from(tmp_path: Path, harm: Callable[[Path], None]) -> None:
    values = by_epoch(1.0, 2.0, 3.0)
    fit(tmp_path, values, 2)
    harm(tmp_path / LAST)
    path, complaints = resumable_checkpoint(tmp_path)
    assert path == tmp_path / "best-epoch=00-train_loss=1.0000.ckpt"
    (complaint,) = complaints
    assert complaint.startswith(f"{tmp_path / LAST} is damaged (")
    notes, _ = fit(tmp_path, values, 3, resume=path)
    assert saved_steps(notes) == [4, 6]
    assert names(tmp_path) == ["best-epoch=00-train_loss=1.0000.ckpt", "last.ckpt"]
    assert resumable_checkpoint(tmp_path) == (tmp_path / LAST, [])
    assert step_of(last_checkpoint(tmp_path)) == 6


# how a file is written


def test_what_is_saved_is_what_there_was_at_the_moment_of_saving(tmp_path: Path) -> None:
    files, go_on = AsyncCheckpointIO(), threading.Event()
    files.thread.submit(go_on.wait)  # the writer is slow
    weight, nested = torch.zeros(3), torch.zeros(1)
    files.save_checkpoint({"weight": weight, "groups": [{"state": (nested, "text", 4)}]}, tmp_path / LAST)
    weight += 1  # training goes on
    nested += 1
    assert names(tmp_path) == []
    go_on.set()
    files.teardown()
    found = load(tmp_path / LAST)
    assert found["weight"].tolist() == [0, 0, 0]
    assert found["groups"] == [{"state": (torch.zeros(1), "text", 4)}]


def test_training_continues_while_a_checkpoint_is_uploaded_and_the_next_save_waits_for_that(tmp_path: Path) -> None:
    uploaded, go_on = list[float](), threading.Event()

    def upload() -> None:
        assert go_on.wait(10)
        uploaded.append(load(tmp_path / LAST)["weight"])

    files = AsyncCheckpointIO(upload)
    files.save_checkpoint({"weight": 1.0}, tmp_path / LAST)
    assert uploaded == []
    threading.Timer(0.2, go_on.set).start()
    files.save_checkpoint({"weight": 2.0}, tmp_path / LAST)
    assert uploaded == [1.0]
    files.teardown()
    assert uploaded == [1.0, 2.0]


def test_the_directory_is_made_with_the_first_checkpoint(tmp_path: Path) -> None:
    fit(tmp_path / "checkpoints", by_epoch(1.0), 1)
    assert names(tmp_path / "checkpoints") == ["best-epoch=00-train_loss=1.0000.ckpt", "last.ckpt"]


@pytest.mark.parametrize("what_follows", ["save", "teardown"])
def test_a_full_disk_is_reported_by_the_next_save_or_the_end(small_disk: Path, what_follows: str) -> None:
    files = AsyncCheckpointIO()
    files.save_checkpoint(content(1.5), small_disk / LAST)
    following = {"save": lambda: files.save_checkpoint(content(0.1), small_disk / LAST), "teardown": files.teardown}
    with pytest.raises(StorageError, match=str(small_disk)):
        following[what_follows]()
    files.teardown()


def test_training_on_a_disk_that_fills_up_ends_with_a_storage_error(small_disk: Path) -> None:
    fit(small_disk, by_epoch(1.0), 1, size=50_000)
    (small_disk / "somebody elses").write_bytes(bytes(700_000))
    with pytest.raises(StorageError, match=r"last\.ckpt cannot be written: no space left; needed 0\.2 MB, free 0\.\d MB"):
        fit(small_disk, by_epoch(1.0, 2.0, 3.0), 3, size=50_000, resume=last_checkpoint(small_disk))
    (small_disk / "somebody elses").unlink()
    assert names(small_disk) == ["best-epoch=00-train_loss=1.0000.ckpt", "last.ckpt"]
    assert resumable_checkpoint(small_disk) == (small_disk / LAST, [])
    assert step_of(last_checkpoint(small_disk)) == 2
