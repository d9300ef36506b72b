"""Run identity: one launch, one MLflow run, one directory, however often the launch is retried.

The launch ID is a tag of the MLflow run, and a record on disk. Rank 0 looks for both before it creates a run.
"""

import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, TypeVar

from mlflow.entities import Run as MlflowRun
from mlflow.entities import ViewType
from pydantic import Field
from typing_extensions import TypedDict

from raytrain2p.config import InputError, Problem, Settings
from raytrain2p.config.phases import PHASES_BY_NAME, SWEEPS
from raytrain2p.config.secrets import masked
from raytrain2p.storage.errors import StorageError, is_reachable
from raytrain2p.storage.files import write_json
from raytrain2p.storage.locks import Lock
from raytrain2p.tracking.damage import check_shape, read_as
from raytrain2p.tracking.mlflow_errors import Kind, store_problem
from raytrain2p.tracking.mlflow_store import STORE_ERRORS, client_of, experiment_name, runs_with_tag
from raytrain2p.tracking.run_directory import RunDirectory, next_sequence

LAUNCH_TAG, DIRECTORY_TAG, TIMESTAMP_TAG = "raytrain2p.launch_id", "raytrain2p.directory", "raytrain2p.timestamp"
ROOT_TAG, SWEEP_TAG, COMMAND_TAG = "raytrain2p.root", "raytrain2p.sweep", "raytrain2p.command"
RUN_FOLDERS = (*PHASES_BY_NAME, SWEEPS)  # of run directories, under `output.root`
SECONDS_TO_CREATE = 60.0  # the driver has just reached the store: if it is away now, it may be back in a moment

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Run:
    """One MLflow run and its directory. Plain, so that rank 0 can broadcast it.

    Args:
        phase: name of the phase, or `sweeps`.
        tracking_uri: without its password, for people.
    """

    run_id: Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
    directory: Annotated[str, Field(pattern=r"^/[^\x00]*$")]
    experiment: Annotated[str, Field(min_length=1)]
    timestamp: Annotated[str, Field(pattern=r"^\d{8}_\d{6}$")]
    launch_id: Annotated[str, Field(pattern=r"^[^/\x00]{1,200}$")]
    phase: Annotated[str, Field(pattern=f"^({'|'.join(RUN_FOLDERS)})$")]
    tracking_uri: Annotated[str, Field(min_length=1)]

    @classmethod
    def from_record(cls, record: dict[str, Any], path: Path) -> "Run":
        """The run of a launch's record or of a run.json, which holds more.

        Args:
            path: of the file that it was read from.

        Raises:
            DamagedFileError: it is not the record of a run.
        """
        check_shape(path, record, cls)
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


class Intent(TypedDict):
    """The record of a launch before it has a run."""

    launch_id: str
    timestamp: Annotated[str, Field(pattern=r"^\d{8}_\d{6}$")]
    since: Annotated[float, Field(ge=0, le=1e11)]


def launch_record(root: str, launch_id: str) -> Path:
    """The file in which a launch records its run."""
    return Path(root) / ".launches" / f"{launch_id}.json"


def has_launches(root: str) -> bool:
    """Whether a launch has been begun under a root, be it that none came as far as a run."""
    return launch_record(root, "any").parent.is_dir()


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
    """The run that a launch recorded, if it came that far; where it is now, if the root was moved.

    Raises:
        DamagedFileError: its record is damaged.
    """
    path = launch_record(root, launch_id)
    record = read_as(path, dict[str, Any])
    if record is None or "run_id" not in record:
        if record is not None:
            check_shape(path, record, Intent)
        return None
    run = Run.from_record(record, path)
    return replace(run, directory=run_path(root, run.phase, run.run_id, run.timestamp))


def run_path(root: str, phase: str, run_id: str, timestamp: str) -> str:
    return str(Path(root) / phase / f"{run_id}_{timestamp}")


def original_of(run: Run) -> Path | None:
    """The directory that a run was copied from, if it is still there: that one is the run. None for the run itself, moved or not."""
    recorded = Path((run.files.read_record() or {}).get("directory", run.directory))
    if not RunDirectory(recorded).record.is_file() or recorded.resolve() == run.path.resolve():
        return None
    return recorded


