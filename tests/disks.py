"""A disk that is full, read-only or gone: a small tmpfs, mounted for the test."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest


class Disk:
    """A disk of some megabytes that can fail and be repaired."""

    def __init__(self, folder: Path, megabytes: int = 4) -> None:
        self.folder, self.kept = folder / "disk", folder / "kept"
        self.folder.mkdir()
        self.kept.mkdir()
        mount("-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", self.kept)
        mount("--bind", self.kept, self.folder)

    def fill(self) -> None:
        """Fill it to the last byte, as another program would."""
        with (self.folder / "filler").open("wb", buffering=0) as stream:
            for size in (65536, 4096, 1):
                with suppress(OSError):
                    while True:
                        stream.write(b"x" * size)

    def make_read_only(self) -> None:
        """Mount a read-only view of it on top: Linux refuses to make a mount read-only while files are open for writing."""
        mount("--bind", self.folder, self.folder)
        mount("-o", "remount,bind,ro", self.folder)

    def take_away(self) -> None:
        unmount(self.folder)

    def fix(self) -> None:
        """Restore it as it was."""
        (self.kept / "filler").unlink(missing_ok=True)
        self.remove(self.folder)
        mount("--bind", self.kept, self.folder)

    def remove(self, *folders: Path) -> None:
        for folder in folders or (self.folder, self.kept):
            while os.path.ismount(folder):
                unmount(folder)


def mount(*words: str | Path) -> None:
    subprocess.run(["mount", *map(str, words)], capture_output=True, check=True)


def unmount(folder: Path) -> None:
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    try:
        disk = Disk(tmp_path)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs the right to mount a small tmpfs: {error}")
    yield disk
    disk.remove()


@pytest.fixture
def other_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on another file system."""
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system here")
    folder = Path(tempfile.mkdtemp(dir=memory))
    yield folder
    shutil.rmtree(folder)
