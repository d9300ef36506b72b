"""How Lightning's checkpoints are written: by a thread, while training continues."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins.io.checkpoint_io import CheckpointIO

from raytrain2p.tracking.checkpoints import write_checkpoint


class AsyncCheckpointIO(CheckpointIO):
    """Copies a checkpoint in memory at once; a thread writes it to a temporary file, which is renamed when it is on disk.

    `save_checkpoint(..., storage_options="best-epoch=03-...ckpt")` also makes the checkpoint the best one: the same file under
    a second name, written once.

    Args:
        written: called by the thread after each write, as to upload it: the next write waits for that, training does not.
    """

    def __init__(self, written: Callable[[], None] = lambda: None) -> None:
        self.written = written
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-writer")
        self.pending: Future[None] | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: str | None = None) -> None:
        """Returns when the copy is made. An error of the previous write is raised here.

        Raises:
            StorageError: the last checkpoint could not be written.
        """
        self.wait()
        self.pending = self.thread.submit(self._write, _copied(checkpoint), Path(path), storage_options)

    def _write(self, checkpoint: dict[str, Any], path: Path, best: str | None) -> None:
        write_checkpoint(checkpoint, path, best)
        self.written()

    def wait(self) -> None:
        """Wait until the last checkpoint is on disk.

        Raises:
            StorageError: it could not be written.
        """
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        found: dict[str, Any] = torch.load(path, map_location=map_location or "cpu", weights_only=True)
        return found

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)

    def teardown(self) -> None:
        self.wait()
        self.thread.shutdown()


def _copied(value: Any) -> Any:
    """A copy with its own tensors, on the CPU: training changes the originals."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copied(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(inner) for inner in value)
    return value
