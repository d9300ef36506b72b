"""What runs on each node to see what it has. The standard library alone, and sent by value: a node may lack this package."""

import errno
import importlib
import importlib.metadata
import os
import time
from collections.abc import Iterable, Mapping

ABSENT, OTHER, FULL = "does not exist", "is not the directory that the driver sees", "has no space left"  # what is wrong with a folder
PACKAGE = "raytrain2p"
PAUSE = 0.1  # seconds between two looks: network file systems keep attributes for some time


def look(
    node: str, folders: Iterable[str], files: Mapping[str, Mapping[str, int]], packages: Iterable[str], seconds: float
) -> tuple[dict[str, str], dict[str, tuple[int, int, str]], dict[str, str]]:
    """Write a file into each folder, which the driver has made, and look at files and packages.

    Args:
        node: its ID, which becomes the name of the file.
        files: paths and sizes, by setting.
        seconds: for which to wait for a folder that is not to be seen.

    Returns:
        What is wrong with folders; how many files are missing and how many are not as they should be, and one of these, by setting; and
        versions of packages: a space and the reason if there is none.
    """
    end = time.monotonic() + seconds
    written = {folder: write(folder, node, end) for folder in folders}
    differing = {}
    for setting, sizes in files.items():
        found = {path: size_of(path) for path in sizes}
        if wrong := [path for path, size in found.items() if size != sizes[path]]:
            differing[setting] = (list(found.values()).count(-1), len(wrong), wrong[0])
    return {folder: wrong for folder, wrong in written.items() if wrong}, differing, {one: version(one) for one in packages}


def write(folder: str, name: str, end: float) -> str:
    """What is wrong, if anything. Where there is no such folder, nothing is written."""
    while True:
        try:
            with open(os.path.join(folder, name), "w") as stream:  # noqa: PTH118, PTH123
                stream.write(name)
                stream.flush()
                os.fsync(stream.fileno())
            return ""
        except FileNotFoundError:
            if time.monotonic() > end:
                return OTHER if os.path.isdir(os.path.dirname(folder)) else ABSENT  # noqa: PTH112, PTH120
            time.sleep(PAUSE)
        except OSError as error:
            return FULL if error.errno in (errno.ENOSPC, errno.EDQUOT) else f"cannot be written to: {error.strerror}"


def unseen(node: str, names: Mapping[str, Iterable[str]], seconds: float) -> dict[str, list[str]]:
    """Names in each folder whose files, which others have written, are not to be seen here."""
    end = time.monotonic() + seconds
    found = {}
    for folder, written in names.items():
        left = list(written)
        while left := [name for name in left if not has(folder, name)]:
            if time.monotonic() > end:
                found[folder] = left
                break
            time.sleep(PAUSE)
    return found


def has(folder: str, name: str) -> bool:
    try:
        with open(os.path.join(folder, name)) as stream:  # noqa: PTH118, PTH123
            return stream.read() == name
    except OSError:
        return False


def size_of(path: str) -> int:
    """-1 if there is no such file."""
    try:
        return os.stat(path).st_size  # noqa: PTH116
    except OSError:
        return -1


def version(package: str) -> str:
    """Without what a build adds, such as `+cpu`."""
    try:
        found = importlib.import_module(package).__version__ if package == PACKAGE else importlib.metadata.version(package)
    except Exception as error:  # foreign code
        return f" {error}"
    return str(found).partition("+")[0]
