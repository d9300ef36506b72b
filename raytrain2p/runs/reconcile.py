"""`reconcile`: orphaned runs, which are RUNNING without a living process, become FAILED, on disk and in MLflow."""

import argparse
from collections.abc import Callable

from raytrain2p.config.cli import say
from raytrain2p.runs.request import Request
from raytrain2p.runs.sync import sync, update_each
from raytrain2p.storage.errors import StorageError, reporting_disk_errors
from raytrain2p.tracking.damage import DamagedFileError
from raytrain2p.tracking.find import is_alive
from raytrain2p.tracking.mlflow_errors import store_problem
from raytrain2p.tracking.mlflow_store import STORE_ERRORS, client_of, running_runs, store_exists
from raytrain2p.tracking.run import COMMAND_TAG, LAUNCH_TAG, ROOT_TAG, Run, has_launches, launch_lock, original_of, recorded_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(request: Request) -> int:
    """Reconcile the runs, and those that MLflow alone has."""
    uri, said = request.settings.tracking.uri, list[str]()
    launches = has_launches(request.root)  # perhaps none came as far as a directory
    if launches and store_exists(uri):
        reconcile_unborn(request.root, uri, said.append if request.options.json else say)
    return update_each(reconcile, request, said, launches)


def reconcile(run: Run, root: str, uri: str | None, report: Callable[[str], None]) -> bool:
    """As `sync`, after an orphaned run was set FAILED."""
    if original_of(run) is None and run.files.read_status()["status"] == "RUNNING" and not is_alive(run, root):
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
            if COMMAND_TAG in found.data.tags:
                continue  # it had a directory, which is elsewhere now: only what is found there decides
            try:
                unborn = recorded_run(root, launch_id) is None
            except DamagedFileError as error:
                report(f"{found.info.run_name} {found.info.run_id[:8]}  left alone, its launch's record is damaged: {error.line}")
                continue
            if unborn and not launch_lock(root, launch_id).is_held():
                client.set_terminated(found.info.run_id, "FAILED")
                report(f"{found.info.run_name} {found.info.run_id[:8]}  orphaned before it had a directory: FAILED")
    except STORE_ERRORS as error:
        report(str(store_problem(error)))
