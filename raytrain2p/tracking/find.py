"""Finding runs and their artifacts: by path, by run ID or its start, or the latest; and which of them are alive."""

import re
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from raytrain2p.config import InputError, Problem
from raytrain2p.config.phases import PHASES_BY_NAME, SWEEPS, Phase
from raytrain2p.tracking.run import SWEEP_TAG, Run, launch_lock, recorded_run
from raytrain2p.tracking.run_directory import RUN_ID_LENGTH, RunDirectory

RUN_DIRECTORY = re.compile(rf"[0-9a-f]{{{RUN_ID_LENGTH}}}_\d{{8}}_\d{{6}}")
RUN_FOLDERS = (*PHASES_BY_NAME, SWEEPS)  # of run directories, under `output.root`
SILENCE = 120.0  # seconds after which a run on another machine counts as dead, where locks do not reach across machines


def run_directories(root: str, phases: Iterable[str]) -> list[Path]:
    """All run directories of these phases, the oldest first."""
    found = [folder for phase in phases for folder in (Path(root) / phase).glob("*_*_*") if RUN_DIRECTORY.fullmatch(folder.name)]
    return sorted(found, key=lambda folder: (folder.name[RUN_ID_LENGTH:], folder.stat().st_mtime_ns))


def is_trial(directory: Path) -> bool:
    """Whether a run belongs to a sweep: `latest` never means such a run, since the last trial is not the best one."""
    return SWEEP_TAG in RunDirectory(directory).tags()


def has_failed(directory: Path) -> bool:
    """Whether a run ended as FAILED: `latest` never means the artifact of such a run, which an earlier part of it may have made."""
    return RunDirectory(directory).read_status()["status"] == "FAILED"


def find_run(root: str, phases: Iterable[str], wanted: str, setting: str) -> Run:
    """A run by its directory, its run ID, the start of one, or `latest`: the newest that is not a trial of a sweep.

    Args:
        root: `output.root`.
        phases: names of the phases that it may belong to.
        wanted: as the user gave it.
        setting: where `wanted` came from, for messages.

    Raises:
        InputError: no run fits, or several do.
    """
    phases = tuple(phases)
    path = Path(wanted).expanduser()
    directory = path.absolute() if RunDirectory(path).record.is_file() else _one(run_directories(root, phases), wanted, root, setting)
    record = RunDirectory(directory).read_record()
    if record is None:
        raise InputError(
            Problem(f"{setting} {wanted}", f"{directory} has no run.json: this version did not write it", "choose another run")
        )
    run = replace(Run.from_record(record), directory=str(directory))  # it may have been moved
    if run.phase not in phases:
        raise InputError(
            Problem(f"{setting} {wanted}", f"is a run of {run.phase}; required is one of {' or '.join(phases)}", "choose another run")
        )
    return run


def find_runs(root: str, wanted: Sequence[str]) -> list[Run]:
    """The runs and sweeps named, or all, the oldest first.

    Raises:
        InputError: a name fits no run, or several.
    """
    if wanted:
        return [find_run(root, RUN_FOLDERS, name, "RUN") for name in wanted]
    records = [RunDirectory(directory).read_record() for directory in run_directories(root, RUN_FOLDERS)]
    return [Run.from_record(record) for record in records if record is not None]


def is_alive(run: Run, root: str) -> bool:
    """Whether a process works on a run, here or on another machine, or a sweep under way has paused it."""
    lock = run.files.lock
    if launch_lock(root, run.launch_id).is_held() or lock.is_held():
        return True
    if (sweep := run.files.tags().get(SWEEP_TAG)) is not None:
        records = [RunDirectory(directory).read_record() for directory in Path(root, SWEEPS).glob(f"{sweep}_*")]
        if any(launch_lock(root, record["launch_id"]).is_held() for record in records if record is not None):
            return True
    elsewhere = run.files.read_status()["host"] not in ("", socket.gethostname())
    return elsewhere and lock.path.is_file() and time.time() - lock.path.stat().st_mtime < SILENCE


def check_in_place(run: Run, root: str, setting: str) -> None:
    """Check that a run is where its launch recorded it: resuming a moved one would make a second directory.

    Raises:
        InputError: it is not.
    """
    recorded = recorded_run(root, run.launch_id)
    if recorded is None or recorded.path != run.path:
        where = recorded.directory if recorded is not None else f"a run under {root}"
        raise InputError(Problem(setting, f"{run.path} is recorded as {where}: it was moved", "move it back"))


def _one(runs: list[Path], wanted: str, root: str, setting: str) -> Path:
    fitting = (
        [run for run in runs if not is_trial(run)][-1:] if wanted == "latest" else [run for run in runs if run.name.startswith(wanted)]
    )
    if len(fitting) == 1:
        return fitting[0]
    what = _several(fitting, root) if fitting else f"there is no such run in {root}"
    raise InputError(Problem(f"{setting} {wanted}", what, "give a directory, a run ID or more of it, or `latest`"))


def _several(runs: list[Path], folder: str | Path) -> str:
    return f"fits {len(runs)} runs in {folder}: {', '.join(RunDirectory(run).run_id for run in runs)}"


def find_artifact(root: str, phase: Phase, wanted: str, setting: str, fits: Callable[[Path], bool] = lambda path: True) -> Path:
    """The path of an artifact.

    Args:
        root: `output.root`.
        wanted: a path of a file or of a run directory, a run ID, the start of one, or `latest` (the newest that has an artifact and
            is not a trial of a sweep).
        setting: where `wanted` came from, for messages.
        fits: which ones `latest` prefers. If none fits, it is the newest of all: the caller finds out why it does not fit.

    Raises:
        InputError: no artifact fits, or several do.
    """
    path = Path(wanted).expanduser()
    if path.is_file():
        return path.absolute()
    if (inside := RunDirectory(path).artifact(phase)).is_file():
        return inside.absolute()
    runs, folder = run_directories(root, [phase.name]), Path(root) / phase.name
    if wanted == "latest":
        return _latest_artifact(runs, folder, phase, setting, fits)
    fitting = [run for run in runs if run.name.startswith(wanted)]
    if len(fitting) != 1:
        what = _several(fitting, folder) if fitting else f"is neither a file nor the start of a run ID in {folder}"
        raise InputError(Problem(f"{setting}={wanted}", what, "give a path, more of the run ID, or `latest`"))
    found = RunDirectory(fitting[0]).artifact(phase)
    if not found.is_file():
        raise InputError(
            Problem(f"{setting}={wanted}", f"the run in {fitting[0]} has no {phase.artifact}: it did not finish", "choose another run")
        )
    return found


def _latest_artifact(runs: list[Path], folder: Path, phase: Phase, setting: str, fits: Callable[[Path], bool]) -> Path:
    finished = [run for run in runs if RunDirectory(run).artifact(phase).is_file() and not has_failed(run)]
    newest_first = [RunDirectory(run).artifact(phase) for run in reversed(finished) if not is_trial(run)]
    if not newest_first:
        raise InputError(
            Problem(
                f"{setting}=latest",
                f"there is no finished run with {phase.artifact} in {folder}{', only trials of a sweep' if finished else ''}",
                f"run `python -m raytrain2p.train --phase {phase.number}` first, or set {setting} to a path or a run ID"
                f"{' (best.json of the sweep has one)' if finished else ''}",
            )
        )
    return next(filter(fits, newest_first), newest_first[0])
