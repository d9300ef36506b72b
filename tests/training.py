"""The Lightning trainer of tests: on the CPU, one process, no output."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from raytrain2p.worker.checkpoint_io import AsyncCheckpointIO


class ScriptedMetrics:
    """Checkpoint metrics with given values, by step or always the same; `flush` is called before every save."""

    def __init__(
        self,
        values: dict[str, float] | Callable[[int], dict[str, float]],
        flush: Callable[[pl.Trainer], None] = lambda trainer: None,
    ) -> None:
        self.values, self.before_save = values, flush

    def flush(self, trainer: pl.Trainer) -> None:
        self.before_save(trainer)

    def measure(self, trainer: pl.Trainer, module: Any) -> dict[str, float]:
        return self.values(trainer.global_step) if callable(self.values) else self.values


def trainer_in(folder: Path, callbacks: Sequence[pl.Callback], files: AsyncCheckpointIO | None = None, **options: Any) -> pl.Trainer:
    """Writes checkpoints as in training; `options` are Lightning's."""
    return pl.Trainer(
        accelerator="cpu",
        devices=1,
        callbacks=list(callbacks),
        plugins=[files or AsyncCheckpointIO()],
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
