"""Copies a run directory to MLflow: the directory is the original, and each point is sent once.

Training writes to the directory alone. A thread sends what it finds there; while MLflow is away it tries again, and what is
left at the end is sent later by `python -m raytrain2p.runs sync`. What MLflow will never take is set aside, and all else arrives.
"""

import os
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, TypeVar

from mlflow import MlflowClient
from mlflow.entities import DatasetInput, Metric, Param, RunTag
from pydantic import Field
from typing_extensions import TypedDict

from raytrain2p.config import flatten_tree
from raytrain2p.config.phases import PHASES_BY_NAME
from raytrain2p.config.scratch import is_remote, public
from raytrain2p.storage.errors import StorageError, is_reachable, reporting_disk_errors
from raytrain2p.storage.files import write_json
from raytrain2p.storage.remote import Directory
from raytrain2p.tracking.damage import DamagedFileError, damaged, read_as
from raytrain2p.tracking.metrics_file import point_of
from raytrain2p.tracking.mlflow_errors import Kind, StoreProblem, is_unknown_request, store_problem
from raytrain2p.tracking.mlflow_pages import NOTE_TAG, data_of, record_model, run_description
from raytrain2p.tracking.mlflow_store import client_of
from raytrain2p.tracking.run import CHANGED_TAG, NOT_SET, Run
from raytrain2p.tracking.run_directory import RunStatus

POINTS_PER_BATCH, PARAMS_PER_BATCH = 1000, 100  # MLflow's limits for one request
SEND_SECONDS, LONGEST_WAIT = 3.0, 30.0
MODEL = "the logged model"  # as `refused` names it
TRIES_AT_THE_END = 5  # a second apart
SECONDS_AT_THE_END = 30.0  # in which all these tries must have failed; a request that hangs takes 10 seconds, see __init__.py
PARAM_LENGTH = 6000  # MLflow's limit for one parameter

Item = TypeVar("Item", Metric, Param, RunTag)


Bytes = Annotated[int, Field(ge=0)]


