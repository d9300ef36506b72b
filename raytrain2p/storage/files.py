"""Atomic files: written beside their place, put on disk, renamed. No other module writes files this way."""

import errno
import fnmatch
import glob
import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from raytrain2p.config.scratch import public

# What file systems answer that cannot sync a directory: network and FUSE mounts among them.
NO_DIRECTORY_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EACCES)
# What a path answers at which there is no file that this process may read. Other errors are the disk's.
NOT_A_FILE = (errno.EISDIR, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO)
MOST_JSON = 2**28  # bytes: ours have a few MB at most
PARTIAL = ".*.aside-*"  # files that are half written, or were when their process was killed


@contextmanager
def replaced(path: Path) -> Iterator[BinaryIO]:
    """A stream whose content replaces a file in one step: a reader sees the whole old content or the whole new one.

    When the block ends, the new content and its name are on disk. If the block raises, the file stays as it was.
    The directory must exist.
    """
    with written_aside(path) as aside, aside.open("wb") as stream:
        yield stream


def write_file(path: Path, content: str | bytes) -> None:
    """Replace a file by new content, atomically.

    Its directory is made if need be, but none above it: where a run's directory is gone, its disk was taken away, and what
    is made in its place would lie on another one. Text has URLs in place of paths in scratch.
    """
    path.parent.mkdir(exist_ok=True)
    with replaced(path) as stream:
        stream.write(public(content).encode() if isinstance(content, str) else content)


