"""Checks between runs: launches and directories, directories and MLflow's runs, what runs began with, sweeps and trials."""

import os
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

from raytrain2p.config import InputError, flatten_tree
from raytrain2p.config.phases import ALIGNMENT, PHASES_BY_NAME, SWEEPS, Phase
from raytrain2p.config.settings import ALIGNER
from raytrain2p.runs.difference import RECONCILE, RESTORE, Difference, difference
from raytrain2p.runs.lineage import ORIGINS, content_of
from raytrain2p.runs.removal import leftovers, name_of
from raytrain2p.runs.summary import origin_digest, origin_of, phase_of
from raytrain2p.tracking.damage import DamagedFileError, read_as
from raytrain2p.tracking.find import is_empty
from raytrain2p.tracking.mlflow_runs import RemoteRun
from raytrain2p.tracking.run import (
    COMMAND_TAG,
    LAUNCH_TAG,
    PRUNED_DIRECTORY,
    PRUNED_TAG,
    ROOT_TAG,
    RUN_FOLDERS,
    SWEEP_TAG,
    Run,
    launch_lock,
    launch_record,
    recorded_run,
)
from raytrain2p.tracking.run_directory import PRUNED_TRIAL, RUN_ID_LENGTH, RunDirectory

DELETE = "restore it from a backup; or, if it was removed on purpose, `mlflow runs delete --run-id {}`"


def check_launches(root: str) -> Iterator[Difference]:
    """Each launch that recorded a run has its directory; one whose deletion was interrupted is named as that."""
    unfinished = dict[str, Path]()
    for path in leftovers(root):
        unfinished[name_of(path)] = path
        run_id = name_of(path)[:RUN_ID_LENGTH]
        fix = f"`python -m raytrain2p.runs prune {run_id[:8]} --yes` finishes it"
        yield Difference(path.parent.name, run_id, str(path), "is what an interrupted prune has left of a run", fix)
    for path in sorted(launch_record(root, "any").parent.glob("*.json")):
        launch_id = path.stem
        try:
            run = recorded_run(root, launch_id)
        except DamagedFileError as error:
            problem = error.problems[0]
            yield Difference("launch", launch_id, problem.where, problem.what, problem.fix)
            continue
        if run is not None and not run.path.is_dir() and run.path.name not in unfinished and not launch_lock(root, launch_id).is_held():
            fix = DELETE.format(run.run_id) + f" and remove {path}"
            yield difference(run, run.directory, f"is gone, where launch {launch_id} has its run", fix)


def check_launch_of(run: Run) -> Iterator[Difference]:
    """The launch of a run has recorded it."""
    root = str(run.path.parent.parent)
    with suppress(DamagedFileError):  # a difference of its launch
        recorded = recorded_run(root, run.launch_id)
        if recorded is None:
            path = launch_record(root, run.launch_id)
            yield difference(run, path, "does not record this run, which cannot be resumed so", f"{RESTORE}, or move the run back")
        elif recorded.path != run.path and recorded.path.resolve() != run.path.resolve():
            what = f"is a second run of launch {run.launch_id}, whose run is {recorded.directory}"
            yield difference(run, run.directory, what, "move it back to where it was, or remove one of the two")


def check_without_directory(root: str, remotes: Iterable[RemoteRun], here: Collection[str]) -> Iterator[Difference]:
    """Each of MLflow's runs of this output root has its directory.

    Args:
        remotes: all that MLflow has.
        here: run IDs that are accounted for.
    """
    remotes = list(remotes)
    moved = {remote.tags.get(ROOT_TAG, root) for remote in remotes if remote.run_id in here}
    roots = {real(root), *(real(other) for other in moved if not Path(other).exists())}
    for remote in remotes:
        launch_id = remote.tags.get(LAUNCH_TAG, "")
        if remote.run_id in here or remote.lifecycle == "deleted" or real(remote.tags.get(ROOT_TAG, "")) not in roots:
            continue
        if remote.tags.get(PRUNED_TAG) == PRUNED_DIRECTORY:
            continue
        if launch_lock(root, launch_id).is_held() or directory_of(root, remote.run_id) is not None:
            continue  # it is being made, or was made just now
        phase = phase_of(remote)
        if COMMAND_TAG in remote.tags:
            what = f"has this run ({remote.status}), and there is no directory of it under {root}"
            yield Difference(phase, remote.run_id, "MLflow", what, DELETE.format(remote.run_id))
        elif remote.status == "RUNNING":
            what = f"has this run as RUNNING; launch {launch_id} was killed before it made a directory"
            yield Difference(phase, remote.run_id, "MLflow", what, RECONCILE)


