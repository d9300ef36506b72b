"""Run identity: one launch, one MLflow run, one directory, however often the launch is retried.

The launch ID is a tag of the MLflow run, and a record on disk. Rank 0 looks for both before it creates a run.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from mlflow.entities import Run as MlflowRun
from mlflow.entities import ViewType

from raytrain2p.config import Settings
from raytrain2p.config.phases import SWEEPS
from raytrain2p.config.secrets import masked
from raytrain2p.storage.errors import StorageError, is_reachable
from raytrain2p.storage.files import read_json, write_json
from raytrain2p.storage.locks import Lock
from raytrain2p.tracking.mlflow_errors import Kind, store_problem
from raytrain2p.tracking.mlflow_store import STORE_ERRORS, client_of, experiment_name
from raytrain2p.tracking.run_directory import RunDirectory

LAUNCH_TAG, DIRECTORY_TAG, TIMESTAMP_TAG = "raytrain2p.launch_id", "raytrain2p.directory", "raytrain2p.timestamp"
ROOT_TAG, SWEEP_TAG, COMMAND_TAG = "raytrain2p.root", "raytrain2p.sweep", "raytrain2p.command"
SECONDS_TO_CREATE = 60.0  # the driver has just reached the store: if it is away now, it may be back in a moment

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Run:
    """One MLflow run and its directory. Plain, so that rank 0 can broadcast it.

    Args:
        phase: name of the phase, or `sweeps`.
        tracking_uri: without its password, for people.
    """

    run_id: str
    directory: str
    experiment: str
    timestamp: str
    launch_id: str
    phase: str
    tracking_uri: str

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> "Run":
        """The run of a launch's record or of a run.json, which holds more."""
        return cls(**{field: record[field] for field in cls.__dataclass_fields__})

    @property
    def path(self) -> Path:
        return Path(self.directory)

    @property
    def files(self) -> RunDirectory:
        return RunDirectory(self.path)

    @property
    def checkpoints(self) -> Path:
        return self.files.checkpoints

    def add_tags(self, tags: dict[str, str]) -> None:
        """Add tags to the record in its directory, from where they are sent to MLflow."""
        record = self.files.read_record() or asdict(self)
        self.files.write_record(record | {"tags": record.get("tags", {}) | tags, "described": time.time()})


def launch_record(root: str, launch_id: str) -> Path:
    """The file in which a launch records its run."""
    return Path(root) / ".launches" / f"{launch_id}.json"


def launch_lock(root: str, launch_id: str) -> Lock:
    """Held by the driver for as long as the launch is under way."""
    return Lock(Path(root) / ".launches" / f"{launch_id}.lock")


def disk_gone(root: str, launch_id: str) -> StorageError | None:
    """The error to raise if the disk of a launch under way was removed: the folder of its driver's lock is gone."""
    folder = launch_record(root, launch_id).parent
    if is_reachable(folder):
        return None
    reason = f"{folder} is gone, or not on storage that this node shares; complete files are unchanged"
    return StorageError(f"{root} cannot be written: {reason}")


def recorded_run(root: str, launch_id: str) -> Run | None:
    """The run that a launch recorded, if it came that far."""
    record = read_json(launch_record(root, launch_id))
    return Run.from_record(record) if record and "run_id" in record else None


def get_or_create_run(settings: Settings, phase: str, default_experiment: str, launch_id: str, tags: dict[str, str] | None = None) -> Run:
    """The run of a launch: that of an earlier worker group, else a new one. Called on rank 0 alone.

    Whenever an earlier process was killed, there is one run. Before it created one in MLflow, there was none. One that MLflow
    has carries the launch ID as a tag, or, in the plain-file store, which writes tags one by one, at least the name
    that was recorded beforehand. Once the run is recorded on disk, MLflow is not asked.

    Args:
        phase: name of its directory under `output.root`, and the beginning of the run's name.
        default_experiment: MLflow experiment, unless the settings name another.
        tags: more tags of a new run, such as the sweep that a trial belongs to.

    Raises:
        StorageError: the folder of the driver's lock, or the run's directory, is gone: a new run there would be on another
            disk, and MLflow would have its steps twice. Or MLflow does not take it, or has been away for a minute.
        RuntimeError: another process of the same launch does not end.
    """
    root = settings.output.root
    if (gone := disk_gone(root, launch_id)) is not None:
        raise gone
    lock = Lock(launch_record(root, launch_id).with_suffix(".creating"))
    with lock.held(2 * SECONDS_TO_CREATE) as holder:
        if holder is not None:  # rank 0 of a launch that was killed just now, and does not end
            raise RuntimeError(f"launch {launch_id} is being recorded by another process ({holder})")
        if (run := recorded_run(root, launch_id)) is None:
            return _create_run(settings, phase, default_experiment, launch_id, tags or {})
        if not is_reachable(run.path):
            raise _directory_gone(run.run_id, run.directory, launch_id)
        return run


