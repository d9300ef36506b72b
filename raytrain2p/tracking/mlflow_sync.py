"""MLflow's copy of a run directory: what is on disk is the truth, and is sent from there, each point once.

Training only ever writes to the directory. A thread sends what it finds there; while MLflow is away it waits and tries
again, and what is left at the end `python -m raytrain2p.runs sync` sends later.
"""

import json
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from typing import Any

from mlflow.entities import Metric, Param, RunTag

from raytrain2p.config import flatten_tree
from raytrain2p.config.secrets import one_line
from raytrain2p.storage.errors import is_reachable, storage_error
from raytrain2p.storage.files import read_json, write_json
from raytrain2p.tracking.mlflow_store import client_of
from raytrain2p.tracking.run import ARTIFACTS, Run, read_status, run_lock

POINTS_PER_BATCH, PARAMS_PER_BATCH = 1000, 100  # MLflow's limits for one request
SEND_SECONDS, LONGEST_WAIT = 3.0, 30.0
TRIES_AT_THE_END = 5  # a second apart, or more where a request runs into its time-out
PARAM_LENGTH = 6000  # MLflow's limit for one parameter


class RunDirectoryError(OSError):
    """How far the sync got cannot be noted: the run's own disk has failed, and not MLflow."""


class MlflowSync:
    """Sends a run directory to MLflow.

    `.mirror.json` in the directory says how far it got: `sent` bytes of metrics.jsonl, and, while a batch is under way,
    `sending` up to which. A kill or a time-out in between leaves open whether MLflow has the batch: it is asked then.
    """

    def __init__(self, run: Run, uri: str) -> None:
        self.run, self.uri = run, uri
        self.state_path, self.metrics_file = run.path / ".mirror.json", run.path / "metrics.jsonl"
        self.state: dict[str, Any] = {"sent": 0, "sending": None, "described": None, "status": None} | (read_json(self.state_path) or {})

    @cached_property
    def client(self) -> Any:
        """Made when it is needed: a database that is away fails here already."""
        return client_of(self.uri)

    def complete(self) -> bool:
        """Whether MLflow has everything, the final status included."""
        status = read_status(self.run.path)
        return status["status"] != "RUNNING" and self.state["status"] == status and not self._lines_left()

    def send(self) -> None:
        """Send what is not sent yet: what the run is, its points, and, once it has ended, its artifacts and its status.

        Raises:
            RunDirectoryError: the disk of the run is full, read-only or gone.
            STORE_ERRORS: MLflow is away; nothing is lost, call again.
        """
        if not is_reachable(self.run.path):
            raise RunDirectoryError(str(storage_error(self.state_path, FileNotFoundError(), 0)))
        self._send_description()
        while self._send_points():
            pass
        status = read_status(self.run.path)
        if self.state["status"] != status:
            if status["status"] != "RUNNING":
                self._send_artifacts()
                end = round(status["at"] * 1000)
                self.client.set_terminated(self.run.run_id, status["status"], end)
            else:
                self.client.update_run(self.run.run_id, status="RUNNING")
            self._note(status=status)

    def _left(self) -> int:
        return (self.metrics_file.stat().st_size if self.metrics_file.is_file() else 0) - int(self.state["sent"])

    def _lines_left(self) -> bool:
        """Whether a whole line is not sent, or what was sent is not there. A last line that is torn was never noted."""
        if self._left() <= 0:
            return self._left() < 0
        with self.metrics_file.open("rb") as stream:
            stream.seek(int(self.state["sent"]))
            return b"\n" in stream.read()

    def _note(self, **changes: Any) -> None:
        self.state |= changes
        try:
            write_json(self.state_path, self.state)
        except OSError as error:
            raise RunDirectoryError(str(storage_error(self.state_path, error, 1_000))) from None

    def _note_sent(self, end: int) -> None:
        self._note(sent=end, sending=None)

    def _send_description(self) -> None:
        """Every setting as a parameter, and the tags. MLflow never changes a parameter: what a resumed run has otherwise
        is a tag beside it."""
        described = read_json(self.run.path / "run.json")
        config = read_json(self.run.path / "config.json")
        if described is None or config is None or "described" not in described:
            return  # a launch that died before it had described itself
        if self.state["described"] == described["described"]:
            return
        params = {key: str(value)[:PARAM_LENGTH] for key, value in flatten_tree(config).items()}
        logged = self.client.get_run(self.run.run_id).data.params
        missing = [Param(key, value) for key, value in params.items() if key not in logged]
        for start in range(0, len(missing), PARAMS_PER_BATCH):
            self.client.log_batch(self.run.run_id, params=missing[start : start + PARAMS_PER_BATCH])
        changed = {f"raytrain2p.changed.{key}": value for key, value in params.items() if logged.get(key, value) != value}
        tags = {key: str(value) for key, value in described["tags"].items()} | changed
        self.client.log_batch(self.run.run_id, tags=[RunTag(key, value) for key, value in tags.items()])
        self.client.log_artifact(self.run.run_id, str(self.run.path / "config.json"), "config")
        self._note(described=described["described"])

    def _send_points(self) -> bool:
        """One batch; whether there may be more."""
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
        """Those that MLflow does not have: an earlier request may have arrived, in whole or in part."""
        known = defaultdict(set)
        for name in {metric.key for metric in metrics}:
            known[name] = {(point.step, point.timestamp) for point in self.client.get_metric_history(self.run.run_id, name)}
        return [metric for metric in metrics if (metric.step, metric.timestamp) not in known[metric.key]]

    def _send_artifacts(self) -> None:
        for name, folder in ARTIFACTS.items():
            path = self.run.path / name
            if path.is_dir():
                self.client.log_artifacts(self.run.run_id, str(path), folder)
            elif path.is_file():
                self.client.log_artifact(self.run.run_id, str(path), folder)


class MlflowSyncThread:
    """A sync at work while training goes on. Errors of MLflow are told once and tried again, for however long."""

    def __init__(self, mlflow_sync: MlflowSync, tell: Callable[[str], None]) -> None:
        self.mlflow_sync, self.tell = mlflow_sync, tell
        self.closing = threading.Event()
        self.deadline = float("inf")
        self.thread = threading.Thread(target=self._work, name="mlflow-sync", daemon=True)
        self.thread.start()

    def close(self, seconds: float) -> bool:
        """Send the rest, for at most so long; whether MLflow has everything."""
        self.deadline = time.monotonic() + seconds
        self.closing.set()
        self.thread.join(seconds + 1)
        with suppress(OSError):
            return not self.thread.is_alive() and self.mlflow_sync.complete()
        return False

    def _work(self) -> None:
        wait, failed, told = SEND_SECONDS, 0, False
        while True:
            closing = self.closing.wait(wait)
            with suppress(OSError):
                run_lock(self.mlflow_sync.run).touch()
            try:
                self.mlflow_sync.send()
            except Exception as error:  # whatever MLflow's client raises: training must not stop for it
                if not told and not isinstance(error, RunDirectoryError):  # which training meets as well, and ends with
                    told, reason = True, one_line(error)
                    self.tell(f"MLflow does not answer; training goes on, and what it lacks waits on disk ({reason})")
                failed, wait = failed + 1, min(2 * wait, LONGEST_WAIT)
                if closing and (failed > TRIES_AT_THE_END or time.monotonic() > self.deadline):
                    return
                if closing:
                    time.sleep(1)
                continue
            if told:
                self.tell("MLflow is back, and has everything so far")
            wait, failed, told = SEND_SECONDS, 0, False
            if closing:
                return
