"""Afterwards: what MLflow does not have is sent, and runs that died without a word are found out."""

import socket
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from raytrain2p.config import InputError
from raytrain2p.config.secrets import one_line
from raytrain2p.tracking.files import read_json
from raytrain2p.tracking.lookup import find_run, run_directories
from raytrain2p.tracking.mirror import Mirror, RunDirectoryError
from raytrain2p.tracking.run import (
    LAUNCH_TAG,
    ROOT_TAG,
    SWEEP_TAG,
    Run,
    launch_lock,
    read_status,
    recorded_run,
    run_lock,
    run_of,
    run_tags,
    write_status,
)
from raytrain2p.tracking.storage import storage_error
from raytrain2p.tracking.store import STORE_ERRORS, check_password, client_of
from raytrain2p.tracking.sweeps import SWEEPS

PHASES = ("alignment", "phase2", SWEEPS)  # names of directories under `output.root`
SILENCE = 120.0  # seconds after which a run on another machine counts as dead, where locks do not reach across machines


def runs_to_look_at(root: str, wanted: Sequence[str]) -> list[Run]:
    """The runs named, or all.

    Raises:
        InputError: every name that fits none, or more than one.
    """
    if wanted:
        return [find_run(root, PHASES, name, "RUN") for name in wanted]
    noted = [read_json(directory / "run.json") for directory in run_directories(root, PHASES)]
    return [run_of(one) for one in noted if one is not None]


def is_alive(run: Run, root: str) -> bool:
    """Whether a process still works on it, here or on another machine, or a sweep has it wait."""
    if launch_lock(root, run.launch_id).is_held() or run_lock(run).is_held():
        return True
    if (sweep := run_tags(run.path).get(SWEEP_TAG)) is not None:
        noted = [read_json(directory / "run.json") for directory in Path(root, SWEEPS).glob(f"{sweep}_*")]
        if any(launch_lock(root, one["launch_id"]).is_held() for one in noted if one is not None):
            return True
    lock = run_lock(run).path
    elsewhere = read_status(run.path)["host"] not in ("", socket.gethostname())
    return elsewhere and lock.is_file() and time.time() - lock.stat().st_mtime < SILENCE


def sync(run: Run, root: str, uri: str | None, tell: Callable[[str], None]) -> bool:
    """Send what MLflow does not have of a run that is over; whether it has everything then.

    Args:
        run: to send.
        root: where run directories are.
        uri: tracking URI, if another than the run's is meant, or one with its password.
        tell: takes a line about each run with which something was done, or could not be.
    """
    name = f"{run.phase} {run.run_id[:8]}"
    if is_alive(run, root):
        tell(f"{name}  under way; it sends by itself")
        return True
    try:
        mirror = Mirror(run, tracking_uri(run, uri))
        if mirror.complete():
            return True
        with ExitStack() as stack:
            try:
                holder = stack.enter_context(run_lock(run).held(5.0))  # another `sync` may be at it
            except OSError as error:
                raise RunDirectoryError(str(storage_error(run_lock(run).path, error, 1_000))) from None
            if holder is None:
                mirror.send()
    except InputError as error:
        tell(f"{name}  {error.problems[0].where}: {error.problems[0].what}; {error.problems[0].mend}")
        return False
    except RunDirectoryError as error:
        tell(f"{name}  {error}")
        return False
    except STORE_ERRORS as error:
        tell(f"{name}  MLflow is away: {one_line(error)}")
        return False
    tell(f"{name}  sent, {read_status(run.path)['status']}")
    return mirror.complete()


def reconcile(run: Run, root: str, uri: str | None, tell: Callable[[str], None]) -> bool:
    """As `sync`; a run that says RUNNING with nobody at work on it is FAILED."""
    if read_status(run.path)["status"] == "RUNNING" and not is_alive(run, root):
        name = f"{run.phase} {run.run_id[:8]}"
        try:
            write_status(run.path, "FAILED")
        except OSError as error:
            tell(f"{name}  {storage_error(run.path / 'status.json', error, 1_000)}")
            return False
        tell(f"{name}  died without a word: FAILED")
    return sync(run, root, uri, tell)


def reconcile_unborn(root: str, uri: str, tell: Callable[[str], None]) -> None:
    """Runs that MLflow has and the disk does not: their launch died between making and noting them."""
    try:
        client = client_of(uri)
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        query = f"attributes.status = 'RUNNING' AND tags.`{ROOT_TAG}` = '{root}'"
        for found in client.search_runs(experiments, query):
            launch_id = found.data.tags.get(LAUNCH_TAG, "")
            if recorded_run(root, launch_id) is None and not launch_lock(root, launch_id).is_held():
                client.set_terminated(found.info.run_id, "FAILED")
                tell(f"{found.info.run_name} {found.info.run_id[:8]}  died before it had a directory: FAILED")
    except STORE_ERRORS as error:
        tell(f"MLflow is away: {one_line(error)}")


def tracking_uri(run: Run, given: str | None) -> str:
    """Where a run is sent.

    Raises:
        InputError: only with a password that was not recorded.
    """
    uri = given or run.tracking_uri
    check_password(uri)
    return uri


def is_store(uri: str) -> bool:
    """Whether there is anything to ask: looking at an SQLite file that does not exist would make it."""
    return not uri.startswith("sqlite:///") or Path(uri.removeprefix("sqlite:///")).is_file()
