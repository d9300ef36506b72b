"""`reconcile`: runs that say RUNNING and have no living process become FAILED, on disk and in MLflow."""

from collections.abc import Callable
from pathlib import Path

from raytrain2p.config.secrets import one_line
from raytrain2p.runs.sync import is_alive, sync
from raytrain2p.storage.errors import storage_error
from raytrain2p.tracking.mlflow_store import STORE_ERRORS, client_of
from raytrain2p.tracking.run import (
    LAUNCH_TAG,
    ROOT_TAG,
    Run,
    launch_lock,
    read_status,
    recorded_run,
    write_status,
)


def reconcile(run: Run, root: str, uri: str | None, tell: Callable[[str], None]) -> bool:
    """As `sync`; a run that says RUNNING with nobody at work on it is FAILED."""
    if read_status(run.path)["status"] == "RUNNING" and not is_alive(run, root):
        name = f"{run.phase} {run.run_id[:8]}"
        try:
            write_status(run.path, "FAILED")
        except OSError as error:
            tell(f"{name}  {storage_error(run.path / 'status.json', error, 1_000)}")
            return False
        tell(f"{name}  orphaned, no process works on it: FAILED")
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


def is_store(uri: str) -> bool:
    """Whether there is anything to ask: looking at an SQLite file that does not exist would make it."""
    return not uri.startswith("sqlite:///") or Path(uri.removeprefix("sqlite:///")).is_file()
