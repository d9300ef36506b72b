"""`reconcile`: orphaned runs, which are RUNNING without a living process, become FAILED, on disk and in MLflow."""

from collections.abc import Callable, Sequence

from raytrain2p.config import Settings
from raytrain2p.config.cli import say
from raytrain2p.config.secrets import one_line
from raytrain2p.runs.sync import sync
from raytrain2p.storage.errors import StorageError, reporting_disk_errors
from raytrain2p.tracking.find import is_alive
from raytrain2p.tracking.mlflow_store import STORE_ERRORS, client_of, running_runs, store_exists
from raytrain2p.tracking.run import LAUNCH_TAG, ROOT_TAG, Run, launch_lock, recorded_run


def update(runs: Sequence[Run], settings: Settings, uri: str | None) -> int:
    """Reconcile the runs, and those that MLflow alone has. Returns how many of `runs` are complete in MLflow, or under way.

    Args:
        uri: tracking URI, if the user gave one.
    """
    root = settings.output.root
    complete = sum([reconcile(run, root, uri, say) for run in runs])
    if store_exists(settings.tracking.uri):
        reconcile_unborn(root, settings.tracking.uri, say)
    return complete


def reconcile(run: Run, root: str, uri: str | None, report: Callable[[str], None]) -> bool:
    """As `sync`, after an orphaned run was set FAILED."""
    if run.files.read_status()["status"] == "RUNNING" and not is_alive(run, root):
        name = f"{run.phase} {run.run_id[:8]}"
        try:
            with reporting_disk_errors(run.files.status, 1_000):
                run.files.write_status("FAILED")
        except StorageError as error:
            report(f"{name}  {error}")
            return False
        report(f"{name}  orphaned, no process works on it: FAILED")
    return sync(run, root, uri, report)


def reconcile_unborn(root: str, uri: str, report: Callable[[str], None]) -> None:
    """Set FAILED what MLflow has and the disk does not: runs whose launch was killed before it recorded them."""
    try:
        client = client_of(uri)
        for found in running_runs(client, ROOT_TAG, root):
            launch_id = found.data.tags.get(LAUNCH_TAG, "")
            if recorded_run(root, launch_id) is None and not launch_lock(root, launch_id).is_held():
                client.set_terminated(found.info.run_id, "FAILED")
                report(f"{found.info.run_name} {found.info.run_id[:8]}  orphaned before it had a directory: FAILED")
    except STORE_ERRORS as error:
        report(f"MLflow is away: {one_line(error)}")
