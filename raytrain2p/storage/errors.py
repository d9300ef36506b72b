"""A disk that is full, read-only or gone, in one line for the user."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT)
FAILED_DISK = (*OUT_OF_SPACE, errno.EROFS, errno.EIO, errno.ESTALE, errno.ENOTCONN)


class StorageError(RuntimeError):
    """The disk is full, read-only or gone, or MLflow takes no run. Its text is one line for the user."""


def is_disk_failure(error: BaseException) -> bool:
    """Whether a disk that is full, read-only or gone raised an exception, or one that was being handled when it was raised:
    torch's writer turns the former into a RuntimeError.
    """
    return any(
        isinstance(one, StorageError) or (isinstance(one, OSError) and one.errno in FAILED_DISK) for one in (error, error.__context__)
    )


def storage_error(path: Path, error: Exception, needed: int) -> StorageError:
    """One line: the path, the reason, and the space that is needed."""
    folder = path.parent
    try:
        free = shutil.disk_usage(folder).free
    except OSError as gone:
        return StorageError(f"{path} cannot be written: {folder} is gone ({gone.strerror}); complete files are unchanged")
    full = free < needed or getattr(error, "errno", None) in OUT_OF_SPACE
    reason = "no space left" if full else " ".join(str(error).split())[:200]
    return StorageError(f"{path} cannot be written: {reason}; needed {needed / 1e6:.1f} MB, free {free / 1e6:.1f} MB")


def is_reachable(folder: Path) -> bool:
    """Whether a directory can be accessed. One on a device that was removed, or on a server that is down, cannot."""
    try:
        return folder.is_dir()
    except OSError:
        return False


@contextmanager
def reporting_disk_errors(path: Path, needed: int) -> Iterator[None]:
    """Turn the disk errors of a block that writes files into one line for the user.

    Args:
        path: named in that line, with the free space of its disk.
        needed: bytes, roughly.

    Raises:
        StorageError: any OSError, or what torch's writer makes of a failed disk.
    """
    try:
        yield
    except StorageError:
        raise
    except (OSError, RuntimeError) as error:
        if not isinstance(error, OSError) and not isinstance(error.__context__, OSError):  # what torch's writer makes of one
            raise
        raise storage_error(path, error, needed) from None
