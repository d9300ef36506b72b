"""`sync`: send what MLflow does not have of each run."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack

from raytrain2p.config import InputError, Settings
from raytrain2p.config.cli import say
from raytrain2p.config.secrets import one_line
from raytrain2p.tracking.find import is_alive
from raytrain2p.tracking.mlflow_store import STORE_ERRORS, check_password
from raytrain2p.tracking.mlflow_sync import MlflowSync, RunDirectoryError, reporting_run_disk_errors
from raytrain2p.tracking.run import Run


def update(runs: Sequence[Run], settings: Settings, uri: str | None) -> int:
    """Send the runs. Returns how many of them are complete in MLflow, or under way.

    Args:
        uri: tracking URI, if the user gave one.
    """
    return sum([sync(run, settings.output.root, uri, say) for run in runs])


def sync(run: Run, root: str, uri: str | None, report: Callable[[str], None]) -> bool:
    """Send what MLflow does not have of a run that has ended. Returns whether MLflow has everything then.

    Args:
        root: `output.root`.
        uri: tracking URI, if it is not the recorded one, or needs a password.
        report: called with a line about each run for which something was done, or failed.
    """
    name = f"{run.phase} {run.run_id[:8]}"
    if is_alive(run, root):
        report(f"{name}  under way; it sends by itself")
        return True
    try:
        mlflow_sync = MlflowSync(run, tracking_uri(run, uri))
        if mlflow_sync.complete():
            return True
        with ExitStack() as stack:
            with reporting_run_disk_errors(run.files.lock.path):
                holder = stack.enter_context(run.files.lock.held(5.0))  # another `sync` may have it
            if holder is None:
                mlflow_sync.send()
    except InputError as error:
        report(f"{name}  {one_line(error.problems[0], 1000)}")
        return False
    except RunDirectoryError as error:
        report(f"{name}  {error}")
        return False
    except STORE_ERRORS as error:
        report(f"{name}  MLflow is away: {one_line(error)}")
        return False
    report(f"{name}  sent, {run.files.read_status()['status']}")
    return mlflow_sync.complete()


def tracking_uri(run: Run, given: str | None) -> str:
    """Where a run is sent.

    Raises:
        InputError: the recorded URI needs a password, which is not recorded.
    """
    uri = given or run.tracking_uri
    check_password(uri)
    return uri
