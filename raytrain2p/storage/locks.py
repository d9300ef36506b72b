"""File locks that end with their process. No other module locks files."""

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class Lock:
    """A file that one process holds at a time. It is released when the process ends, even by SIGKILL.

    Between machines this needs a file system with locks, such as NFS 4. In place of the `filelock` package, because it names
    its holder, and because it can be asked whether it is held without being taken.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextmanager
    def held(self, seconds: float = 0.0) -> Iterator[str | None]:
        """Try for that long (`math.inf`: forever). Yields None if this process has the lock, else the holder, such as
        `pid 4711 on node3`. The directory must exist: where a run's is gone, none is made in its place."""
        with self.path.open("a+") as stream:
            deadline = time.monotonic() + seconds
            while not _locked(stream.fileno()):
                if time.monotonic() >= deadline:
                    stream.seek(0)
                    yield stream.read().strip() or "another process"
                    return
                time.sleep(0.2)
            with suppress(OSError):  # on a full disk the name of the holder is missing, nothing else
                stream.truncate(0)
                os.write(stream.fileno(), f"pid {os.getpid()} on {socket.gethostname()}\n".encode())
            yield None

    @contextmanager
    def shared(self) -> Iterator[bool]:
        """Within, no process has the lock, and one that wants it waits. Yields False, and does nothing, if a process has it. The directory
        must exist."""
        with self.path.open("a+") as stream:
            yield _locked(stream.fileno(), fcntl.LOCK_SH)

    def touch(self) -> None:
        """Update the file's time: a heartbeat for machines that locks do not reach."""
        os.utime(self.path)

    def is_held(self) -> bool:
        """Whether a process has the lock. Changes nothing."""
        try:
            with self.path.open("r+") as stream:  # NFS locks only what may be written to
                return not _locked(stream.fileno(), fcntl.LOCK_SH)
        except OSError:  # no such file; or on a disk that is read-only or gone, where no process writes either
            return False


def _locked(descriptor: int, kind: int = fcntl.LOCK_EX) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
