"""A launch's run is got, or created: in MLflow, on disk, and in the launch's record, whenever an earlier process was killed."""

import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from mlflow.entities import Run as MlflowRun
from mlflow.entities import ViewType

from raytrain2p.config import InputError, Problem, Settings
from raytrain2p.config.phases import SWEEPS
from raytrain2p.config.scratch import is_remote, local_path, public
from raytrain2p.config.secrets import masked
from raytrain2p.storage.errors import StorageError, is_reachable
from raytrain2p.storage.files import write_json
from raytrain2p.storage.locks import Lock
from raytrain2p.storage.remote import next_number, pull, push_file
from raytrain2p.tracking.damage import read_as
from raytrain2p.tracking.mlflow_errors import Kind, store_problem
from raytrain2p.tracking.mlflow_store import STORE_ERRORS, client_of, experiment_name, runs_with_tag
from raytrain2p.tracking.run import (
    COMMAND_TAG,
    DIRECTORY_TAG,
    LAUNCH_TAG,
    PRUNED_DIRECTORY,
    PRUNED_TAG,
    ROOT_TAG,
    TIMESTAMP_TAG,
    Intent,
    Run,
    disk_gone,
    launch_record,
    recorded_run,
    run_path,
)
from raytrain2p.tracking.run_directory import next_sequence

SECONDS_TO_CREATE = 60.0  # the driver has just reached the store: if it is away now, it may be back in a moment

Answer = TypeVar("Answer")


def check_not_elsewhere(tags: Mapping[str, str], run_id: str, phase: str, root: str, launch_id: str) -> None:
    """Check that a launch's run in MLflow belongs to this output root, or to one that was moved here.

    Args:
        tags: of the run in MLflow. The plain-file store writes them one by one: some may be missing after a kill.

    Raises:
        InputError: it belongs to another root.
    """
    theirs = tags.get(ROOT_TAG, root)
    here = run_path(root, phase, run_id, tags.get(TIMESTAMP_TAG, ""))
    moved = is_reachable(Path(here)) and not is_reachable(Path(local_path(tags.get(DIRECTORY_TAG, ""))))
    if Path(local_path(theirs)).resolve() != Path(root).resolve() and not moved:
        what = f"belongs to run {run_id[:8]} of output.root={theirs}, and this is output.root={root}"
        raise InputError(Problem(f"--launch-id {launch_id}", what, "take another launch ID, or set output.root to the first one"))


def check_launch_is_free(settings: Settings, phase: str, launch_id: str) -> None:
    """Check in MLflow that a launch that this output root has no record of has no run elsewhere, be it on another machine.

    Raises:
        InputError: it has.
    """
    with suppress(*STORE_ERRORS):  # rank 0 checks it again, and waits for a store that is away
        for found in runs_with_tag(client_of(settings.tracking.uri), LAUNCH_TAG, launch_id, view=ViewType.ALL):
            tags, run_id = found.data.tags, found.info.run_id
            if tags.get(PRUNED_TAG) == PRUNED_DIRECTORY:
                continue
            check_not_elsewhere(tags, run_id, phase, settings.output.root, launch_id)
            if COMMAND_TAG in tags and not is_reachable(Path(local_path(tags.get(DIRECTORY_TAG, "")))):
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
        push_file(record)
    experiment = experiment_name(settings, default_experiment)
    run_id, timestamp, is_described = _retried(lambda: _find_or_make(uri, experiment, phase, intent, root, tags))
    directory = run_path(root, phase, run_id, timestamp)
    pull(Path(directory))
    if is_described and not is_reachable(Path(directory)):
        raise _directory_gone(run_id, directory, launch_id)
    run = Run(run_id, directory, experiment, timestamp, launch_id, phase, masked(uri))
    _retried(lambda: client_of(uri).set_tag(run_id, DIRECTORY_TAG, public(directory)))
    (run.files.trials if phase == SWEEPS else run.checkpoints).mkdir(parents=True, exist_ok=True)
    with Lock(record.with_name(".sequence.lock")).held(SECONDS_TO_CREATE):  # without it, two runs may have one number
        known = run.files.sequence()
        sequence = int(known) if 0 < known < math.inf else _next_sequence(root, record.with_name(".sequence"))
        run.files.write_record(asdict(run) | {"tags": tags, "sequence": sequence})
    push_file(run.files.record)
    write_json(record, asdict(run))
    push_file(record)
    return run


def _next_sequence(root: str, kept: Path) -> int:
    return next_number(root, 0) if is_remote(root) else next_sequence(root, kept)


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
    tags = {LAUNCH_TAG: intent["launch_id"], TIMESTAMP_TAG: intent["timestamp"], ROOT_TAG: public(root)} | more_tags

    def search(query: str) -> list[MlflowRun]:
        return list(client.search_runs([found.experiment_id], query, ViewType.ALL))

    runs = search(f"tags.`{LAUNCH_TAG}` = '{intent['launch_id']}'")
    runs = [run for run in runs if run.data.tags.get(PRUNED_TAG) != PRUNED_DIRECTORY]  # the launch ID is free again
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
    made = runs[0] if runs else client.create_run(found.experiment_id, round(1000 * intent["since"]), tags, name)
    return str(made.info.run_id), str(made.data.tags.get(TIMESTAMP_TAG, intent["timestamp"])), COMMAND_TAG in made.data.tags
