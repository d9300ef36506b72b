"""A lease: an object that one process owns at a time, by conditional writes. What a file lock is on a disk.

Clocks of machines differ: a lease has run out for another process once that one has itself watched it unchanged for its duration. An
owner that was held up for longer finds out at its next renewal, which is conditional.
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from raytrain2p.storage.errors import StorageError
from raytrain2p.storage.objects import ABSENT, ChangedError, ObjectStore, Version

SECONDS = 30.0  # after which a lease that is not renewed may be taken over
POLL = 0.5  # seconds


class LostLeaseError(StorageError):
    """Another process has taken over: this one must not write any more. Its text is one line for the user."""


class Lease:
    """An object by which one process excludes others.

    Args:
        key: of the object.
        what: that it protects, for messages.
        seconds: its duration; it is renewed three times in that time.
    """

    def __init__(self, store: ObjectStore, key: str, what: str, seconds: float = SECONDS) -> None:
        self.store, self.key, self.what, self.seconds = store, key, what, seconds
        self.row: dict[str, Any] = {"owner": uuid.uuid4().hex, "pid": os.getpid(), "host": socket.gethostname(), "seconds": seconds}
        self.row |= {"process": this_process(), "renewals": 0}
        self.version: Version | None = None
        self.lost: str | None = None
        self.renewed = 0.0
        self.closing, self.writing = threading.Event(), threading.Lock()

    @contextmanager
    def held(self, patience: float, waiting: Callable[[str], None] = lambda holder: None) -> Iterator[str | None]:
        """Try for that many seconds, in which the server may be away. Yields None if this process has the lease, else the holder, such as
        `pid 4711 on node3`.

        Args:
            waiting: called once with the holder, if there is one.
        """
        if (holder := self._acquire(patience, waiting)) is not None:
            yield holder
            return
        thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        thread.start()
        try:
            yield None
        finally:
            self.closing.set()
            thread.join()
            with suppress(StorageError, ChangedError):
                self._write(released=True)

    def check(self, patience: float) -> None:
        """Check that this process still has the lease; asks the server, if that was some time ago.

        Args:
            patience: seconds for which the server may be away.

        Raises:
            LostLeaseError: it has not.
            StorageError: the server is away.
        """
        deadline = time.monotonic() + patience
        while self.lost is None and time.monotonic() - self.renewed > self.seconds / 2:
            try:
                self._renew()
            except StorageError:
                if time.monotonic() > deadline:
                    raise
        if self.lost is not None:
            raise LostLeaseError(
                f"{self.what} was taken over by {self.lost}, while this process ({self._name(self.row)}) was held up; it stops"
            )

    def is_renewed(self, silence: float) -> bool:
        """Whether a process has it, and has renewed it in that many seconds, if this machine's clock is right. For people alone."""
        if (found := self.store.read(self.key)) is None or (row := _row(found[0])).get("released") or is_dead(row):
            return False
        modified = next((one.modified for one in self.store.list(self.key.rpartition("/")[0] + "/") if one.key == self.key), 0.0)
        return time.time() - modified < silence

    def _acquire(self, patience: float, waiting: Callable[[str], None]) -> str | None:
        deadline, watched, since, asked = time.monotonic() + patience, Version(None), 0.0, False
        while True:
            try:
                found = self.store.read(self.key)
            except StorageError:
                if time.monotonic() > deadline:
                    raise
                continue
            if found is None:
                expected: Version | str = ABSENT
            else:
                row, expected = _row(found[0]), found[1]
                if not expected.same_as(watched):
                    watched, since = expected, time.monotonic()
                free = row.get("released") or is_dead(row) or time.monotonic() - since > float(row.get("seconds", SECONDS))
                if not free:
                    holder = self._name(row)
                    if not asked:
                        waiting(holder)
                        asked = True
                    if time.monotonic() > deadline:
                        return holder
                    time.sleep(POLL)
                    continue
            try:
                self.version = self.store.write(self.key, self._content(), expected)
            except ChangedError:
                continue  # another one was faster
            self.renewed = time.monotonic()
            return None

    def _keep(self) -> None:
        while not self.closing.wait(self.seconds / 3) and self.lost is None:
            with suppress(StorageError):  # the server is away, for others too
                self._renew()

    def _renew(self) -> None:
        try:
            self._write()
        except ChangedError:
            found = self.store.read(self.key)
            row = _row(found[0]) if found is not None else {}
            if found is not None and row.get("owner") == self.row["owner"]:
                self.version = found[1]
            else:
                self.lost = self._name(row)

    def _write(self, **more: Any) -> None:
        with self.writing:
            if self.lost is None and self.version is not None:
                self.row |= {"renewals": self.row["renewals"] + 1} | more
                began = time.monotonic()
                self.version = self.store.write(self.key, self._content(), self.version)
                self.renewed = began

    def _content(self) -> bytes:
        return json.dumps(self.row).encode()

    @staticmethod
    def _name(row: dict[str, Any]) -> str:
        return f"pid {row['pid']} on {row['host']}" if "pid" in row and "host" in row else "another process"


def _row(content: bytes) -> dict[str, Any]:
    with suppress(ValueError):
        row = json.loads(content)
        if isinstance(row, dict):
            return row
    return {}


def this_process() -> list[str]:
    """What tells this process from any other: the boot of its machine, its namespace of process IDs, its ID and its start."""
    with suppress(OSError, IndexError):
        started = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
        return [*_machine(), str(os.getpid()), started]
    return []


def is_dead(row: dict[str, Any]) -> bool:
    """Whether the process that wrote a lease ran on this machine, and has ended: nobody must wait for such a one."""
    known = row.get("process")
    with suppress(OSError, IndexError, TypeError):
        if not isinstance(known, list) or len(known) != 4 or known[:2] != _machine():
            return False
        try:
            stat = Path(f"/proc/{int(known[2])}/stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return True
        return stat[19] != known[3] or stat[0] == "Z"
    return False


def _machine() -> list[str]:
    return [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), str(Path("/proc/self/ns/pid").readlink())]