def record_move(run: Run) -> bool:
    """Record where a moved run is now, in its directory, from where MLflow gets it. Returns whether it was moved."""
    record = run.files.read_record()
    if record is None or Path(record["directory"]).resolve() == run.path.resolve():
        return False
    run.files.write_record(record | {"directory": run.directory})
    run.add_tags({DIRECTORY_TAG: run.directory, ROOT_TAG: str(run.path.parent.parent)})
    return True


def check_not_elsewhere(tags: Mapping[str, str], run_id: str, phase: str, root: str, launch_id: str) -> None:
    """Check that a launch's run in MLflow belongs to this output root, or to one that was moved here.

    Args:
        tags: of the run in MLflow. The plain-file store writes them one by one: some may be missing after a kill.

    Raises:
        InputError: it belongs to another root.
    """
    theirs = tags.get(ROOT_TAG, root)
    here = run_path(root, phase, run_id, tags.get(TIMESTAMP_TAG, ""))
    moved = is_reachable(Path(here)) and not is_reachable(Path(tags.get(DIRECTORY_TAG, "")))
    if Path(theirs).resolve() != Path(root).resolve() and not moved:
        what = f"belongs to run {run_id[:8]} of output.root={theirs}, and this is output.root={root}"
        raise InputError(Problem(f"--launch-id {launch_id}", what, "take another launch ID, or set output.root to the first one"))


def check_launch_is_free(settings: Settings, phase: str, launch_id: str) -> None:
    """Check in MLflow that a launch that this output root has no record of has no run elsewhere, be it on another machine.

    Raises:
        InputError: it has.
    """
    with suppress(*STORE_ERRORS):  # rank 0 checks it again, and waits for a store that is away
        for found in runs_with_tag(client_of(settings.tracking.uri), LAUNCH_TAG, launch_id):
            tags, run_id = found.data.tags, found.info.run_id
            check_not_elsewhere(tags, run_id, phase, settings.output.root, launch_id)
            if COMMAND_TAG in tags and not is_reachable(Path(tags.get(DIRECTORY_TAG, ""))):
                what = f"belongs to run {run_id[:8]}, whose directory {tags.get(DIRECTORY_TAG)} is not here"
                raise InputError(Problem(f"--launch-id {launch_id}", what, "mount its disk again, or take another launch ID"))


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
        InputError: the launch ID belongs to another output root.
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
    intent = read_as(record, Intent)
    if intent is None:
        intent = {"launch_id": launch_id, "timestamp": datetime.now().strftime("%Y%m%d_%H%M%S"), "since": time.time()}
        write_json(record, intent)
    experiment = experiment_name(settings, default_experiment)
    run_id, timestamp, is_described = _retried(lambda: _find_or_make(uri, experiment, phase, intent, root, tags))
    directory = run_path(root, phase, run_id, timestamp)
    if is_described and not is_reachable(Path(directory)):
        raise _directory_gone(run_id, directory, launch_id)
    run = Run(run_id, directory, experiment, timestamp, launch_id, phase, masked(uri))
    _retried(lambda: client_of(uri).set_tag(run_id, DIRECTORY_TAG, directory))
    (run.files.trials if phase == SWEEPS else run.checkpoints).mkdir(parents=True, exist_ok=True)
    with Lock(record.with_name(".sequence.lock")).held(SECONDS_TO_CREATE):  # without it, two runs may have one number
        known = run.files.sequence()
        sequence = int(known) if 0 < known < math.inf else next_sequence(root, record.with_name(".sequence"))
        run.files.write_record(asdict(run) | {"tags": tags, "sequence": sequence})
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
    uri: str, experiment: str, phase: str, intent: dict[str, Any], root: str, more_tags: dict[str, str]
) -> tuple[str, str, bool]:
    """The ID of the launch's run in MLflow, its timestamp, and whether it has had a directory that described it.

    Sent again after any failure, it finds what the failed request made.
    """
    client = client_of(uri)
    found = client.get_experiment_by_name(experiment)
    assert found is not None, "prepare_store() runs in the driver, before any worker"
    name = f"{phase}_{intent['timestamp']}"
    tags = {LAUNCH_TAG: intent["launch_id"], TIMESTAMP_TAG: intent["timestamp"], ROOT_TAG: root} | more_tags

    def search(query: str) -> list[MlflowRun]:
        return list(client.search_runs([found.experiment_id], query, ViewType.ALL))

    runs = search(f"tags.`{LAUNCH_TAG}` = '{intent['launch_id']}'")
    for run in runs:
        check_not_elsewhere(run.data.tags, run.info.run_id, phase, root, intent["launch_id"])
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
