"""Rank 0's hand on the run directory: whoever holds it is the only one that writes there."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from raytrain2p.storage.errors import storage_error
from raytrain2p.tracking.metrics_file import MetricPoint, MetricsFile
from raytrain2p.tracking.mlflow_store import STORE_ERRORS, client_of
from raytrain2p.tracking.mlflow_sync import MlflowSync, MlflowSyncThread
from raytrain2p.tracking.run import LAUNCH_TAG, SECONDS_TO_INHERIT, Run, describe_run, read_status, run_lock, sole_writer, write_status

SECONDS_TO_SEND = 1800.0  # at the end, for what MLflow does not have yet, while it takes it; model files may be large
SECONDS_TO_LEAVE = 5.0  # when the worker fails: Ray is about to start it again


class RunWriter:
    """Notes points, and says how the run ended. Made by `open_run_writer`.

    Args:
        run: whose directory it writes to.
        mlflow_sync: sends all of it to MLflow meanwhile.
    """

    def __init__(self, run: Run, mlflow_sync: MlflowSyncThread) -> None:
        self.run, self.mlflow_sync = run, mlflow_sync
        self.metrics_file = MetricsFile(run.path / "metrics.jsonl")

    def resume_from(self, step: int) -> None:
        """What is noted of later steps is not noted again."""
        self.metrics_file = MetricsFile(self.metrics_file.path, step)

    def write(self, points: Sequence[MetricPoint]) -> None:
        """Note points on disk; they are sent later.

        Raises:
            StorageError: the disk is full, or gone.
        """
        try:
            self.metrics_file.append(points)
        except OSError as error:
            raise storage_error(self.metrics_file.path, error, 200 * len(points)) from None

    def write_metrics(self, metrics: dict[str, float], step: int) -> None:
        now = time.time()
        self.write([MetricPoint(name, float(value), step, now) for name, value in metrics.items()])

    def finish(self, status: str) -> bool:
        """Say how the run ended, and send the rest; whether MLflow has everything by now."""
        write_status(self.run.path, status)
        return self.mlflow_sync.close(SECONDS_TO_SEND)


@contextmanager
def open_run_writer(run: Run, uri: str, describe: dict[str, Any], tell: Callable[[str], None]) -> Iterator[RunWriter]:
    """Within, this process alone writes to the run directory, and MLflow says that the run is RUNNING.

    Args:
        run: whose directory it is.
        uri: of the tracking store, with the password that it may need.
        describe: arguments of `describe_run`.
        tell: shows a line to the user.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(sole_writer(run))
            changes = describe_run(run, **describe)
            write_status(run.path, "RUNNING")
        except OSError as error:
            raise storage_error(run.path / "config.json", error, 100_000) from None
        for line in changes:
            tell(f"changed since the run began: {line}")
        writer = RunWriter(run, MlflowSyncThread(MlflowSync(run, uri), tell))
        try:
            yield writer
        finally:
            writer.mlflow_sync.close(SECONDS_TO_LEAVE)


def end_run(run: Run, uri: str, status: str) -> bool:
    """Say how a run ended whose workers are gone; whether MLflow knows it. One that has said FINISHED stays so.

    On a full disk the status cannot be noted: MLflow is told all the same.
    """
    with suppress(*STORE_ERRORS), run_lock(run).held(SECONDS_TO_INHERIT) as holder:
        if holder is None:
            if read_status(run.path)["status"] != "FINISHED":
                write_status(run.path, status)
            MlflowSync(run, uri).send()
            return True
    with suppress(*STORE_ERRORS):
        noted = read_status(run.path)["status"]
        client_of(uri).set_terminated(run.run_id, status if noted == "RUNNING" else noted)
        return True
    return False


def send_rest(run: Run, uri: str) -> bool:
    """Send what MLflow lacks of a run that is over: its process may have died between the two. Whether MLflow has everything."""
    if MlflowSync(run, uri).complete():
        return True
    with suppress(*STORE_ERRORS), run_lock(run).held(SECONDS_TO_INHERIT) as holder:
        if holder is None:
            MlflowSync(run, uri).send()
    return MlflowSync(run, uri).complete()


def end_unrecorded(uri: str, launch_id: str, status: str) -> None:
    """Say how a launch's run ended of which the disk knows nothing: it is gone, or the worker died before it noted the run."""
    with suppress(*STORE_ERRORS):
        client = client_of(uri)
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        query = f"attributes.status = 'RUNNING' AND tags.`{LAUNCH_TAG}` = '{launch_id}'"
        for found in client.search_runs(experiments, query):
            client.set_terminated(found.info.run_id, status)