def _create_run(settings: Settings, phase: str, default_experiment: str, launch_id: str, tags: dict[str, str]) -> Run:
    """The run in MLflow, its directory and its two records, in this order: each can be made again after a kill."""
    root, uri = settings.output.root, settings.tracking.uri
    record = launch_record(root, launch_id)
    intent = read_json(record)
    if intent is None:
        intent = {"launch_id": launch_id, "timestamp": datetime.now().strftime("%Y%m%d_%H%M%S"), "since": time.time()}
        write_json(record, intent)
    experiment, name = experiment_name(settings, default_experiment), f"{phase}_{intent['timestamp']}"
    run_id, timestamp, is_described = _retried(lambda: _find_or_make(uri, experiment, name, intent, root, tags))
    directory = str(Path(root) / phase / f"{run_id}_{timestamp}")
    if is_described and not is_reachable(Path(directory)):
        raise _directory_gone(run_id, directory, launch_id)
    run = Run(run_id, directory, experiment, timestamp, launch_id, phase, masked(uri))
    _retried(lambda: client_of(uri).set_tag(run_id, DIRECTORY_TAG, directory))
    (run.files.trials if phase == SWEEPS else run.checkpoints).mkdir(parents=True, exist_ok=True)
    run.files.write_record(asdict(run) | {"tags": tags})
    write_json(record, asdict(run))
    return run


def _directory_gone(run_id: str, directory: str, launch_id: str) -> StorageError:
    return StorageError(
        f"{directory} is gone, where launch {launch_id} has its run {run_id[:8]}: mount its disk again, or take another --launch-id"
    )


def _retried(request: Callable[[], Answer]) -> Answer:
    """The answer to a request, which is sent again while MLflow is away.

    Raises:
        StorageError: MLflow does not take it, or has been away for a minute.
    """
    deadline = time.monotonic() + SECONDS_TO_CREATE
    while True:
        try:
            return request()
        except STORE_ERRORS as error:
            problem = store_problem(error)
            if problem.kind not in (Kind.AWAY, Kind.FAILED) or time.monotonic() > deadline:
                raise StorageError(f"the run cannot be created in MLflow: {problem}") from error
            time.sleep(1)


def _find_or_make(
    uri: str, experiment: str, name: str, intent: dict[str, Any], root: str, more_tags: dict[str, str]
) -> tuple[str, str, bool]:
    """The ID of the launch's run in MLflow, its timestamp, and whether it has had a directory that described it.

    Sent again after any failure, it finds what the failed request made.
    """
    client = client_of(uri)
    found = client.get_experiment_by_name(experiment)
    assert found is not None, "prepare_store() runs in the driver, before any worker"
    tags = {LAUNCH_TAG: intent["launch_id"], TIMESTAMP_TAG: intent["timestamp"], ROOT_TAG: root} | more_tags

    def search(query: str) -> list[MlflowRun]:
        return list(client.search_runs([found.experiment_id], query, ViewType.ALL))

    runs = search(f"tags.`{LAUNCH_TAG}` = '{intent['launch_id']}'")
    if not runs:
        runs = [
            run
            for run in search(f"attributes.run_name = '{name}'")
            if LAUNCH_TAG not in run.data.tags and run.info.start_time >= 1000 * intent["since"] - 1
        ]
        for run in runs[:1]:
            for key, value in tags.items():
                client.set_tag(run.info.run_id, key, value)
    made = runs[0] if runs else client.create_run(found.experiment_id, run_name=name, tags=tags)
    return str(made.info.run_id), str(made.data.tags.get(TIMESTAMP_TAG, intent["timestamp"])), COMMAND_TAG in made.data.tags
