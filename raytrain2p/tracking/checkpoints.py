"""Two checkpoints: the best by a monitored metric, and the latest, really the latest."""

from pathlib import Path

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ModelCheckpoint

BEST, LAST = "best-*.ckpt", "last.ckpt"


class OnlyBest(ModelCheckpoint):
    """Keeps one file. A worker that died after writing a best checkpoint, but before the last one, leaves a best that the
    resumed run knows nothing of: it goes when the next best is written, so that there is never a doubt which one is best.
    """

    def _save_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        super()._save_checkpoint(trainer, filepath)
        if trainer.is_global_zero:
            for other in Path(filepath).parent.glob(BEST):
                if other != Path(filepath):
                    other.unlink(missing_ok=True)


def checkpoint_callbacks(directory: Path, monitor: str, mode: str) -> list[ModelCheckpoint]:
    """Lightning's own `save_last` writes last.ckpt only when the metric improves: so a second callback keeps the latest."""
    best = OnlyBest(
        dirpath=directory,
        filename="best-epoch={epoch:02d}-" + monitor.replace("/", "_") + "={" + monitor + ":.4f}",
        auto_insert_metric_name=False,
        monitor=monitor,
        mode=mode,
        save_top_k=1,
        enable_version_counter=False,
        save_on_train_epoch_end=True,
    )
    last = ModelCheckpoint(
        dirpath=directory, filename="last", monitor=None, save_top_k=1, enable_version_counter=False, save_on_train_epoch_end=True
    )
    return [best, last]


def best_checkpoint(directory: Path) -> Path | None:
    return next(iter(sorted(directory.glob(BEST))), None)


def last_checkpoint(directory: Path) -> Path | None:
    path = directory / LAST
    return path if path.is_file() else None
