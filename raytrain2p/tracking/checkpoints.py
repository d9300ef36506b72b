"""Checkpoint files: each one whole or not there, which is the best, which the latest, and which are damaged."""

import os
import shutil
import zipfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from raytrain2p.storage.errors import storage_error

BEST, LAST = "best-*.ckpt", "last.ckpt"


def write_checkpoint(checkpoint: dict[str, Any], path: Path, best: str | None) -> None:
    """Write aside, put on disk, rename; then give it its second name, if it is the best.

    Raises:
        StorageError: no space, or no such disk; what was whole stays.
    """
    aside = path.with_name(f".{path.name}.aside-{os.getpid()}")
    try:
        path.parent.mkdir(exist_ok=True)  # not the run's directory: if that is gone, its disk is, and another one is below
        with aside.open("wb") as stream:
            torch.save(checkpoint, stream)
            stream.flush()
            os.fsync(stream.fileno())
        aside.rename(path)
        if best is not None:
            make_best(path, path.with_name(best))
    except (OSError, RuntimeError) as error:  # torch's own writer turns a full disk into a RuntimeError
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise storage_error(path, error, _size(checkpoint)) from None


def make_best(path: Path, best: Path) -> None:
    """Name a checkpoint the best, and remove those that were before it."""
    aside = best.with_name(f".{best.name}.aside-{os.getpid()}")
    aside.unlink(missing_ok=True)
    try:
        os.link(path, aside)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, aside)
    aside.rename(best)
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
    """One checkpoint's value of the monitored metric."""

    epoch: int
    step: int
    metric: str
    value: float

    def file_name(self) -> str:
        return f"best-epoch={self.epoch:02d}-{self.metric.replace('/', '_')}={self.value:.4f}.ckpt"


def settle(directory: Path, best: str, is_last: bool) -> None:
    """After a resume: the best is the one that the checkpoint knows of. A predecessor may have died between naming a new
    one and removing the old one, or before it named it."""
    path, last = directory / best, directory / LAST
    if not path.is_file() and is_last and last.is_file():
        make_best(last, path)
    if path.is_file():
        for other in directory.glob(BEST):
            if other != path:
                other.unlink(missing_ok=True)


def resumable_checkpoint(directory: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from, and what is wrong with those that would have come before it.

    last.ckpt; if it is torn or corrupt, the best; if that is too, none.
    """
    complaints: list[str] = []
    for path in [directory / LAST, *sorted(directory.glob(BEST))]:
        if path.is_file():
            if (reason := damage(path)) is None:
                return path, complaints
            complaints.append(f"{path} is damaged ({reason})")
    return None, complaints


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint file: None if every byte is as it was written."""
    try:
        with zipfile.ZipFile(path) as archive:
            if (bad := archive.testzip()) is not None:  # compares each part's checksum, which torch.load does not
                return f"checksum of {bad} is wrong"
        torch.load(path, map_location="meta", weights_only=True, mmap=True)
    except Exception as error:  # a torn file fails in many ways
        return " ".join(f"{type(error).__name__}: {error}".split())[:120]
    return None


def best_checkpoint(directory: Path) -> Path | None:
    return next(iter(sorted(directory.glob(BEST))), None)


def last_checkpoint(directory: Path) -> Path | None:
    path = directory / LAST
    return path if path.is_file() else None
