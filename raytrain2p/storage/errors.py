"""A disk that is full, read-only or gone, in one line for the user."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT)
FAILED_DISK = (*OUT_OF_SPACE, errno.EROFS, errno.EIO, errno.ESTALE, errno.ENOTCONN)


class StorageError(RuntimeError):
    """The disk is full, read-only or gone. Its text is one line for the user."""


def storage_error(path: Path, error: Exception, needed: int) -> StorageError:
    """One line: the path, what is wrong with it, and the space that is needed."""
    folder = path.parent
    try:
        free = shutil.disk_usage(folder).free
    except OSError as gone:
        return StorageError(f"{path} cannot be written: {folder} is gone ({gone.strerror}); what was whole before stays as it is")
    full = free < needed or getattr(error, "errno", None) in OUT_OF_SPACE
    reason = "no space left" if full else " ".join(str(error).split())[:200]
    return StorageError(f"{path} cannot be written: {reason}; needed {needed / 1e6:.1f} MB, free {free / 1e6:.1f} MB")


def is_reachable(folder: Path) -> bool:
    """Whether a directory can be seen. One on a device that was pulled, or on a server that went away, cannot."""
    try:
        return folder.is_dir()
    except OSError:
        return False


@contextmanager
def reporting_disk_errors(path: Path, needed: int) -> Iterator[None]:
    """Within, a disk that fails ends with one line.

    Args:
        path: named in it, with the free space of its disk.
        needed: bytes, roughly.

    Raises:
        StorageError: the disk is full, read-only or gone.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        if not isinstance(error, OSError) and not isinstance(error.__context__, OSError):  # what torch's writer makes of one
            raise
        raise storage_error(path, error, needed) from None
