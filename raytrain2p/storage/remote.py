"""Directories in scratch that stand for objects: what was written is uploaded, and what another machine wrote is fetched.

The objects are the truth; a directory in scratch is a copy that may be removed whenever nothing runs. `.objects` in it records which
version of each object its files are. A file whose time is 0 (1970) is a sparse stand-in of the object's size, which was not fetched yet:
names and sizes are right, and whoever reads its content calls `fetch` before.

Functions here take any path, and do nothing for one that is not in scratch.
"""

import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from raytrain2p.config.scratch import is_remote, public, scratch_directory
from raytrain2p.storage.errors import StorageError
from raytrain2p.storage.files import PARTIAL, read_json, remove, write_json
from raytrain2p.storage.lease import Lease
from raytrain2p.storage.locks import Lock
from raytrain2p.storage.objects import ABSENT, AT_THE_START, PATIENCE, ChangedError, Object, ObjectStore, Version

STATE, LOCK = ".objects", ".objects.lock"
WRITER = ".lock"  # of a run's directory, held by the process that writes to it
NOT_OBJECTS = (STATE, LOCK, WRITER)
LAUNCHES = ".launches"
AT_ONCE = 16  # requests
SECONDS_BETWEEN, SHARE = 10.0, 0.05  # of uploads of metrics between checkpoints: at least that apart, and at most that share of the time
SECONDS_TO_PULL = 600.0  # for which another process of this machine may fetch the same directory
LARGEST_COPY = 5 * 10**9  # bytes that S3 copies in one request
WITH_CONDITION = 16 * 2**20  # bytes: larger files are sent in parts, which cannot be written with a condition


@dataclass(frozen=True)
class Known:
    """A file as it was when it was the object: its size and time, and the object's version."""

    size: int
    time: int
    e_tag: str | None
    number: str | None

    @property
    def version(self) -> Version:
        return Version(self.e_tag, self.number)


def store_of(path: Path, patience: float = PATIENCE) -> tuple[ObjectStore, str]:
    """The bucket of a path in scratch, and the key in it."""
    parts = path.relative_to(scratch_directory()).parts
    return ObjectStore(f"{parts[0]}://{parts[1]}", patience), "/".join(parts[2:])


