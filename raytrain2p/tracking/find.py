"""Finding runs and their artifacts: by path, by run ID or its start, or the latest; and which of them are alive."""

import os
import re
import socket
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from raytrain2p.config import InputError, Problem
from raytrain2p.config.cli import report as print_line
from raytrain2p.config.paths import COPY, copy_of_working_dir
from raytrain2p.config.phases import INSTRUCTION, PHASES, SWEEPS, Phase
from raytrain2p.config.scratch import is_remote, is_url, local_path
from raytrain2p.config.settings import OutputSettings
from raytrain2p.storage.remote import fetch
from raytrain2p.tracking.damage import DamagedFileError, damaged
from raytrain2p.tracking.run import LAUNCH_ID, RUN_FOLDERS, SWEEP_TAG, Run, launch_lock, original_of, recorded_run
from raytrain2p.tracking.run_directory import RUN_DIRECTORY, RUN_ID_LENGTH, RunDirectory
from raytrain2p.tracking.run_objects import fetch_named, is_leased, reporting_storage, root_of

SILENCE = 120.0  # seconds after which a run on another machine counts as dead, where locks do not reach across machines


def run_directories(root: str, phases: Iterable[str]) -> list[Path]:
    """All run directories of these phases, the oldest first; those that an older version made, which did not number them, before the
    others, by the local time in their names. A damaged one may be the latest."""
    found = [folder for phase in phases for folder in (Path(root) / phase).glob("*_*_*") if RUN_DIRECTORY.fullmatch(folder.name)]
    return sorted(found, key=lambda folder: (RunDirectory(folder).sequence(), folder.name[RUN_ID_LENGTH:], _changed(folder)))


def _changed(folder: Path) -> int:
    """Its modification time, in nanoseconds; 0 of a link to nowhere, or if `prune` has just deleted it."""
    with suppress(OSError):
        return folder.stat().st_mtime_ns
    return 0


def is_trial(directory: Path) -> bool:
    """Whether a run belongs to a sweep: `latest` never means such a run, since the last trial is not the best one."""
    return SWEEP_TAG in RunDirectory(directory).tags()


def has_failed(directory: Path) -> bool:
    """Whether a run ended as FAILED: `latest` never means the artifact of such a run, which an earlier part of it may have made."""
    return RunDirectory(directory).read_status()["status"] == "FAILED"


def read_run(directory: Path) -> Run:
    """The run of a directory, wherever that is now.

    Raises:
        DamagedFileError: its run.json is damaged, or missing.
    """
    files = RunDirectory(directory)
    record = files.read_record()
    if record is None:
        what = "has no run.json: an older version made it, or its launch was killed before it recorded the run"
        raise damaged(directory, what, "choose another run; this directory may be removed")
    return replace(Run.from_record(record, files.record), directory=str(directory))


def is_empty(directory: Path) -> bool:
    """Whether no file is in a run directory: its launch was killed in the moment before it recorded the run, and finds it again."""
    return directory.is_dir() and not any(path.is_file() for path in directory.rglob("*"))


def find(run: Any = "latest", *, phase: int | None = None, root: str | Path | None = None) -> RunDirectory:
    """The directory of a run, for a program.

    Args:
        run: a directory, a run ID or the start of one, a launch ID, an outcome, or `latest`: the newest that is not a trial of a sweep.
        phase: 1 or 2; None for runs of both, and sweeps.
        root: `output.root`, if it is not the default.

    Raises:
        InputError: no run fits, or several do, or the one that fits is damaged.
    """
    if phase not in (None, *PHASES):
        raise InputError(Problem(f"phase={phase!r}", "is not a phase", "give phase=1 or phase=2, or leave it out"))
    phases = RUN_FOLDERS if phase is None else [PHASES[phase].name]
    under = root_of(str(root or OutputSettings().root), "root")
    return find_run(under, phases, name_of(run), "run", warnings.warn).files


def name_of(run: Any) -> str:
    """A run, its directory or its outcome as the user of a command names it.

    Raises:
        InputError: it is of another type.
    """
    named = getattr(run, "directory", None) or getattr(run, "path", run)
    if not isinstance(named, (str, os.PathLike)):
        what = f"is a {type(run).__name__}; required is a directory, a run ID or the start of one, a launch ID, or `latest`"
        raise InputError(Problem(f"run={run!r:.100}", what))
    return os.fspath(named)


