"""`sync`: send what MLflow does not have of each run."""

import argparse
from collections.abc import Callable
from contextlib import ExitStack

from raytrain2p.config import InputError
from raytrain2p.config.cli import FAILED, say
from raytrain2p.config.secrets import one_line
from raytrain2p.runs.output import print_json
from raytrain2p.runs.request import Request
from raytrain2p.tracking.damage import DamagedFileError
from raytrain2p.tracking.find import is_alive
from raytrain2p.tracking.mlflow_errors import store_problem
from raytrain2p.tracking.mlflow_store import STORE_ERRORS, UnusableStoreError, check_password
from raytrain2p.tracking.mlflow_sync import MlflowSync, RunDirectoryError, reporting_run_disk_errors
from raytrain2p.tracking.run import Run, original_of, record_move

Verb = Callable[[Run, str, str | None, Callable[[str], None]], bool]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(request: Request) -> int:
    """Send the runs."""
    return update_each(sync, request, [])


def update_each(verb: Verb, request: Request, said: list[str], none_is_fine: bool = False) -> int:
    """Apply a verb to each run; a damaged one is reported and does not hinder the others. Returns the exit code: 0 if MLflow has
    everything of each, or it is under way.

    Args:
        said: lines for the user so far, which JSON begins with.
    """
    report = said.append if request.options.json else say
    runs, damaged = request.runs(none_is_fine)
    for line in damaged:
        report(line)
    complete, every = 0, len(runs) + len(damaged)
    for run in runs:
        try:
            complete += verb(run, request.root, request.uri, report)
        except DamagedFileError as error:
            report(f"{run.phase} {run.run_id[:8]}  damaged: {error.line}")
    if request.options.json:
        print_json({"complete": complete, "runs": every, "said": said})
    else:
        print(f"{complete} of {every} runs are complete in MLflow")
    return 0 if complete == every else FAILED


def sync(run: Run, root: str, uri: str | None, report: Callable[[str], None]) -> bool:
    """Send what MLflow does not have of a run that has ended. Returns whether MLflow has everything then.

    Args:
        root: `output.root`.
        uri: tracking URI, if it is not the recorded one, or needs a password.
        report: called with a line about each run for which something was done, or failed.
    """
    name = f"{run.phase} {run.run_id[:8]}"
    if (original := original_of(run)) is not None:
        report(f"{name}  {run.directory} is a copy; the run itself is {original}. Nothing was sent from the copy")
        return True
    if is_alive(run, root):
        report(f"{name}  under way; it sends by itself")
        return True
    try:
        with reporting_run_disk_errors(run.files.record):
            moved = record_move(run)
        mlflow_sync = MlflowSync(run, tracking_uri(run, uri))
        if mlflow_sync.complete() and not moved:
            if mlflow_sync.refusals():
                report(f"{name}  complete{refused(mlflow_sync)}")
            return True
        with ExitStack() as stack:
            with reporting_run_disk_errors(run.files.lock.path):
                holder = stack.enter_context(run.files.lock.held(5.0))  # another `sync` may have it
            if holder is None:
                mlflow_sync.send()
                if mlflow_sync.is_behind():
                    report(f"{name}  {run.directory} is behind: MLflow has FINISHED from another copy of it, which stays")
    except DamagedFileError:
        raise
    except InputError as error:
        report(f"{name}  {one_line(error.problems[0], 1000)}")
        return False
    except (RunDirectoryError, UnusableStoreError) as error:
        report(f"{name}  {error}")
        return False
    except STORE_ERRORS as error:
        report(f"{name}  {store_problem(error)}")
        return False
    for line in mlflow_sync.damage:
        report(f"{name}  damaged: {line}")
    report(f"{name}  sent, {run.files.read_status()['status']}{refused(mlflow_sync)}")
    return mlflow_sync.complete() and not mlflow_sync.damage


def refused(mlflow_sync: MlflowSync) -> str:
    """What follows in a run's line: the names of what MLflow will never take."""
    return "".join(f"; without {name}, which MLflow does not take ({reason})" for name, reason in mlflow_sync.refusals().items())


def tracking_uri(run: Run, given: str | None) -> str:
    """Where a run is sent.

    Raises:
        InputError: the recorded URI needs a password, which is not recorded.
    """
    uri = given or run.tracking_uri
    check_password(uri)
    return uri