def write_json(path: Path, value: Any) -> None:
    write_file(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The value that `write_json` wrote; None if the file does not exist.

    Raises:
        ValueError: it cannot have written that, or it cannot be read. The text is what is wrong, in a few words.
        OSError: the disk has failed.
    """
    try:
        with open(path, "rb", opener=_without_waiting) as stream:
            found = os.fstat(stream.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise ValueError("is not a file, but a pipe or a device")
            if found.st_size > MOST_JSON:
                raise ValueError(f"has {found.st_size / 1e9:.1f} GB, more than any such file")
            content = stream.read()
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno not in NOT_A_FILE:
            raise
        raise ValueError(f"cannot be read: {error.strerror}") from None
    if not content.strip(b"\0"):
        raise ValueError("has zero bytes alone, as after a power failure" if content else "is empty")
    try:
        value = json.loads(content.decode())
        if b"\\u" in content:  # half characters, which can be neither printed nor written again
            json.dumps(value, ensure_ascii=False).encode()
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise ValueError(f"is not UTF-8 text ({error.reason})") from None
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"is not JSON: {error}") from None
    if value is None:
        raise ValueError("is `null`")
    return value


def _without_waiting(path: str, flags: int) -> int:
    """Opens a file; also a pipe to which nobody writes, for which `open` would wait forever."""
    return os.open(path, flags | os.O_NONBLOCK)


def trim_torn_line(path: Path) -> None:
    """Cut off an incomplete last line, left by a killed process: the next one begins a line of its own."""
    if not path.is_file():
        return
    with path.open("rb+") as stream:
        end = stream.seek(0, os.SEEK_END)
        tail = b""
        while end and b"\n" not in tail:
            start = max(0, end - 4096)
            stream.seek(start)
            tail = stream.read(end - start) + tail
            end = start
        stream.truncate(end + tail.rfind(b"\n") + 1)


def link_file(source: Path, path: Path) -> None:
    """Give a file a second name, atomically: a hard link, or a copy where the file system has none."""
    with written_aside(path) as aside:
        aside.unlink(missing_ok=True)  # left by a killed process that had this process ID
        try:
            os.link(source, aside)
        except OSError:
            shutil.copyfile(source, aside)


def move(source: Path, target: Path) -> None:
    """Move a file, a link or a whole directory. Between disks it is copied aside, renamed once it is on disk, and only then removed
    where it was. After a kill at any moment, the same call finishes it, and so does the call in the other direction.

    Raises:
        FileExistsError: both are there, and neither is a copy of the other, or of a part of it.
        OSError: the disk is full, read-only or gone. The same call finishes it later.
    """
    if os.path.lexists(target) and not _has_all(target, source) and _has_all(source, target):
        remove(target)  # a move in the other direction, between disks, was killed before it had removed all of it
    if not os.path.lexists(target):
        try:
            source.rename(target)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            _copy(source, target)
    if os.path.lexists(source):
        if not _has_all(target, source):
            raise FileExistsError(errno.EEXIST, f"is there already, and is not {source}", str(target))
        remove(source)
    for folder in {source.parent, target.parent}:
        _sync_directory(folder)


def _copy(source: Path, target: Path) -> None:
    aside = target.with_name(f".{target.name}.aside-move")  # one name: what a killed process left is replaced
    remove(aside)
    try:
        if source.is_dir() and not source.is_symlink():
            shutil.copytree(source, aside, symlinks=True)
        else:
            shutil.copy2(source, aside, follow_symlinks=False)
        for path in [aside, *aside.rglob("*")]:
            if path.is_dir():
                _sync_directory(path)
            elif not path.is_symlink():
                _sync(path)
        aside.rename(target)
    except BaseException:
        remove(aside)
        raise


def _has_all(copy: Path, path: Path) -> bool:
    """Whether all of `path` is in `copy`, with the same kinds, sizes and times. Some file systems keep times to 2 seconds."""
    for one in [path, *(path.rglob("*") if not path.is_symlink() else ())]:
        inner = copy / one.relative_to(path)
        if not os.path.lexists(inner):
            return False
        mine, other = one.lstat(), inner.lstat()
        if stat.S_IFMT(mine.st_mode) != stat.S_IFMT(other.st_mode):
            return False
        is_folder = stat.S_ISDIR(mine.st_mode)
        if not is_folder and (mine.st_size != other.st_size or abs(mine.st_mtime_ns - other.st_mtime_ns) > 2e9):
            return False
    return True


def remove(path: Path) -> None:
    """Remove a file, a link or a whole directory, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()


def regular_files(path: Path) -> Iterator[os.stat_result]:
    """A file, or each one under a directory, hard links as often as they are there. Symbolic links in it do not count, nor does what
    vanishes meanwhile."""
    inside = (os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names)  # noqa: PTH118 - of thousands of files
    for name in [str(path), *inside]:
        with suppress(OSError):
            if stat.S_ISREG((found := os.lstat(name)).st_mode):
                yield found


def partial_files(folder: Path) -> list[Path]:
    """What processes are writing below a directory, or were when they were killed."""
    # Not rglob, which takes four times as long
    return [Path(inside, name) for inside, _, names in os.walk(folder) for name in fnmatch.filter(names, PARTIAL)]


def remove_partial_files(folder: Path) -> None:
    """Remove what killed processes left half written below a directory. No other process may be writing there."""
    for aside in partial_files(folder):
        aside.unlink(missing_ok=True)


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A path beside `path`; the file that the block writes there takes its place."""
    aside = path.with_name(f".{path.name}.aside-{os.getpid()}")
    try:
        yield aside
        _sync(aside)
        aside.rename(path)
        _sync_directory(path.parent)
    finally:
        with suppress(OSError):  # on a disk that has failed: its first error is the one to report
            aside.unlink(missing_ok=True)


@contextmanager
def directory_aside(path: Path) -> Iterator[Path]:
    """A new directory beside `path`; with what the block writes there, it takes the place of `path`, which may be there.

    Between the two renames that this takes, neither is at `path`; both are whole.
    """
    remove_asides(path)
    aside, before = (path.with_name(f".{path.name}.aside-{os.getpid()}{name}") for name in ("", "-before"))
    aside.mkdir()
    try:
        yield aside
        for one in [*aside.rglob("*"), aside]:
            (_sync_directory if one.is_dir() else _sync)(one)
        if os.path.lexists(path):
            path.rename(before)
        try:
            aside.rename(path)
        except OSError:
            before.rename(path)
            raise
        _sync_directory(path.parent)
    finally:
        with suppress(OSError):
            remove_asides(path)


def remove_asides(path: Path) -> None:
    """Remove what is, or was left by killed processes, beside a directory."""
    for aside in path.parent.glob(f".{glob.escape(path.name)}.aside-*"):
        remove(aside)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_directory(path: Path) -> None:
    try:
        _sync(path)
    except OSError as error:
        if error.errno not in NO_DIRECTORY_SYNC:
            raise