def find_run(root: str, phases: Iterable[str], wanted: str, setting: str, report: Callable[[str], None] = print_line) -> Run:
    """A run by its directory, its run ID, the start of one, its launch ID, or `latest`: the newest that is not a trial of a sweep.

    Args:
        root: `output.root`.
        phases: names of the phases that it may belong to.
        wanted: as the user gave it.
        setting: where `wanted` came from, for messages.
        report: called with a line for each damaged run that `latest` passes over.

    Raises:
        InputError: no run fits, or several do, or the one that fits is damaged.
    """
    phases = tuple(phases)
    path = Path(local_path(wanted)).expanduser()
    with reporting_storage(f"{setting}={wanted}"):
        fetch_named(path)
    named = path.absolute() if is_run_directory(path) else None
    run = read_run(named) if named else _one(run_directories(root, phases), wanted, root, setting, report)
    if run.phase not in phases:
        raise InputError(
            Problem(f"{setting} {wanted}", f"is a run of {run.phase}; required is one of {' or '.join(phases)}", "choose another run")
        )
    return run


def is_run_directory(path: Path) -> bool:
    """Whether a path is that of a run's directory, be it damaged, wherever it is."""
    try:
        return RunDirectory(path).record.exists() or (path.is_dir() and RUN_DIRECTORY.fullmatch(path.absolute().name) is not None)
    except OSError:  # too long for a path, for example
        return False


def find_runs(root: str, wanted: Sequence[str], report: Callable[[str], None] = print_line) -> list[Run]:
    """The runs and sweeps named, or all, the oldest first.

    Args:
        report: called with a line for each damaged one, which is left out.

    Raises:
        InputError: a name fits no run, or several.
    """
    everything = (directory for directory in run_directories(root, RUN_FOLDERS) if not is_empty(directory))
    named = [partial(find_run, root, RUN_FOLDERS, name, "RUN", report) for name in wanted]
    return list(_undamaged(named or [partial(read_run, directory) for directory in everything], report))


def _undamaged(readers: Iterable[Callable[[], Run]], report: Callable[[str], None]) -> Iterator[Run]:
    """What the readers return; for a damaged run a line is reported instead."""
    for read in readers:
        try:
            run = read()
        except DamagedFileError as error:
            report(error.line)
        else:
            yield run


def is_alive(run: Run, root: str) -> bool:
    """Whether a process works on a run, here or on another machine, or a sweep under way has paused it."""
    lock = run.files.lock
    if launch_lock(root, run.launch_id).is_held() or lock.is_held():
        return True
    if (sweep := run.files.tags().get(SWEEP_TAG)) is not None:
        parents = Path(root, SWEEPS).glob(f"{sweep}_*")
        for directory in parents:
            with suppress(DamagedFileError):  # no sweep works with that
                launch_id = read_run(directory).launch_id
                if launch_lock(root, launch_id).is_held() or (is_remote(root) and is_leased(root, launch_id, SILENCE)):
                    return True
    if is_remote(root):
        return is_leased(root, run.launch_id, SILENCE)
    elsewhere = run.files.read_status()["host"] not in ("", socket.gethostname())
    return elsewhere and lock.path.is_file() and time.time() - lock.path.stat().st_mtime < SILENCE


def check_in_place(run: Run, root: str, setting: str) -> None:
    """Check that a run is in its root, where its launch has its record, and is not a copy: resuming it would make a second directory
    of one MLflow run. The whole root may have been moved.

    Raises:
        InputError: it is not.
    """
    if COPY.match(str(run.path)):
        what = "is in Ray's copy of the job's working directory, which is deleted"
        raise InputError(Problem(setting, f"{run.path} {what}", "give its run ID or launch ID, `latest`, or its path outside the job"))
    recorded = recorded_run(root, run.launch_id)
    if recorded is None or recorded.path.resolve() != run.path.resolve():
        where = recorded.directory if recorded is not None else f"a run under {root}"
        raise InputError(Problem(setting, f"{run.path} is recorded as {where}: it was moved", "move it back"))
    check_original(run, setting)


def check_original(run: Run, setting: str) -> None:
    """Check that a run is not a copy of one that is still where it was: both are one run in MLflow.

    Raises:
        InputError: it is.
    """
    if (original := original_of(run)) is not None:
        what = f"{run.path} is a copy; the run itself is {original}, and has the MLflow run"
        raise InputError(Problem(setting, what, f"resume that one, with output.root={original.parent.parent}, or begin a new run"))


def _one(runs: list[Path], wanted: str, root: str, setting: str, report: Callable[[str], None]) -> Run:
    if wanted == "latest":
        newest_first = _undamaged([partial(read_run, directory) for directory in reversed(runs)], report)
        if (newest := next((run for run in newest_first if not is_trial(run.path)), None)) is not None:
            return newest
    fitting = _fitting(runs, wanted, root)
    if len(fitting) == 1:
        return read_run(fitting[0])
    what = _several(fitting, root) if fitting else f"there is no such run in {root}"
    raise InputError(Problem(f"{setting} {wanted}", what, "give a directory, a run ID or more of it, a launch ID, or `latest`"))


