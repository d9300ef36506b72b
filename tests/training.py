"""The Lightning trainer of tests: on the CPU, one process, no output."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from raytrain2p.worker.checkpoint_io import AsyncCheckpointIO


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
