"""Run identity: one launch, one MLflow run, one directory, however often the launch is retried.

The launch ID is a tag of the MLflow run, and a record on disk. Rank 0 looks for both before it makes a run.
"""

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from mlflow.entities import Run as MlflowRun
from mlflow.entities import ViewType

from raytrain2p.config import Settings
from raytrain2p.config.phases import ALIGNMENT, INSTRUCTION, PHASES_BY_NAME
from raytrain2p.config.secrets import masked, without_passwords
from raytrain2p.storage.errors import StorageError, is_reachable
from raytrain2p.storage.files import read_json, write_file, write_json
from raytrain2p.storage.locks import Lock
from raytrain2p.tracking.mlflow_store import STORE_ERRORS, client_of, experiment_name

LAUNCH_TAG, DIRECTORY_TAG, TIMESTAMP_TAG = "raytrain2p.launch_id", "raytrain2p.directory", "raytrain2p.timestamp"
ROOT_TAG, SWEEP_TAG, COMMAND_TAG = "raytrain2p.root", "raytrain2p.sweep", "raytrain2p.command"
RUN_ID_LENGTH = 32
CHECKPOINTS = "lightning_checkpoints"
# What goes to MLflow when a run has ended: path in the run directory, folder among the run's artifacts
ARTIFACTS = {
    **{ALIGNMENT.artifact: "aligner", INSTRUCTION.artifact: "model", "plots": "plots", "answers.jsonl": None},
    **{"trials.csv": None, "best.json": None},
}
SECONDS_TO_CREATE = 60.0  # the driver has just spoken to the store: if it is away now, it may be back in a moment
SECONDS_TO_INHERIT = 60.0  # a killed predecessor may take this long to let go of the run directory


@dataclass(frozen=True)
class Run:
    """One MLflow run and the directory that belongs to it. Plain, so that rank 0 can broadcast it."""

    run_id: str
    directory: str
    experiment: str
    timestamp: str
    launch_id: str
    phase: str
    tracking_uri: str  # masked: for people

    @property
    def path(self) -> Path:
        return Path(self.directory)

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS


def launch_record(root: str, launch_id: str) -> Path:
    """Where a launch notes which run is its own."""
    return Path(root) / ".launches" / f"{launch_id}.json"


def launch_lock(root: str, launch_id: str) -> Lock:
    """Held by the driver for as long as the launch is under way."""
    return Lock(Path(root) / ".launches" / f"{launch_id}.lock")


def disk_gone(root: str, launch_id: str) -> StorageError | None:
    """Whether the disk of a launch that is under way was taken away: the folder is gone in which its driver has its lock."""
    folder = launch_record(root, launch_id).parent
    if is_reachable(folder):
        return None
    reason = f"{folder} is gone, or on no storage that this node shares; what was whole stays as it is"
    return StorageError(f"{root} cannot be written: {reason}")


def run_lock(run: Run) -> Lock:
    """Held by rank 0 for as long as it writes to the run directory."""
    return Lock(run.path / ".lock")


def recorded_run(root: str, launch_id: str) -> Run | None:
    """The run that a launch made, if it got that far."""
    noted = read_json(launch_record(root, launch_id))
    return run_of(noted) if noted and "run_id" in noted else None


def run_of(noted: dict[str, Any]) -> Run:
    """The run out of a record or a run.json, which may say more."""
    return Run(**{field: noted[field] for field in Run.__dataclass_fields__})


