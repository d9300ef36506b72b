"""Checkpoint files: writing them, which is the best, which is the last, and which are damaged."""

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from raytrain2p.storage.errors import reporting_disk_errors
from raytrain2p.storage.files import link_file, replaced
from raytrain2p.tracking.run_directory import BEST, LAST, best_checkpoint_name


def write_checkpoint(checkpoint: dict[str, Any], path: Path, best: str | None) -> None:
    """Write a checkpoint, atomically.

    Args:
        best: a second name for the file, if it is the best checkpoint.

    Raises:
        StorageError: the disk is full, read-only or gone. Earlier checkpoints are unchanged.
    """
    with reporting_disk_errors(path, _size(checkpoint)):
        path.parent.mkdir(exist_ok=True)  # not the run's directory: if that is gone, its disk is, and another one is below
        with replaced(path) as stream:
            torch.save(checkpoint, stream)
        if best is not None:
            make_best(path, path.with_name(best))


def make_best(path: Path, best: Path) -> None:
    """Give a checkpoint the name of the best one, and remove the previous best."""
    link_file(path, best)
    remove_other_best(best)


def remove_other_best(best: Path) -> None:
    for other in best.parent.glob(BEST):
        if other != best:
            other.unlink(missing_ok=True)


def _size(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(_size(inner) for inner in value.values())
    if isinstance(value, list | tuple):
        return sum(_size(inner) for inner in value)
    return 0


@dataclass(frozen=True)
class CheckpointScore:
    """The monitored metric of one checkpoint."""

    epoch: int
    step: int
    metric: str
    value: float

    def file_name(self) -> str:
        """What it is called if it is the best."""
        return best_checkpoint_name(self.epoch, self.metric, self.value)


def settle(directory: Path, best: str, is_last: bool) -> None:
    """Restore the best checkpoint that a resumed checkpoint names: the previous process may have been killed before it made
    the new best, or before it removed the old one.

    Args:
        directory: of the checkpoints.
        best: file name.
        is_last: whether last.ckpt has the same content.
    """
    path, last = directory / best, directory / LAST
    if not path.is_file() and is_last and last.is_file():
        make_best(last, path)
    if path.is_file():
        remove_other_best(path)


def resumable_checkpoint(directory: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint to resume from, and a line for each damaged one that was passed over.

    It is last.ckpt; if that is damaged, the best; if both are, None.
    """
    complaints: list[str] = []
    for path in [directory / LAST, *sorted(directory.glob(BEST))]:
        if path.exists():
            if (reason := damage(path)) is None:
                return path, complaints
            complaints.append(f"{path} is damaged ({reason})")
    return None, complaints


def damage(path: Path) -> str | None:
    """Why a checkpoint file cannot be used; None if every byte is as it was written."""
    try:
        with zipfile.ZipFile(path) as archive:
            if (bad := archive.testzip()) is not None:  # compares checksums, which torch.load does not
                return f"checksum of {bad} is wrong"
        content = torch.load(path, map_location="meta", weights_only=True, mmap=True)
        if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
            return "it is another file: it has no weights to resume from"
    except Exception as error:  # a truncated file raises many kinds of errors
        return " ".join(f"{type(error).__name__}: {error}".split())[:120]
    return None


def step_of(path: Path) -> int | None:
    """The optimizer steps that a checkpoint has behind it; None if it is damaged."""
    try:
        return int(torch.load(path, map_location="meta", weights_only=True, mmap=True)["global_step"])
    except Exception:  # a truncated file raises many kinds of errors
        return None


def best_checkpoint(directory: Path) -> Path | None:
    return next(iter(sorted(directory.glob(BEST))), None)


def last_checkpoint(directory: Path) -> Path | None:
    path = directory / LAST
    return path if path.is_file() else None
