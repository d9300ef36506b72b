"""Copies a run directory to MLflow: the directory is the original, and each point is sent once.

Training writes to the directory alone. A thread sends what it finds there; while MLflow is away it tries again, and what is
left at the end is sent later by `python -m raytrain2p.runs sync`.
"""

import json
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag

from raytrain2p.config import flatten_tree
from raytrain2p.config.secrets import one_line
from raytrain2p.storage.errors import StorageError, is_reachable, reporting_disk_errors
from raytrain2p.storage.files import read_json, write_json
from raytrain2p.tracking.mlflow_store import client_of
from raytrain2p.tracking.run import Run

POINTS_PER_BATCH, PARAMS_PER_BATCH = 1000, 100  # MLflow's limits for one request
SEND_SECONDS, LONGEST_WAIT = 3.0, 30.0
TRIES_AT_THE_END = 5  # a second apart, or more where a request times out
CHANGED_TAG = "raytrain2p.changed."
PARAM_LENGTH = 6000  # MLflow's limit for one parameter


class RunDirectoryError(OSError):
    """The run's own disk has failed, and not MLflow. Its text is one line for the user."""


@contextmanager
def reporting_run_disk_errors(path: Path) -> Iterator[None]:
    """Turn the disk errors of a block that writes a small file of a run into one line for the user.

    Raises:
        RunDirectoryError: any OSError.
    """
    try:
        with reporting_disk_errors(path, 1_000):
            yield
    except StorageError as error:
        raise RunDirectoryError(str(error)) from None


class MlflowSync:
    """Sends a run directory to MLflow.

    The state file in the directory records the progress: `sent` bytes of metrics.jsonl, and, while a batch is under way, the end
    of it as `sending`. After a kill or a time-out in between, MLflow is asked which points of the batch it has.
    """

    def __init__(self, run: Run, uri: str) -> None:
        self.run, self.files, self.uri = run, run.files, uri
        self.state_path, self.metrics_file = self.files.sync_state, self.files.metrics
        self.state: dict[str, Any] = {"sent": 0, "sending": None, "described": None, "status": None} | (read_json(self.state_path) or {})

    @cached_property
    def client(self) -> MlflowClient:
        """Created on first use: for a database that is away, this fails already."""
        return client_of(self.uri)

    def complete(self) -> bool:
        """Whether MLflow has everything, the final status included."""
        status = self.files.read_status()
        return status["status"] != "RUNNING" and self.state["status"] == status and not self._lines_left()

    def send(self) -> None:
        """Send what MLflow does not have yet: settings and tags, points, and, once the run has ended, artifacts and status.

        Raises:
            RunDirectoryError: the disk of the run is full, read-only or gone.
            STORE_ERRORS: MLflow is away. Nothing is lost: call again.
        """
        with reporting_run_disk_errors(self.state_path):
            if not is_reachable(self.run.path):
                raise FileNotFoundError(self.run.path)
        self._send_description()
        while self._send_points():
            pass
        status = self.files.read_status()
        if self.state["status"] != status:
            if status["status"] != "RUNNING":
                self._send_artifacts()
                end = round(status["at"] * 1000)
                self.client.set_terminated(self.run.run_id, status["status"], end)
            else:
                self.client.update_run(self.run.run_id, status="RUNNING")
            self._note(status=status)

    def _left(self) -> int:
        """Bytes of metrics.jsonl that are not sent; negative if the file has lost some that were."""
        return (self.metrics_file.stat().st_size if self.metrics_file.is_file() else 0) - int(self.state["sent"])

    def _lines_left(self) -> bool:
        """Whether a complete line is not sent, or sent lines are gone. An incomplete last line does not count."""
        if self._left() <= 0:
            return self._left() < 0
        with self.metrics_file.open("rb") as stream:
            stream.seek(int(self.state["sent"]))
            return b"\n" in stream.read()

    def _note(self, **changes: Any) -> None:
        self.state |= changes
        with reporting_run_disk_errors(self.state_path):
            write_json(self.state_path, self.state)

    def _note_sent(self, end: int) -> None:
        self._note(sent=end, sending=None)

    def _send_description(self) -> None:
        """Every setting as a parameter, and the tags. MLflow cannot change a parameter: a setting that a resumed run changed
        is a tag from then on."""
        record, config = self.files.read_record(), self.files.read_config()
        if record is None or config is None or "described" not in record:
            return  # the launch was killed before it described the run
        if self.state["described"] == record["described"]:
            return
        params = {key: str(value)[:PARAM_LENGTH] for key, value in flatten_tree(config).items()}
        known = self.client.get_run(self.run.run_id).data
        logged = known.params
        missing = [Param(key, value) for key, value in params.items() if key not in logged]
        for start in range(0, len(missing), PARAMS_PER_BATCH):
            self.client.log_batch(self.run.run_id, params=missing[start : start + PARAMS_PER_BATCH])
        ours = params | {key: "not set" for key in logged if key not in params and key.partition(".")[0] in config}
        changed = {
            f"{CHANGED_TAG}{key}": value
            for key, value in ours.items()
            if logged.get(key, value) != value or f"{CHANGED_TAG}{key}" in known.tags  # it may have changed back
        }
        tags = {key: str(value) for key, value in record["tags"].items()} | changed
        self.client.log_batch(self.run.run_id, tags=[RunTag(key, value) for key, value in tags.items()])
        self.client.log_artifact(self.run.run_id, str(self.files.config), "config")
        self._note(described=record["described"])

    def _send_points(self) -> bool:
        """Send one batch. Returns whether there may be another."""
        if self._left() <= 0:
            return False
        start = int(self.state["sent"])
        lines: list[bytes] = []
        with self.metrics_file.open("rb") as stream:
            stream.seek(start)
            for line in stream:
                if not line.endswith(b"\n") or len(lines) == POINTS_PER_BATCH:
                    break
                lines.append(line)
        if not lines:
            return False
        end = start + sum(map(len, lines))
        rows = [json.loads(line) for line in lines]
        metrics = [Metric(row["name"], row["value"], round(row["time"] * 1000), row["step"]) for row in rows]
        if self.state["sending"] is not None:
            metrics = self._unknown(metrics)
        self._note(sending=end)
        if metrics:
            self.client.log_batch(self.run.run_id, metrics=metrics)
        self._note_sent(end)
        return True

    def _unknown(self, metrics: list[Metric]) -> list[Metric]:
        """Those that MLflow does not have: an earlier request may have arrived, completely or in part."""
        known = defaultdict(set)
        for name in {metric.key for metric in metrics}:
            known[name] = {(point.step, point.timestamp) for point in self.client.get_metric_history(self.run.run_id, name)}
        return [metric for metric in metrics if (metric.step, metric.timestamp) not in known[metric.key]]

    def _send_artifacts(self) -> None:
        for path, folder in self.files.mlflow_artifacts():
            if path.is_dir():
                self.client.log_artifacts(self.run.run_id, str(path), folder)
            elif path.is_file():
                self.client.log_artifact(self.run.run_id, str(path), folder)


