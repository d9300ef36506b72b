"""Files of a run directory, each written aside and then renamed: what can be read is whole. And locks on them."""

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class Lock:
    """A file that one process holds at a time; it lets go when it dies, however it dies.

    Between machines this needs a file system with locks, such as NFS 4.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextmanager
    def held(self, seconds: float = 0.0) -> Iterator[str | None]:
        """Try for so long. Yields None if the lock is held within, else who has it: such as `pid 4711 on node3`."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
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

    def touch(self) -> None:
        """A sign of life, for machines that locks do not reach."""
        os.utime(self.path)

    def is_held(self) -> bool:
        """Whether a living process has it. Changes nothing."""
        try:
            with self.path.open("r+") as stream:  # NFS locks only what may be written to
                return not _locked(stream.fileno(), fcntl.LOCK_SH)
        except OSError:  # no such file; or on a disk that is read-only or gone, where nobody writes either
            return False


def _locked(descriptor: int, kind: int = fcntl.LOCK_EX) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