def _fitting(runs: list[Path], wanted: str, root: str) -> list[Path]:
    """The runs whose ID begins as wanted, or whose launch ID it is."""
    fitting = [run for run in runs if wanted and run.name.startswith(wanted)]
    if re.fullmatch(LAUNCH_ID, wanted) and (launched := recorded_run(root, wanted)) is not None:
        fitting += [run for run in runs if run.name == launched.path.name and run not in fitting]
    return fitting


def _several(runs: list[Path], folder: str | Path) -> str:
    return f"fits {len(runs)} runs in {folder}: {', '.join(RunDirectory(run).run_id for run in runs)}"


def find_artifact(
    root: str,
    phase: Phase,
    wanted: str,
    setting: str,
    fits: Callable[[Path], bool] = lambda path: True,
    report: Callable[[str], None] = print_line,
) -> Path:
    """The path of an artifact, which is fetched if it is an object.

    Args:
        root: `output.root`.
        wanted: a path or URL of a file or of a run directory, a run ID, the start of one, a launch ID, or `latest` (the newest that has an
            artifact and is not a trial of a sweep).
        setting: where `wanted` came from, for messages.
        fits: which ones `latest` prefers. If none fits, it is the newest of all: the caller finds out why it does not fit.
        report: called with a line for each damaged run that `latest` passes over.

    Raises:
        InputError: no artifact fits, or several do.
    """
    with reporting_storage(f"{setting}={wanted}"):
        if is_url(wanted):
            fetch_named(Path(local_path(wanted)))

        def fits_once_fetched(path: Path) -> bool:
            fetch(path)
            return fits(path)

        path = _artifact(root, phase, wanted, setting, fits_once_fetched, report)
        fetch(path)
    return path


def _artifact(root: str, phase: Phase, wanted: str, setting: str, fits: Callable[[Path], bool], report: Callable[[str], None]) -> Path:
    path = Path(local_path(wanted)).expanduser()
    if path.is_file():
        return path.absolute()
    if (inside := RunDirectory(path).artifact(phase)).is_file():
        return inside.absolute()
    runs, folder = run_directories(root, [phase.name]), Path(root) / phase.name
    if wanted == "latest":
        return _latest_artifact(runs, folder, phase, setting, fits, report)
    fitting = _fitting(runs, wanted, root)
    if len(fitting) != 1:
        what = _several(fitting, folder) if fitting else f"is neither a file nor the start of a run ID in {folder}, nor a launch ID"
        a_path = "a path" if copy_of_working_dir() is None else "an absolute path (a relative one is in Ray's copy of --working-dir)"
        raise InputError(Problem(f"{setting}={wanted}", what, f"give {a_path}, more of the run ID, a launch ID, or `latest`"))
    found = RunDirectory(fitting[0]).artifact(phase)
    if not found.is_file():
        raise InputError(
            Problem(f"{setting}={wanted}", f"the run in {fitting[0]} has no {phase.artifact}: it did not finish", "choose another run")
        )
    return found


def find_model_run(root: str, phases: Iterable[str], wanted: str, setting: str) -> Run:
    """As `find_run`; but `latest` is the run whose model `predict` takes, since the newest may be unfinished and have none."""
    if wanted == "latest":
        return read_run(find_artifact(root, INSTRUCTION, wanted, setting).parent)
    return find_run(root, phases, wanted, setting)


def _latest_artifact(
    runs: list[Path], folder: Path, phase: Phase, setting: str, fits: Callable[[Path], bool], report: Callable[[str], None]
) -> Path:
    finished = [run for run in runs if RunDirectory(run).artifact(phase).is_file()]
    newest_first = []
    for run in reversed(finished):
        try:
            passed = is_trial(run) or has_failed(run)
        except DamagedFileError as error:
            report(f"{setting}=latest passes over a damaged run: {error.line}")
        else:
            newest_first += [] if passed else [RunDirectory(run).artifact(phase)]
    if not newest_first:
        but = ", only trials of a sweep or runs that failed" if finished else ""
        raise InputError(
            Problem(
                f"{setting}=latest",
                f"there is no finished run with {phase.artifact} in {folder}{but}",
                f"run `python -m raytrain2p.train --phase {phase.number}` first, or set {setting} to a path or a run ID"
                f"{' (best.json of the sweep has one)' if finished else ''}",
            )
        )
    return next(filter(fits, newest_first), newest_first[0])
