"""The objects of a launch's run, where `output.root` is an object storage: owned by one process, fetched before it writes, uploaded after.

For an output root on a disk nothing here does anything.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from raytrain2p.config import Findings, InputError, Problem, base_directory
from raytrain2p.config.loading import root_problems
from raytrain2p.config.scratch import is_remote, is_url, local_path, public
from raytrain2p.storage.errors import StorageError
from raytrain2p.storage.files import remove
from raytrain2p.storage.lease import SECONDS, Lease
from raytrain2p.storage.objects import AT_THE_START, PATIENCE
from raytrain2p.storage.remote import AT_ONCE, Directory, check_conditions, fetch, lease_of, pull_root, run_folder
from raytrain2p.tracking.run import Run, launch_record, recorded_run
from raytrain2p.tracking.run_directory import is_checkpoint, is_record

CHECK = "check the bucket, the endpoint (AWS_ENDPOINT_URL), the region and the credentials in the environment"
SECONDS_TO_TAKE_OVER = SECONDS + 5  # a lease whose owner is gone, on another machine


def root_of(root: str, setting: str = "--root") -> str:
    """An output root as a user gave it, as a path; the records of one in an object storage are fetched.

    Raises:
        InputError: it is a URL of no object storage, or that does not answer.
    """
    if not is_url(root):
        return str(base_directory() / Path(root).expanduser())
    if problems := root_problems(root, setting):
        raise InputError(problems)
    open_root(local_path(root), setting)
    return local_path(root)


@contextmanager
def reporting_storage(where: str, fix: str = CHECK) -> Iterator[None]:
    """Within, an object storage that does not answer, or refuses, is bad input."""
    try:
        yield
    except StorageError as error:
        raise InputError(Problem(public(where), str(error), fix)) from None


def open_root(root: str, setting: str = "output.root", everything: bool = False) -> None:
    """Fetch the records of the runs under an output root: all but checkpoints, artifacts and plots, in whose place files of their size
    stand. What those hold is fetched when it is needed.

    Args:
        everything: fetch them too.

    Raises:
        InputError: the storage does not answer, or refuses it.
    """
    with reporting_storage(f"{setting}={root}"):
        pull_root(root, (lambda name: True) if everything else is_record)


def fetch_named(path: Path) -> None:
    """Fetch what a user named by its URL: the records of a run, or another file.

    Raises:
        StorageError: the storage does not answer, or refuses it.
    """
    if not is_remote(path):
        return
    if (folder := run_folder(path)) is not None:
        Directory(folder, patience=AT_THE_START).pull(is_record)
    else:
        fetch(path)


def check_root(root: str) -> list[Problem]:
    """A problem, if launches cannot write to an output root, or not exclusively."""
    with Findings() as findings, reporting_storage(f"output.root={root}", f"{CHECK}; they must allow to read, write, list and delete"):
        check_conditions(root)
    return findings.problems


def is_leased(root: str, launch_id: str, silence: float) -> bool:
    """Whether a process on any machine drives or trains a launch.

    Args:
        silence: seconds without a renewal after which it counts as dead, for people: clocks may differ by less.
    """
    with suppress(StorageError):
        return any(lease_of(root, f"{launch_id}.{role}", "").is_renewed(silence) for role in ("driver", "writer"))
    return False


@contextmanager
def only_driver(root: str, launch_id: str, say: Callable[[str], None]) -> Iterator[str | None]:
    """Within, no other process on any machine drives the launch. Yields None, or who does."""
    if not is_remote(root):
        yield None
        return

    def waiting(holder: str) -> None:
        say(f"launch {launch_id} is, or was, driven by {holder}; waiting {SECONDS:.0f} s to see whether it is alive")

    with lease_of(root, f"{launch_id}.driver", f"launch {launch_id}").held(SECONDS_TO_TAKE_OVER, waiting) as holder:
        yield holder


@contextmanager
def own_objects(root: str, launch_id: str, patience: float = PATIENCE, checkpoints: bool = True) -> Iterator[Lease | None]:
    """Within, this process alone writes to the launch's run, and its directory is as its objects are.

    Args:
        patience: seconds for which the storage may be away.
        checkpoints: fetch them too.

    Raises:
        RuntimeError: another process writes to it, and does not end.
        StorageError: the storage is away.
    """
    if not is_remote(root):
        yield None
        return
    lease = lease_of(root, f"{launch_id}.writer", f"the run of launch {launch_id}")
    with lease.held(2 * SECONDS_TO_TAKE_OVER) as holder:
        if holder is not None:
            raise RuntimeError(f"another process writes to the run of launch {launch_id} ({holder}), and does not end")
        remove(launch_record(root, launch_id))  # what was not uploaded does not count
        _fetch_launches(root, patience)
        if (run := recorded_run(root, launch_id)) is not None:
            Directory(run.path, patience=patience).pull(lambda name: checkpoints or not is_checkpoint(name), ours=True)
            run.files.sync_state.unlink(missing_ok=True)  # MLflow is asked what it has: more may have been sent since that was uploaded
        yield lease


@contextmanager
def own_ended(run: Run, seconds: float, patience: float = PATIENCE) -> Iterator[Callable[[], None] | None]:
    """Within, this process alone writes to a run whose own process is gone. What it wrote is uploaded after that. Yields a function
    that uploads it before; None if another process of this machine writes to the run.

    Args:
        seconds: for which a process of this machine may still hold the directory.

    Raises:
        RuntimeError, StorageError: as of `own_objects`.
    """
    root = str(run.path.parent.parent)
    with own_objects(root, run.launch_id, patience, checkpoints=False) as lease, run.files.lock.held(seconds) as holder:
        push = Directory(run.path, lease, patience).push if lease is not None else lambda: None
        try:
            yield push if holder is None else None
        finally:
            if holder is None:
                push()


def fetch_launch(root: str, *launch_ids: str, patience: float = AT_THE_START) -> None:
    """Fetch the records of launches, and those of their runs.

    Raises:
        StorageError: the storage is away, or refuses it.
    """
    if not launch_ids or not is_remote(root):
        return
    _fetch_launches(root, patience)

    def fetch_run(launch_id: str) -> None:
        with suppress(InputError):  # its record is damaged, as whoever reads it finds out
            if (run := recorded_run(root, launch_id)) is not None:
                Directory(run.path, patience=patience).pull(is_record)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(fetch_run, launch_ids))


def _fetch_launches(root: str, patience: float) -> None:
    Directory(launch_record(root, "any").parent, patience=patience).pull()