class Directory:
    """A directory in scratch, of a run or of the launches' records, and the objects that it stands for.

    Args:
        path: in scratch.
        lease: of the process that writes to it, if that is this one; it is checked before each upload.
        patience: seconds for which the server may be away.
        store: of its bucket, if there is one already: it keeps connections.
    """

    def __init__(self, path: Path, lease: Lease | None = None, patience: float = PATIENCE, store: ObjectStore | None = None) -> None:
        self.path, self.lease, self.patience = path, lease, patience
        made, self.prefix = store_of(path, patience)
        self.store = store or made
        self.one_at_a_time, self.next_push = threading.RLock(), 0.0

    def pull(self, content: Callable[[str], bool] = lambda name: True, ours: bool = False, listed: Sequence[Object] | None = None) -> None:
        """Make the directory as the objects are.

        Args:
            content: whether an object's content is fetched, by its name in the directory; else a stand-in of its size is made.
            ours: files that are not (yet) objects are removed, too: nothing but this process writes here. Otherwise they are left alone,
                for a process of this machine may be about to upload them.
            listed: the objects, if they were listed already.

        Raises:
            StorageError: the storage has been away for too long, or the disk is full.
        """
        if not ours and Lock(self.path / WRITER).is_held():
            return  # a process of this machine writes here: what it has is newer
        self.path.mkdir(parents=True, exist_ok=True)
        writer = nullcontext(True) if ours else Lock(self.path / WRITER).shared()
        with self.one_at_a_time, Lock(self.path / LOCK).held(SECONDS_TO_PULL), writer as is_free:
            if not is_free:
                return  # one that has just begun
            known = self._known()
            there = {one.key.removeprefix(f"{self.prefix}/"): one for one in listed or ()}
            if listed is None or any(name not in there for name in known):  # a process of this machine may have uploaded more since
                there = {one.key.removeprefix(f"{self.prefix}/"): one for one in self.store.list(f"{self.prefix}/")}
            for name in [*known, *(self._files() if ours else ())]:
                if name not in there and (ours or self._is_as_known(name, known)):
                    remove(self.path / name)
                    known.pop(name, None)
            wanted = [one for name, one in there.items() if self._is_behind(name, one, known, content(name), ours)]
            for folder in {(self.path / name).parent for name in there}:
                folder.mkdir(parents=True, exist_ok=True)
            ends = [one for one in wanted if one.key.endswith("/status.json")]  # who reads that a run has ended finds all of it
            with ThreadPoolExecutor(AT_ONCE) as pool:
                for part in ([one for one in wanted if one not in ends], ends):
                    for name, found in pool.map(lambda one: self._take(one, content), part):
                        known.pop(name, None)
                        if found is not None:
                            known[name] = found
            self._write_known(known)

    def push(self, names: Iterable[str] | None = None) -> None:
        """Upload the files that are not as they were uploaded last. Objects whose files are gone are deleted after that.

        Args:
            names: of files; the directory is otherwise taken as a whole. Of metrics, whole lines are sent.

        Raises:
            LostLeaseError: another process has taken over.
            StorageError: the storage has been away for too long, or refuses it.
        """
        with self.one_at_a_time, Lock(self.path / LOCK).held(SECONDS_TO_PULL):
            known = self._known()
            chosen = self._files() if names is None else list(names)
            sent: dict[tuple[int, int], str] = {}  # inode and time of large files: the best checkpoint is the last one's second name
            for name in sorted(chosen, key=_order):
                self._push(name, known, sent)
            gone = [] if names is not None else [name for name in known if name not in chosen and not (self.path / name).exists()]
            if gone:
                self._check()
                self.store.delete(f"{self.prefix}/{name}" for name in gone)
                for name in gone:
                    del known[name]
            self._write_known(known)

    def push_soon(self, name: str) -> None:
        """Upload a growing file, unless that was just done, the storage is away, or an upload is under way."""
        if time.monotonic() < self.next_push or not self.one_at_a_time.acquire(blocking=False):
            return
        try:
            began, quick = time.monotonic(), Directory(self.path, self.lease, 0.0)
            with suppress(StorageError):
                quick.push([name])
            self.next_push = time.monotonic() + max(SECONDS_BETWEEN, (time.monotonic() - began) / SHARE)
        finally:
            self.one_at_a_time.release()

    def pushed(self, name: str) -> int:
        """Bytes of a file that have been uploaded."""
        found = self._known().get(name)
        return found.size if found is not None else 0

    def _push(self, name: str, known: dict[str, Known], sent: dict[tuple[int, int], str]) -> None:
        path, key, before = self.path / name, f"{self.prefix}/{name}", known.get(name)
        try:
            stat = path.stat()
        except FileNotFoundError:
            return  # replaced by another name just now
        if before is not None and (before.size, before.time) == (stat.st_size, stat.st_mtime_ns):
            return
        self._check()
        size, twin = stat.st_size, sent.get((stat.st_ino, stat.st_mtime_ns))
        if twin is not None and stat.st_size < LARGEST_COPY:
            version = self.store.copy(f"{self.prefix}/{twin}", key)
        elif size > WITH_CONDITION and not name.endswith(".jsonl"):
            version = self.store.write(key, path)
            self._check()
        else:
            content = path.read_bytes()
            if name.endswith(".jsonl"):  # another thread may be writing a line
                content = content[: content.rfind(b"\n") + 1]
            size = len(content)
            version = self._write(key, content, before)
        if name.endswith(".ckpt"):
            sent[stat.st_ino, stat.st_mtime_ns] = name
        known[name] = Known(size, stat.st_mtime_ns, version.e_tag, version.number)
        self._write_known(known)

    def _write(self, key: str, content: bytes, before: Known | None) -> Version:
        """Write an object where it is as it was; if it is not, but the lease is still ours, the owner before us has just written it."""
        expected: Version | str = before.version if before is not None else ABSENT
        while True:
            try:
                return self.store.write(key, content, expected)
            except ChangedError as error:
                if self.lease is None:
                    raise StorageError(str(error)) from None
                self.lease.renewed = 0.0
                self._check()
                found = self.store.read(key)
                expected = found[1] if found is not None else ABSENT

    def _check(self) -> None:
        if self.lease is not None:
            self.lease.check(self.patience)

    def _take(self, one: Object, content: Callable[[str], bool]) -> tuple[str, Known | None]:
        name = one.key.removeprefix(f"{self.prefix}/")
        path, version = self.path / name, one.version
        if not content(name) and one.size:
            aside = path.with_name(f".{path.name}.aside-{os.getpid()}")
            with aside.open("wb") as stream:
                stream.truncate(one.size)
            os.utime(aside, ns=(0, 0))
            aside.rename(path)
        else:
            found = self.store.download(one.key, path)
            if found is None:
                return name, None  # deleted just now
            version = found
        stat = path.stat()
        return name, Known(stat.st_size, stat.st_mtime_ns, version.e_tag, version.number)

    def _is_behind(self, name: str, one: Object, known: dict[str, Known], content: bool, ours: bool) -> bool:
        """Whether a file is to be replaced by its object."""
        if not (self.path / name).exists():
            return True
        if not self._is_as_known(name, known):
            return ours or self.path.name != LAUNCHES  # of a run that no process of this machine writes: its lock is free
        stand_in = known[name].time == 0 and one.size > 0
        return not known[name].version.same_as(one.version) or (content and stand_in)

    def _is_as_known(self, name: str, known: dict[str, Known]) -> bool:
        with suppress(OSError):
            stat, found = (self.path / name).stat(), known.get(name)
            return found is not None and (found.size, found.time) == (stat.st_size, stat.st_mtime_ns)
        return False

    def _files(self) -> list[str]:
        """The files that are, or are to be, objects."""
        found = [path for path in self.path.rglob("*") if path.is_file() and not path.match(PARTIAL)]
        names = [path.relative_to(self.path).as_posix() for path in found]
        return [name for name in names if name not in NOT_OBJECTS and not name.endswith(".lock")]

    def _known(self) -> dict[str, Known]:
        with suppress(ValueError, TypeError, AttributeError):
            return {name: Known(**row) for name, row in (read_json(self.path / STATE) or {}).items()}
        return {}

    def _write_known(self, known: dict[str, Known]) -> None:
        write_json(self.path / STATE, {name: asdict(row) for name, row in known.items()})


