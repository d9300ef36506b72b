"""`sync`: what MLflow does not have of a run is sent; and which runs there are, and which of them are alive."""

import socket
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from raytrain2p.config import InputError
from raytrain2p.config.phases import PHASES_BY_NAME, SWEEPS
from raytrain2p.config.secrets import one_line
from raytrain2p.storage.errors import storage_error
from raytrain2p.storage.files import read_json
from raytrain2p.tracking.find import find_run, run_directories
from raytrain2p.tracking.mlflow_store import STORE_ERRORS, check_password
from raytrain2p.tracking.mlflow_sync import MlflowSync, RunDirectoryError
from raytrain2p.tracking.run import (
    SWEEP_TAG,
    Run,
    launch_lock,
    read_status,
    run_lock,
    run_of,
    run_tags,
)

DIRECTORIES = (*PHASES_BY_NAME, SWEEPS)  # of runs, under `output.root`
SILENCE = 120.0  # seconds after which a run on another machine counts as dead, where locks do not reach across machines


def runs_to_look_at(root: str, wanted: Sequence[str]) -> list[Run]:
    """The runs named, or all.

    Raises:
        InputError: every name that fits none, or more than one.
    """
    if wanted:
        return [find_run(root, DIRECTORIES, name, "RUN") for name in wanted]
    noted = [read_json(directory / "run.json") for directory in run_directories(root, DIRECTORIES)]
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
        mlflow_sync = MlflowSync(run, tracking_uri(run, uri))
        if mlflow_sync.complete():
            return True
        with ExitStack() as stack:
            try:
                holder = stack.enter_context(run_lock(run).held(5.0))  # another `sync` may be at it
            except OSError as error:
                raise RunDirectoryError(str(storage_error(run_lock(run).path, error, 1_000))) from None
            if holder is None:
                mlflow_sync.send()
    except InputError as error:
        tell(f"{name}  {error.problems[0].where}: {error.problems[0].what}; {error.problems[0].fix}")
        return False
    except RunDirectoryError as error:
        tell(f"{name}  {error}")
        return False
    except STORE_ERRORS as error:
        tell(f"{name}  MLflow is away: {one_line(error)}")
        return False
    tell(f"{name}  sent, {read_status(run.path)['status']}")
    return mlflow_sync.complete()


def tracking_uri(run: Run, given: str | None) -> str:
    """Where a run is sent.

    Raises:
        InputError: only with a password that was not recorded.
    """
    uri = given or run.tracking_uri
    check_password(uri)
    return uri
