"""Checkpoint files as tests make, read and damage them."""

import zipfile
from pathlib import Path
from typing import Any

import torch


def load(path: Path | None) -> dict[str, Any]:
    assert path is not None
    found: dict[str, Any] = torch.load(path, weights_only=True)
    return found


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def tear(path: Path) -> None:
    """Leave the first half of a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_bit(path: Path) -> None:
    """Change one bit of the weight; the file keeps its size, and torch notices nothing."""
    weight = load(path)["state_dict"]["weight"].numpy().tobytes()
    with zipfile.ZipFile(path) as archive:
        (offset,) = [info.header_offset for info in archive.infolist() if archive.read(info) == weight]
    content = bytearray(path.read_bytes())
    content[content.index(weight, offset)] ^= 1
    path.write_bytes(content)
    assert load(path)["state_dict"]["weight"].numpy().tobytes() != weight


def content(megabytes: float, value: float = 1.0) -> dict[str, Any]:
    return {"state_dict": {"weight": torch.full((round(megabytes * 250_000),), value)}}