def get_or_create_run(
    settings: Settings,
    phase: str,
    default_experiment: str,
    launch_id: str,
    tags: dict[str, str] | None = None,
    folder: str = CHECKPOINTS,
) -> Run:
    """The launch's run: the one that an earlier worker group made, else a new one. Called on rank 0 alone.

    Whenever a predecessor died, there is one run: before it asked for a run there was none; a run that the store made has
    the launch ID as a tag, or, in the plain-file store, which writes tags one by one, at least the name that was noted
    beforehand; and once it is recorded, the store is not asked at all.

    Args:
        settings: of the run.
        phase: name of its directory under `output.root`, and the beginning of the run's name.
        default_experiment: MLflow experiment, unless the settings have another.
        launch_id: stable name of the launch.
        tags: more tags of a new run: a sweep's trial names its parent.
        folder: made in a new directory.

    Raises:
        StorageError: where the driver has its lock of the launch is gone, or the run's directory is: a run begun anew there
            would lie on another disk, and MLflow would have its steps twice.
        STORE_ERRORS: the store has been away for a minute.
    """
    root = settings.output.root
    record = launch_record(root, launch_id)
    if (gone := disk_gone(root, launch_id)) is not None:
        raise gone
    with Lock(record.with_suffix(".creating")).held(2 * SECONDS_TO_CREATE) as holder:
        if holder is not None:  # rank 0 of a launch that was killed just now was at it, and does not end
            raise RuntimeError(f"launch {launch_id} is being recorded by another process ({holder})")
        if (run := recorded_run(root, launch_id)) is not None:
            if not is_reachable(run.path):
                raise _directory_gone(run.run_id, run.directory, launch_id)
            return run
        intent = read_json(record)
        if intent is None:
            intent = {"launch_id": launch_id, "timestamp": datetime.now().strftime("%Y%m%d_%H%M%S"), "since": time.time()}
            write_json(record, intent)
        name, begun = experiment_name(settings, default_experiment), f"{phase}_{intent['timestamp']}"
        run_id, timestamp, is_described = _patiently(lambda: _find_or_make(settings.tracking.uri, name, begun, intent, root, tags or {}))
        directory = str(Path(root) / phase / f"{run_id}_{timestamp}")
        if is_described and not is_reachable(Path(directory)):
            raise _directory_gone(run_id, directory, launch_id)
        run = Run(run_id, directory, name, timestamp, launch_id, phase, masked(settings.tracking.uri))
        _patiently(lambda: client_of(settings.tracking.uri).set_tag(run_id, DIRECTORY_TAG, directory))
        (run.path / folder).mkdir(parents=True, exist_ok=True)
        write_json(run.path / "run.json", asdict(run) | {"tags": tags or {}})
        write_json(record, asdict(run))
    return run


def _directory_gone(run_id: str, directory: str, launch_id: str) -> StorageError:
    return StorageError(
        f"{directory} is gone, where launch {launch_id} has its run {run_id[:8]}: mount its disk again, or take another --launch-id"
    )


def _patiently(ask: Any) -> Any:
    """The answer of the store, asked again while it is away."""
    deadline = time.monotonic() + SECONDS_TO_CREATE
    while True:
        try:
            return ask()
        except STORE_ERRORS:
            if time.monotonic() > deadline:
                raise
            time.sleep(1)