class SyncState(TypedDict, total=False):
    """The state file, see `MlflowSync`."""

    sent: Bytes
    sending: Bytes | None
    described: float | None
    status: RunStatus | None
    artifacts: dict[str, list[int]]
    refused: dict[str, str]
    note: str
    model: float | None


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
    of it as `sending`. After a kill or a time-out in between, MLflow is asked which points up to there it has; so it is for the whole
    file if that state is lost, or if the file is shorter than what was sent. `artifacts` has the size and the time of each file that
    was sent; `refused`, by name, why MLflow will never take an item; `note`, the description that was sent, unless a user wrote another;
    `model`, the end of the run whose logged model MLflow has.

    `damage` collects lines for the user about damaged files in the directory, which did not hinder sending.

    Args:
        objects: of a run in an object storage. Points are sent once they are there, so that a resume on another machine has them, too.
    """

    def __init__(self, run: Run, uri: str, objects: Directory | None = None) -> None:
        self.run, self.files, self.uri, self.objects = run, run.files, uri, objects
        self.state_path, self.metrics_file = self.files.sync_state, self.files.metrics
        self.damage: list[str] = []
        self.state = self._nothing_sent()
        try:
            known: dict[str, Any] = read_as(self.state_path, SyncState, "MLflow was asked what it has") or {}
        except DamagedFileError as error:
            known = {}
            self.damage.append(error.line)
        self.state |= known
        if known and "artifacts" not in known and known.get("status") == self.files.read_status():
            self.state["artifacts"] = self._artifacts_now()  # an earlier version, which sent them before the status
        if known and "model" not in known and known.get("status") == self.files.read_status():
            self.state["model"] = self.files.read_status()["at"]  # an earlier version, which recorded none

    @cached_property
    def client(self) -> MlflowClient:
        """Created on first use: for a database that is away, this fails already."""
        return client_of(self.uri)

    def _nothing_sent(self) -> dict[str, Any]:
        """A state with which MLflow is asked which points it has."""
        what: dict[str, Any] = {"described": None, "status": None, "artifacts": {}, "refused": {}, "note": "", "model": None}
        return {"sent": 0, "sending": self._size()} | what

    def forget(self) -> None:
        """Forget what was sent, so that `send` sends whatever MLflow does not have: its database may be an older one."""
        self._note(**self._nothing_sent() | {"note": self.state["note"]})

    def complete(self) -> bool:
        """Whether MLflow has everything that it takes, the final status included."""
        return self.files.read_status()["status"] != "RUNNING" and not self.unsent()

    def unsent(self) -> list[str]:
        """What MLflow does not have yet of a run that has ended, in words."""
        left = {
            "settings and tags": self._description_left(),
            "points": self._lines_left(),
            "files": any(self._artifacts_left()),
            MODEL: self._model_left(),
            "status": self.state["status"] != self.files.read_status(),
        }
        return [what for what, is_left in left.items() if is_left]

    def refusals(self) -> dict[str, str]:
        """What MLflow will never take: the name of each item, and why."""
        return dict(self.state["refused"])

    def send(self) -> None:
        """Send what MLflow does not have yet: settings and tags, points, and, once the run has ended, artifacts and status.

        Raises:
            RunDirectoryError: the disk of the run is full, read-only or gone.
            STORE_ERRORS: see `store_problem`. Nothing is lost: call again.
        """
        with reporting_run_disk_errors(self.state_path):
            if not is_reachable(self.run.path):
                raise FileNotFoundError(self.run.path)
        if self.objects is not None:
            self.objects.push_soon(self.metrics_file.name)
        if (lost := -self.left()) > 0:
            self.damage.append(f"{self.metrics_file} has lost {lost:,} bytes that were sent: MLflow has points that are not here any more")
            self._note(sent=0, sending=self._size())
        self._send_description()
        size = int(self.state["sent"]) + self.left()  # training may write points faster than MLflow takes them
        while self.state["sent"] < size and self._send_points():
            pass
        status = self.files.read_status()
        if self.state["status"] != status and self.is_behind():  # MLflow keeps the status and the artifacts of the other one
            self._note(status=status, artifacts=self.state["artifacts"] | self._artifacts_now())
            return
        failure = self._send_artifacts()  # raised after the status was sent: artifacts may be on another server, or another disk
        if self._model_left():
            failure = failure or self._send_model()
        if self.state["status"] != status:
            if status["status"] != "RUNNING":
                end = round(status["at"] * 1000)
                self.client.set_terminated(self.run.run_id, status["status"], end)
            elif (status["pid"], status["host"]) == (os.getpid(), socket.gethostname()):  # the process that trains alone sends that
                self.client.update_run(self.run.run_id, status="RUNNING")
            self._note(status=status)
        if failure is not None:
            raise failure

    def is_behind(self) -> bool:
        """Whether MLflow has FINISHED, and not from this directory: it is an older copy, or was moved without its last files. That
        status stays."""
        mine, sent = self.files.read_status()["status"], self.state["status"] or {"status": "", "at": 0.0}
        info = self.client.get_run(self.run.run_id).info
        from_here = sent["status"] == "FINISHED" and info.end_time == round(sent["at"] * 1000)
        return info.status == "FINISHED" and mine != "FINISHED" and not from_here

    def left(self) -> int:
        """Bytes of metrics.jsonl that are not sent; negative if the file has lost some that were."""
        return self._size() - int(self.state["sent"])

    def _size(self) -> int:
        if self.metrics_file.is_dir():
            raise damaged(self.metrics_file, "is a directory")
        size = self.metrics_file.stat().st_size if self.metrics_file.is_file() else 0
        return min(size, self.objects.pushed(self.metrics_file.name)) if self.objects is not None else size

    def _lines_left(self) -> bool:
        """Whether a complete line is not sent, or sent lines are gone. An incomplete last line does not count."""
        if self.left() <= 0:
            return self.left() < 0
        with self.metrics_file.open("rb") as stream:
            stream.seek(int(self.state["sent"]))
            return b"\n" in stream.read()

    def _note(self, **changes: Any) -> None:
        self.state |= changes
        with reporting_run_disk_errors(self.state_path):
            write_json(self.state_path, self.state)

    def _note_sent(self, end: int) -> None:
        self._note(sent=end, sending=self.state["sending"] if (self.state["sending"] or 0) > end else None)

    def _description_left(self) -> bool:
        """Whether settings or tags are not sent. There are none if the launch was killed before it described the run."""
        record = self.files.read_record() or {}
        return "described" in record and self.state["described"] != record["described"] and self.files.config.is_file()

    def _send_description(self) -> None:
        """Every setting as a parameter, and the tags. MLflow cannot change a parameter: a setting that a resumed run changed
        is a tag from then on."""
        record, config = self.files.read_record(), self.files.read_config()
        if record is None or config is None or not self._description_left():
            return
        params, known = params_of(config), self.client.get_run(self.run.run_id).data
        logged = known.params
        missing = [Param(key, value) for key, value in params.items() if key not in logged]
        for start in range(0, len(missing), PARAMS_PER_BATCH):
            self._log("params", missing[start : start + PARAMS_PER_BATCH])
        tags = tags_of(record["tags"], config, logged, known.tags)
        note = run_description(self.run, tags)
        if known.tags.get(NOTE_TAG, self.state["note"]) == self.state["note"]:
            tags[NOTE_TAG] = note
        self._log("tags", [RunTag(key, value) for key, value in tags.items() if known.tags.get(key) != value])
        for key in record.get("removed_tags", []):
            if key in known.tags:
                self.client.delete_tag(self.run.run_id, key)
        for data in data_of(record):
            self._send_data(data)
        self._note(described=record["described"], note=note)

    def _send_points(self) -> bool:
        """Send one batch. Returns whether there may be another."""
        if self.left() <= 0:
            return False
        start, size = int(self.state["sent"]), self._size()
        lines: list[bytes] = []
        with self.metrics_file.open("rb") as stream:
            stream.seek(start)
            for line in stream:
                if not line.endswith(b"\n") or len(lines) == POINTS_PER_BATCH or (self.objects and stream.tell() > size):
                    break
                lines.append(line)
        if not lines:
            return False
        end = start + sum(map(len, lines))
        points = [point for line in lines if (point := point_of(line)) is not None]
        if len(points) < len(lines):
            self.damage.append(f"{self.metrics_file} has damaged lines, which are left out: {len(lines) - len(points)}")
        metrics = [Metric(point.name, point.value, round(point.time * 1000), point.step) for point in points]
        if (self.state["sending"] or 0) > start:
            metrics = self._unknown(metrics)
        self._note(sending=max(end, self.state["sending"] or 0))
        self._log("metrics", sorted(metrics, key=lambda metric: metric.key))  # of a batch that is split, a part has few names
        self._note_sent(end)
        return True

    def _unknown(self, metrics: list[Metric]) -> list[Metric]:
        """Those that MLflow does not have: an earlier request may have arrived, completely or in part."""
        known = defaultdict(set)
        for name in {metric.key for metric in metrics}:
            known[name] = {(point.step, point.timestamp) for point in self.client.get_metric_history(self.run.run_id, name)}
        return [metric for metric in metrics if (metric.step, metric.timestamp) not in known[metric.key]]

    def _log(self, kind: str, items: Sequence[Item]) -> None:
        """Send items. A batch that MLflow refuses is split, until the item is found that it will never take: that one is set aside.

        Args:
            kind: metrics, params or tags.
        """
        items = [item for item in items if item_name(kind, item) not in self.state["refused"]]
        if not items:
            return
        try:
            self.client.log_batch(self.run.run_id, **{kind: items})
            return
        except Exception as error:  # MLflow raises ValueError, too
            problem = store_problem(error)
            if problem.kind is not Kind.REFUSED:
                raise
        if len(items) > 1:
            middle = len(items) // 2
            self._log(kind, items[:middle])
            self._log(kind, items[middle:])
        else:
            self._set_aside(item_name(kind, items[0]), problem)

    def _send_data(self, data: DatasetInput) -> None:
        """Send the data of a split. MLflow has it once, however often it is sent."""
        name = f"data `{data.dataset.name}`"
        if name in self.state["refused"]:
            return
        for is_last_try in (False, True):  # of two runs that send the same data at once, as trials do, a database refuses one
            try:
                self.client.log_inputs(self.run.run_id, [data])
                return
            except Exception as error:
                problem = store_problem(error)
                if problem.kind is not Kind.REFUSED:
                    raise
                if is_last_try:
                    self._set_aside(name, problem)

    def _model_left(self) -> bool:
        """Whether MLflow lacks the logged model of a finished run, or it is that of an earlier end."""
        status, phase = self.files.read_status(), PHASES_BY_NAME.get(self.run.phase)
        finished = status["status"] == "FINISHED" and phase is not None and self.files.artifact(phase).is_file()
        return finished and self.state["model"] != status["at"] and MODEL not in self.state["refused"]

    def _send_model(self) -> Exception | None:
        """Returns the error if MLflow may take it later. A server before MLflow 3 has no logged models."""
        try:
            result: dict[str, Any] = read_as(self.files.result, dict[str, Any]) or {}
            record_model(self.client, self.run, self.files.tags(), int(result.get("steps", 0)))
        except Exception as error:
            problem = store_problem(error)
            if problem.kind is not Kind.REFUSED and not is_unknown_request(error):
                return error
            self._set_aside(MODEL, problem)
        else:
            self._note(model=self.files.read_status()["at"])
        return None

    def _set_aside(self, name: str, problem: StoreProblem) -> None:
        self._note(refused=self.state["refused"] | {name: problem.reason})

    def _artifacts_left(self) -> Iterator[tuple[Path, str | None, list[int]]]:
        """The files that MLflow lacks."""
        for file, folder, now in self.artifacts():
            name = str(file.relative_to(self.run.path))
            if self.state["artifacts"].get(name) != now and f"artifact `{name}`" not in self.state["refused"]:
                yield file, folder, now

    def artifacts(self) -> Iterator[tuple[Path, str | None, list[int]]]:
        """The files that MLflow is to have: each with its folder among the run's artifacts, and its size and time."""
        status, since = self.files.read_status()["status"], self.files.read_status()["at"]
        for path, folder in [(self.files.config, "config"), *(self.files.mlflow_artifacts() if status != "RUNNING" else [])]:
            for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
                if not file.is_file():
                    continue
                # A file that was fetched has another time: that of the run's end stands for it
                now = [file.stat().st_size, round(1000 * since) if is_remote(file) else file.stat().st_mtime_ns]
                inner = file.parent.relative_to(path).as_posix() if file != path else "."
                yield file, folder if inner == "." else f"{folder}/{inner}", now

    def _artifacts_now(self) -> dict[str, list[int]]:
        """As they are recorded once MLflow has them."""
        return {str(file.relative_to(self.run.path)): now for file, _, now in self._artifacts_left()}

    def _send_artifacts(self) -> Exception | None:
        """Send files. Returns the first error of one that MLflow may take later; unless MLflow is away, the others are sent."""
        failure: Exception | None = None
        for file, folder, now in list(self._artifacts_left()):
            name = str(file.relative_to(self.run.path))
            try:
                self.client.log_artifact(self.run.run_id, str(file), folder)
            except Exception as error:
                problem = store_problem(error)
                if problem.kind is Kind.REFUSED:
                    self._set_aside(f"artifact `{name}`", problem)
                    continue
                failure = failure or error
                if problem.kind is Kind.AWAY:
                    break
            else:
                self._note(artifacts=self.state["artifacts"] | {name: now})
        return failure


