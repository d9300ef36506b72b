"""Two checkpoints, kept by a real Lightning trainer: the best by the monitored metric, and really the latest."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from raytrain2p.tracking.checkpoints import best_checkpoint, checkpoint_callbacks, last_checkpoint


class Scripted(pl.LightningModule):
    """One weight, and a loss per epoch that the test dictates."""

    def __init__(self, losses: Sequence[float], val_losses: Sequence[float]) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.losses, self.val_losses = losses, val_losses

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        self.log("train_loss", self.losses[self.current_epoch], on_step=False, on_epoch=True)
        return self.weight

    def validation_step(self, batch: torch.Tensor, index: int) -> None:
        self.log("val/loss", self.val_losses[self.current_epoch])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def fit(
    folder: Path,
    losses: Sequence[float],
    monitor: str = "train_loss",
    mode: str = "min",
    val_losses: Sequence[float] | None = None,
    epochs: int | None = None,
    resume: Path | None = None,
) -> None:
    """Train two steps per epoch. The weight falls by one per step: it tells how far a checkpoint is."""
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs or len(losses),
        callbacks=list(checkpoint_callbacks(folder, monitor, mode)),
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    data: DataLoader[torch.Tensor] = DataLoader(torch.zeros(2, 1))  # type: ignore[arg-type]
    module = Scripted(losses, val_losses or losses)
    trainer.fit(module, data, data if val_losses else None, ckpt_path=str(resume) if resume else None, weights_only=resume is not None)


def load(path: Path | None) -> dict[str, Any]:
    assert path is not None
    return torch.load(path, weights_only=True)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_under_a_rising_loss_the_first_is_best_and_the_latest_is_last(tmp_path: Path) -> None:
    fit(tmp_path, [1.0, 2.0, 3.0])
    assert names(tmp_path) == ["best-epoch=00-train_loss=1.0000.ckpt", "last.ckpt"]
    assert load(best_checkpoint(tmp_path))["global_step"] == 2
    last = load(last_checkpoint(tmp_path))
    assert last["global_step"] == 6
    assert last["state_dict"]["weight"].item() == -6


def test_under_a_falling_loss_both_are_the_latest(tmp_path: Path) -> None:
    fit(tmp_path, [3.0, 2.0, 1.23456])
    assert names(tmp_path) == ["best-epoch=02-train_loss=1.2346.ckpt", "last.ckpt"]
    assert load(best_checkpoint(tmp_path))["global_step"] == load(last_checkpoint(tmp_path))["global_step"] == 6


def test_the_best_in_the_middle_is_kept(tmp_path: Path) -> None:
    fit(tmp_path, [3.0, 1.0, 2.0])
    assert names(tmp_path) == ["best-epoch=01-train_loss=1.0000.ckpt", "last.ckpt"]


def test_a_validation_metric_ranks_and_its_slash_makes_no_folder(tmp_path: Path) -> None:
    fit(tmp_path, [3.0, 2.0, 1.0], "val/loss", val_losses=[0.5, 0.25, 0.75])
    assert names(tmp_path) == ["best-epoch=01-val_loss=0.2500.ckpt", "last.ckpt"]
    assert load(last_checkpoint(tmp_path))["global_step"] == 6


def test_a_larger_value_is_better_in_mode_max(tmp_path: Path) -> None:
    fit(tmp_path, [1.0, 3.0, 2.0], mode="max")
    assert names(tmp_path) == ["best-epoch=01-train_loss=3.0000.ckpt", "last.ckpt"]


def test_a_resumed_run_goes_on_from_the_last_and_keeps_one_best(tmp_path: Path) -> None:
    losses = [2.0, 3.0, 1.0, 4.0]
    fit(tmp_path, losses, epochs=2)
    assert names(tmp_path) == ["best-epoch=00-train_loss=2.0000.ckpt", "last.ckpt"]
    fit(tmp_path, losses, resume=last_checkpoint(tmp_path))
    assert names(tmp_path) == ["best-epoch=02-train_loss=1.0000.ckpt", "last.ckpt"]
    assert load(last_checkpoint(tmp_path))["global_step"] == 8


@pytest.mark.parametrize("resumed_epochs", [2, 3])
def test_a_run_that_died_between_its_two_checkpoints_still_ends_with_one_best(tmp_path: Path, resumed_epochs: int) -> None:
    folder, aside = tmp_path / "checkpoints", tmp_path / "last.ckpt"
    losses = [3.0, 2.0, 1.0]
    fit(folder, losses, epochs=1)
    shutil.copy(folder / "last.ckpt", aside)
    fit(folder, losses, epochs=2, resume=last_checkpoint(folder))
    shutil.copy(aside, folder / "last.ckpt")  # as if it had died when epoch 1's best was written, and its last was not
    fit(folder, losses, epochs=resumed_epochs, resume=last_checkpoint(folder))
    epoch = resumed_epochs - 1
    assert names(folder) == [f"best-epoch=0{epoch}-train_loss={losses[epoch]:.4f}.ckpt", "last.ckpt"]
    assert load(best_checkpoint(folder))["global_step"] == 2 * resumed_epochs


def test_an_empty_or_absent_directory_has_neither(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        assert best_checkpoint(folder) is None
        assert last_checkpoint(folder) is None