def _find_or_make(
    uri: str, experiment: str, name: str, intent: dict[str, Any], root: str, more_tags: dict[str, str]
) -> tuple[str, str, bool]:
    """The ID of the launch's run in the store, when it began, and whether it has had a directory that described it.

    Asked again after any failure, it finds what the failed request made.
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


@contextmanager
def sole_writer(run: Run) -> Iterator[None]:
    """Within, no other process writes to the run directory: a killed launch's workers may live on for a few seconds.

    Raises:
        RuntimeError: another process does not let go.
    """
    with run_lock(run).held(SECONDS_TO_INHERIT) as holder:
        if holder is not None:
            raise RuntimeError(f"another process writes to {run.directory} ({holder}), and does not end")
        for aside in run.path.rglob(".*.aside-*"):
            aside.unlink(missing_ok=True)  # what a kill left half written
        yield


def describe_run(run: Run, config: dict[str, Any], command: str, facts: dict[str, Any], page: str | None = None) -> list[str]:
    """Write what the run is into its directory: settings, identity, and a page for a person. It is sent to MLflow from there.

    Args:
        run: the run.
        config: every setting, resolved and masked, as nested groups.
        command: shell line that launches the same again.
        facts: what a resumed run is checked against, such as the number of training records.
        page: README.md of the directory, if it is no phase's run.

    Returns:
        What is different from the last time, a line for each setting.
    """
    before = read_json(run.path / "config.json")
    changes = setting_changes(before, config) if before else {}
    if changes:
        row = {"at": time.time(), "changes": {key: list(pair) for key, pair in changes.items()}}
        with (run.path / "changes.jsonl").open("a") as stream:
            stream.write(json.dumps(row) + "\n")
    write_json(run.path / "config.json", config)
    write_file(
        run.path / "MLFLOW_RUN_ID.txt",
        f"run_id: {run.run_id}\ndirectory: {run.directory}\nexperiment: {run.experiment}\ntimestamp: {run.timestamp}\n",
    )
    write_file(run.path / "README.md", page or _readme(run, masked(command)))
    tags = {LAUNCH_TAG: run.launch_id, DIRECTORY_TAG: run.directory, TIMESTAMP_TAG: run.timestamp, COMMAND_TAG: masked(command)}
    write_json(run.path / "run.json", asdict(run) | facts | {"tags": run_tags(run.path) | tags, "described": time.time()})
    return [f"{key}: {old} -> {new}" for key, (old, new) in changes.items()]


def add_tags(run: Run, tags: dict[str, str]) -> None:
    """Say more of a run that is described already: in its directory, from where it is sent to MLflow."""
    noted = read_json(run.path / "run.json") or asdict(run)
    write_json(run.path / "run.json", noted | {"tags": noted.get("tags", {}) | tags, "described": time.time()})


def run_tags(directory: Path) -> dict[str, str]:
    """What a run's directory says of it."""
    found: dict[str, str] = (read_json(directory / "run.json") or {}).get("tags", {})
    return found


def resolved_config(settings: Settings, resolved: dict[str, Any]) -> dict[str, Any]:
    """Every setting as nested groups of plain values, with what only the worker knew, and no password.

    Args:
        settings: as given.
        resolved: by dotted path, such as the precision that `auto` became.
    """
    config: dict[str, Any] = without_passwords(json.loads(settings.model_dump_json()))
    for key, value in resolved.items():
        *groups, last = key.split(".")
        node = config
        for group in groups:
            node = node[group]
        node[last] = value
    return config


def setting_changes(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Settings that differ, by dotted path, as (before, after)."""
    changes: dict[str, tuple[Any, Any]] = {}
    for key in [*before, *(key for key in after if key not in before)]:
        old, new, path = before.get(key), after.get(key), f"{prefix}{key}"
        if isinstance(old, dict) and isinstance(new, dict):
            changes |= setting_changes(old, new, f"{path}.")
        elif old != new:
            changes[path] = (old, new)
    return changes


def write_status(directory: Path, status: str) -> None:
    """RUNNING, FINISHED, FAILED or KILLED: what MLflow is to say, too."""
    write_json(directory / "status.json", {"status": status, "at": time.time(), "host": socket.gethostname(), "pid": os.getpid()})


def read_status(directory: Path) -> dict[str, Any]:
    """The last `write_status`; RUNNING, at no time, where there was none."""
    return read_json(directory / "status.json") or {"status": "RUNNING", "at": 0.0, "host": "", "pid": 0}


def _readme(run: Run, command: str) -> str:
    phase = PHASES_BY_NAME[run.phase]
    use = (
        f"python -m raytrain2p.train --phase 2 --aligner {run.run_id[:8]}"
        if phase == ALIGNMENT
        else f'python -m raytrain2p.predict --run {run.run_id[:8]} --image FILE "What does the picture show?"'
    )
    return f"""# {run.phase} run {run.run_id}

Made by raytrain2p on {run.timestamp}, MLflow experiment `{run.experiment}`.

| file | what it is |
|---|---|
| `{phase.artifact}` | the deployable result |
| `lightning_checkpoints/` | the best checkpoint and the last one: what was trained, and the optimizer |
| `config.json` | every setting; `changes.jsonl`, if there is one: what a resumed run had otherwise |
| `metrics.jsonl` | every metric point |
| `plots/` | images |
| `status.json` | RUNNING, FINISHED, FAILED or KILLED |

Trained with

    {command}

Use it:

    {use}

Go on with it, if it did not finish:

    python -m raytrain2p.train --phase {phase.number} --resume {run.run_id[:8]}
"""