def _order(name: str) -> tuple[int, str]:
    """Metrics before the checkpoint of their steps, the last checkpoint before the best, and what says that a run has ended at the end."""
    last = ("last.ckpt", "result.json", "status.json")
    first = 0 if name.endswith(".jsonl") else 1
    return (2 + last.index(base) if (base := name.rpartition("/")[2]) in last else 3 if name.endswith(".ckpt") else first, name)


def is_stand_in(path: Path) -> bool:
    with suppress(OSError):
        return path.stat().st_mtime_ns == 0
    return False


def fetch(path: Path, patience: float = AT_THE_START) -> None:
    """Fetch one object, unless the file is that object already. Where there is none, there is no file after that.

    Raises:
        StorageError: the storage is away, or refuses it.
    """
    if not is_remote(path):
        return
    if (folder := run_folder(path)) is None:
        store, key = store_of(path, patience)
        path.parent.mkdir(parents=True, exist_ok=True)
        if store.download(key, path) is None:
            path.unlink(missing_ok=True)
        return
    name = path.relative_to(folder).as_posix()

    def content(one: str) -> bool:
        """The object, small files, and what is here already."""
        is_here = (folder / one).exists() and not is_stand_in(folder / one)
        return one == name or is_here or not one.endswith((".ckpt", ".pt", ".png"))

    Directory(folder, patience=patience).pull(content)


