"""Run identity: one launch, one MLflow run, one directory, however often the launch is retried.

The launch ID is a tag of the MLflow run, and a record on disk. Nothing here needs MLflow: `create_run.py` does.
"""

import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from typing_extensions import TypedDict

from raytrain2p.config.phases import PHASES_BY_NAME, SWEEPS
from raytrain2p.config.scratch import local_path, public
from raytrain2p.storage.errors import StorageError, is_reachable
from raytrain2p.storage.locks import Lock
from raytrain2p.tracking.damage import check_shape, read_as
from raytrain2p.tracking.run_directory import RunDirectory

LAUNCH_TAG, DIRECTORY_TAG, TIMESTAMP_TAG = "raytrain2p.launch_id", "raytrain2p.directory", "raytrain2p.timestamp"
ROOT_TAG, SWEEP_TAG, TRIAL_TAG, COMMAND_TAG = "raytrain2p.root", "raytrain2p.sweep", "raytrain2p.trial", "raytrain2p.command"
DIGEST_TAG = "raytrain2p.digest"  # of a registered model: that of its model.pt
CHANGED_TAG, NOT_SET = "raytrain2p.changed.", "not set"  # of a setting that a resumed run changed; and its value if it has none now
LAUNCH_ID = r"\w[\w.-]{0,99}"  # the name of a file, and part of an MLflow filter
PRUNED_TAG = "raytrain2p.pruned"  # `checkpoints`: the run has none any more; `directory`: nor has it a directory
PRUNED_CHECKPOINTS, PRUNED_DIRECTORY = "checkpoints", "directory"
EARLY_TAG = "raytrain2p.stopped_early"  # of a trial that its sweep ended: it is FINISHED without a result
RUN_FOLDERS = (*PHASES_BY_NAME, SWEEPS)  # of run directories, under `output.root`


@dataclass(frozen=True)
class Run:
    """One MLflow run and its directory. Plain, so that rank 0 can broadcast it.

    Args:
        phase: name of the phase, or `sweeps`.
        tracking_uri: without its password, for people.
    """

    run_id: Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
    directory: Annotated[str, Field(pattern=r"^(/|\w+://)[^\x00]*$")]
    experiment: Annotated[str, Field(min_length=1)]
    timestamp: Annotated[str, Field(pattern=r"^\d{8}_\d{6}$")]
    launch_id: Annotated[str, Field(pattern=r"^[^./\x00][^/\x00]{0,199}$")]
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

    @cached_property
    def path(self) -> Path:
        return Path(self.directory)

    @cached_property
    def files(self) -> RunDirectory:
        return RunDirectory(self.path)

    @property
    def checkpoints(self) -> Path:
        return self.files.checkpoints

    def add_tags(self, tags: dict[str, str]) -> None:
        """Add tags to the record in its directory, from where they are sent to MLflow."""
        self.change_tags(tags, ())

    def change_tags(self, tags: dict[str, str], removed: Iterable[str]) -> None:
        """Add and remove tags. MLflow keeps what the record just lacks: the names of those removed are recorded, too."""
        record, removed = self.files.read_record() or asdict(self), {*removed}
        kept = {key: value for key, value in record.get("tags", {}).items() if key not in removed} | tags
        gone = sorted({*record.get("removed_tags", ()), *removed} - kept.keys())
        self.files.write_record(record | {"tags": kept, "removed_tags": gone, "described": time.time()})


class Intent(TypedDict):
    """The record of a launch before it has a run."""

    launch_id: str
    timestamp: Annotated[str, Field(pattern=r"^\d{8}_\d{6}$")]
    since: Annotated[float, Field(ge=0, le=1e11)]


def launch_record(root: str, launch_id: str) -> Path:
    """The file in which a launch records its run."""
    return Path(root) / ".launches" / f"{launch_id}.json"


def migration_journal(root: str, launch_id: str) -> Path:
    """The file in which `migrate` records what it does for the run of a launch."""
    return Path(root) / ".migrated" / f"{launch_id}.json"


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


def beginning_launches(root: str) -> list[str]:
    """Launches under way that have no run yet: which aligner they take is not on record.

    Raises:
        DamagedFileError: the record of one is damaged.
    """
    held = [lock.stem for lock in launch_record(root, "any").parent.glob("[!.]*.lock") if Lock(lock).is_held()]
    return [launch_id for launch_id in sorted(held) if recorded_run(root, launch_id) is None]


def run_path(root: str, phase: str, run_id: str, timestamp: str) -> str:
    return str(Path(root) / phase / f"{run_id}_{timestamp}")


def original_of(run: Run) -> Path | None:
    """The directory that a run was copied from, if it is still there: that one is the run. None for the run itself, moved or not."""
    recorded = Path(local_path((run.files.read_record() or {}).get("directory", run.directory)))
    if not RunDirectory(recorded).record.is_file() or recorded.resolve() == run.path.resolve():
        return None
    return recorded


def record_move(run: Run) -> bool:
    """Record where a moved run is now, in its directory, from where MLflow gets it. Returns whether it was moved."""
    record = run.files.read_record()
    if record is None or Path(local_path(record["directory"])).resolve() == run.path.resolve():
        return False
    run.files.write_record(record | {"directory": run.directory})
    run.add_tags({DIRECTORY_TAG: public(run.directory), ROOT_TAG: public(str(run.path.parent.parent))})
    return True