def params_of(config: dict[str, Any]) -> dict[str, str]:
    """Every setting as MLflow takes it."""
    return {key: public(str(value))[:PARAM_LENGTH] for key, value in flatten_tree(config).items()}


def tags_of(recorded: dict[str, Any], config: dict[str, Any], logged: Mapping[str, str], known: Mapping[str, str]) -> dict[str, str]:
    """The tags that a run is to have in MLflow: those recorded, and the settings that differ from their parameters.

    Args:
        config: every setting as nested groups.
        logged: MLflow's parameters.
        known: MLflow's tags.
    """
    params = params_of(config)
    ours = params | {key: NOT_SET for key in logged if key not in params and key.partition(".")[0] in config}
    changed = {
        f"{CHANGED_TAG}{key}": value
        for key, value in ours.items()
        if logged.get(key, value) != value or f"{CHANGED_TAG}{key}" in known  # it may have changed back
    }
    return {key: str(value) for key, value in recorded.items()} | changed


def item_name(kind: str, item: Metric | Param | RunTag) -> str:
    """As in `metric `val/loss``."""
    return f"{kind[:-1]} `{item.key}`"


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
        wait, failed, hung = SEND_SECONDS, 0, 0.0
        reported: Kind | None = None
        damaged_line = ""
        refused = self.mlflow_sync.refusals()
        while True:
            closing = self.closing.wait(wait)
            with suppress(OSError):
                self.mlflow_sync.files.lock.touch()
            began = time.monotonic()
            error = self._send()
            before, refused = refused, self.mlflow_sync.refusals()
            for name in refused.keys() - before.keys():
                self.report(f"MLflow will never take {name}; it gets everything else ({refused[name]})")
            while self.mlflow_sync.damage:
                self.report(self.mlflow_sync.damage.pop())
            if error is None:
                if reported is not None:
                    self.report("MLflow is back, and has everything so far")
                wait, failed, hung, reported = SEND_SECONDS, 0, 0.0, None
                if closing:
                    return
                continue
            if isinstance(error, DamagedFileError):
                if error.line != damaged_line:
                    damaged_line = error.line
                    self.report(damaged_line)
            elif not isinstance(error, RunDirectoryError):  # a failed disk ends training, which reports it
                problem = store_problem(error)
                if problem.kind is not reported:
                    reported = problem.kind
                    then = f" {problem.fix[:1].upper()}{problem.fix[1:]}." if problem.fix else ""
                    self.report(f"{problem.what}; training continues, and what MLflow lacks waits on disk.{then}")
            failed, hung, wait = failed + 1, hung + time.monotonic() - began, min(2 * wait, LONGEST_WAIT)
            if closing and (failed > TRIES_AT_THE_END or hung > SECONDS_AT_THE_END or time.monotonic() > self.deadline):
                return
            if closing:
                time.sleep(1)

    def _send(self) -> Exception | None:
        try:
            self.mlflow_sync.send()
        except Exception as error:  # whatever MLflow's client raises: training must not stop for it
            return error
        return None