class MlflowSyncThread:
    """Sends a run directory while training continues. An outage of MLflow is reported once; sending is tried again until it works.

    Args:
        report: called with a line for the user.
    """

    def __init__(self, mlflow_sync: MlflowSync, report: Callable[[str], None]) -> None:
        self.mlflow_sync, self.report = mlflow_sync, report
        self.closing = threading.Event()
        self.deadline = float("inf")
        self.thread = threading.Thread(target=self._work, name="mlflow-sync", daemon=True)
        self.thread.start()

    def close(self, seconds: float) -> bool:
        """Send the rest, for at most that long. Returns whether MLflow has everything."""
        self.deadline = time.monotonic() + seconds
        self.closing.set()
        self.thread.join(seconds + 1)
        with suppress(OSError):
            return not self.thread.is_alive() and self.mlflow_sync.complete()
        return False

    def _work(self) -> None:
        wait, failed, reported = SEND_SECONDS, 0, False
        while True:
            closing = self.closing.wait(wait)
            with suppress(OSError):
                self.mlflow_sync.files.lock.touch()
            try:
                self.mlflow_sync.send()
            except Exception as error:  # whatever MLflow's client raises: training must not stop for it
                if not reported and not isinstance(error, RunDirectoryError):  # a failed disk ends training, which reports it
                    reported, reason = True, one_line(error)
                    self.report(f"MLflow does not answer; training continues, and what it lacks waits on disk ({reason})")
                failed, wait = failed + 1, min(2 * wait, LONGEST_WAIT)
                if closing and (failed > TRIES_AT_THE_END or time.monotonic() > self.deadline):
                    return
                if closing:
                    time.sleep(1)
                continue
            if reported:
                self.report("MLflow is back, and has everything so far")
            wait, failed, reported = SEND_SECONDS, 0, False
            if closing:
                return