@cache
def real(path: str) -> str:
    return os.path.realpath(path)


def directory_of(root: str, run_id: str) -> Path | None:
    """The directory of a run ID under an output root, if it has files."""
    found = [path for folder in RUN_FOLDERS for path in Path(root, folder).glob(f"{run_id}_*") if path.is_dir()]
    return next((path for path in found if not is_empty(path)), None)


def digest(artifact: Path, phase: Phase) -> str | None:
    """None if it is damaged: a difference of its own run."""
    with suppress(InputError):
        return content_of(artifact, phase)
    return None


class LineageChecks:
    """What a run was made from, and what was made from it. Each directory is looked for, and each artifact's digest computed, once.

    Args:
        deep: compare contents too.
    """

    def __init__(self, root: str, deep: bool) -> None:
        self.root, self.deep = root, deep
        self.directory_of, self.digest = cache(partial(directory_of, root)), cache(digest)

    def check(self, run: Run) -> Iterator[Difference]:
        for setting in ORIGINS:
            yield from self.origin(run, setting)
        yield from self.sweep(run)
        yield from self.trials(run)

    def origin(self, run: Run, setting: str) -> Iterator[Difference]:
        """The aligner or the initial weights of a run, which its run.json has the content of."""
        settings = flatten_tree(run.files.read_config() or {})
        named = str(settings.get(setting) or "")
        if run.phase == SWEEPS or not named or not Path(named).is_absolute():
            return  # the run ended before its worker found it
        what = "the aligner that this run was trained with" if setting == ALIGNER else "the weights that this run began with"
        phase = ALIGNMENT if setting == ALIGNER else PHASES_BY_NAME[run.phase]
        path = self.artifact_path(named, origin_of(settings, setting), phase)
        if path is None:
            yield difference(run, named, f"is missing, {what}", RESTORE)
            return
        wanted = origin_digest((run.files.read_record() or {}).get("inputs", {}), setting)
        if self.deep and wanted and (found := self.digest(path, phase)) is not None and found != wanted:
            yield difference(run, path, f"has another content than {what}", RESTORE)

    def artifact_path(self, named: str, run_id: str | None, phase: Phase) -> Path | None:
        if Path(named).is_file():
            return Path(named)
        directory = self.directory_of(run_id) if run_id else None
        path = RunDirectory(directory).artifact(phase) if directory else None
        return path if path is not None and path.is_file() else None

    def sweep(self, run: Run) -> Iterator[Difference]:
        """The sweep of a trial."""
        sweep = run.files.tags().get(SWEEP_TAG)
        if sweep is not None and self.directory_of(sweep) is None:
            yield difference(run, Path(self.root, SWEEPS), f"has no directory of sweep {sweep}, whose trial this run is", RESTORE)

    def trials(self, run: Run) -> Iterator[Difference]:
        """The records of a sweep's trials; each has a run once the sweep is FINISHED, unless it was given up, or pruned."""
        if run.phase != SWEEPS:
            return
        finished = run.files.read_status()["status"] == "FINISHED"
        for path in sorted(run.files.trials.glob("[0-9]*.json")):
            launch_id = str((read_as(path, dict[str, Any]) or {}).get("launch_id"))
            with suppress(DamagedFileError):  # a difference of its launch
                over = path.with_suffix(".failed").is_file() or path.with_suffix(PRUNED_TRIAL).is_file()
                if finished and recorded_run(self.root, launch_id) is None and not over:
                    yield difference(run, path, "is the record of a trial that has no run", f"{RESTORE} of its run, or resume the sweep")