def run_folder(path: Path) -> Path | None:
    """The directory of the run that a path lies in, or is: its name begins with a run ID."""
    return next((one for one in (path, *path.parents) if len(one.name) > 32 and one.name[32] == "_"), None)


def pull_root(root: str, content: Callable[[str], bool], patience: float = AT_THE_START) -> None:
    """Make the directories under an output root as the objects are.

    Args:
        content: as of `Directory.pull`.

    Raises:
        StorageError: the storage is away, or refuses it.
    """
    if not is_remote(root):
        return
    store, prefix = store_of(Path(root), patience)
    groups: dict[str, list[Object]] = defaultdict(list)
    for one in store.list(f"{prefix}/" if prefix else ""):
        parts = one.key.removeprefix(f"{prefix}/" if prefix else "").split("/")
        if parts[0] == LAUNCHES or (len(parts) > 2 and not parts[0].startswith(".")):
            groups[LAUNCHES if parts[0] == LAUNCHES else "/".join(parts[:2])].append(one)
    (Path(root) / LAUNCHES).mkdir(parents=True, exist_ok=True)
    here = {path.relative_to(root).as_posix() for path in Path(root).glob("*/*/") if (path / STATE).is_file()}

    def pull_one(name: str) -> None:
        folder = Path(root) / name
        listed = groups[name] if name != LAUNCHES else []  # processes of this machine may have added to them meanwhile
        Directory(folder, patience=patience, store=store).pull(content, listed=listed or None)
        if not listed and name != LAUNCHES and not any(path.is_file() for path in folder.rglob("*") if path.name not in NOT_OBJECTS):
            remove(folder)  # of a run that was deleted

    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(pull_one, sorted({LAUNCHES, *groups, *here})))


def pull(folder: Path) -> None:
    """Make a run's directory as its objects are, which no other process writes."""
    if is_remote(folder):
        Directory(folder).pull(ours=True)


def push_file(path: Path) -> None:
    """Upload one file at once, on condition that its object is as it was when it was fetched or uploaded last."""
    if is_remote(path):
        Directory(path.parent).push([path.name])


def lease_of(root: str, name: str, what: str) -> Lease:
    """A lease under an output root in scratch.

    Args:
        name: of the lease, such as a launch's.
        what: that it protects, for messages.
    """
    store, prefix = store_of(Path(root), AT_THE_START)
    return Lease(store, f"{prefix}/.leases/{name}".lstrip("/"), what)


def next_number(root: str, least: int) -> int:
    """A number that no other process gets, larger than all before it."""
    store, prefix = store_of(Path(root))
    key = f"{prefix}/.launches/.sequence".lstrip("/")
    while True:
        found = store.read(key)
        last = found[0].split()[:1] if found is not None else []
        number = max(least, int(last[0]) if last and last[0].isdigit() else 0) + 1
        try:  # whose it is tells it from the same number of another process
            store.write(key, f"{number} {os.urandom(8).hex()}\n".encode(), found[1] if found is not None else ABSENT)
        except ChangedError:
            continue
        return number


def check_conditions(root: str) -> None:
    """Check that the storage is there, takes objects, and honours the conditions that exclusive writing is built on.

    Raises:
        StorageError: it does not.
    """
    if not is_remote(root):
        return
    store, prefix = store_of(Path(root), AT_THE_START)
    key = f"{prefix}/.leases/.probe-{os.urandom(4).hex()}".lstrip("/")
    version, taken = store.write(key, b"1", ABSENT), 0
    for expected in (ABSENT, Version(f'"{"0" * 32}"', version.number and "1")):
        try:
            store.write(key, b"2", expected)
        except ChangedError:
            taken += 1
    store.delete([key])
    if taken < 2:
        raise StorageError(
            f"{public(root)} does not honour conditional writes (If-None-Match, If-Match): two launches could write to one run"
        )
