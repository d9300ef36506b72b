"""A disk that is full, read-only or gone, in one line for the user."""

import errno
import shutil
from pathlib import Path

OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT)


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
