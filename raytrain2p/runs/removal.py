"""Deletes runs such that a kill at any moment loses nothing else, and the next `prune` finishes.

A run directory is renamed first: from that moment on no command sees it. Then MLflow is told, Ray's records and the launch's record are
deleted, and the directory, run.json last: as long as that is there, all of it can be repeated. Nothing outside the output
root is deleted, and no link is followed.
"""

import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from pathlib import Path

from raytrain2p.config.phases import SWEEPS
from raytrain2p.storage.files import regular_files, remove, write_file
from raytrain2p.tracking.damage import DamagedFileError
from raytrain2p.tracking.run import (
    PRUNED_CHECKPOINTS,
    PRUNED_TAG,
    RUN_FOLDERS,
    SWEEP_TAG,
    TRIAL_TAG,
    Run,
    launch_lock,
    launch_record,
    migration_journal,
    original_of,
    recorded_run,
)
from raytrain2p.tracking.run_directory import PRUNED_TRIAL, RUN_DIRECTORY, RunDirectory

PRUNED, WITH_MLFLOW = ".pruned-", ".pruned-mlflow-"  # what the names of directories under deletion begin with
KEEP = "keep"  # the tag that protects a run
NOTE = "\nIts checkpoints were deleted with `runs prune --checkpoints-only` on {}: it cannot be resumed.\n"

Forget = Callable[[Run, bool], None]  # records in MLflow that a run has no directory any more, or deletes the run there


class InUseError(RuntimeError):
    """A process works on a run, or somebody has just tagged it. The text is why it stays."""


def is_in_place(path: Path, root: str) -> bool:
    """Whether a path of the form ROOT/FOLDER/NAME lies there really, and neither it nor its folder is a link to another place."""
    return not path.is_symlink() and not path.parent.is_symlink() and path.parent.parent.resolve() == Path(root).resolve()


def leftovers(root: str) -> list[Path]:
    """Directories whose deletion was interrupted."""
    found = [path for phase in RUN_FOLDERS for path in sorted((Path(root) / phase).glob(f"{PRUNED}*"))]
    return [path for path in found if RUN_DIRECTORY.fullmatch(name_of(path)) and path.is_dir() and is_in_place(path, root)]


def name_of(leftover: Path) -> str:
    """The name that a directory under deletion had."""
    return leftover.name.removeprefix(WITH_MLFLOW).removeprefix(PRUNED)


def half_pruned(run: Run) -> bool:
    """Whether the deletion of a run's checkpoints was interrupted."""
    return run.files.tags().get(PRUNED_TAG) == PRUNED_CHECKPOINTS and any(os.path.lexists(path) for path in checkpoints_of(run))


def checkpoints_of(run: Run) -> tuple[Path, Path]:
    """Where a run's checkpoints are, and where they are while they are deleted."""
    return run.checkpoints, run.path / f"{PRUNED}{run.checkpoints.name}"


def remove_run(run: Run, root: str, with_mlflow: bool, forget: Forget) -> None:
    """Delete a run.

    Args:
        with_mlflow: whether the run in MLflow is deleted, too.
        forget: called with the run and `with_mlflow`.

    Raises:
        InUseError: a process works on it; nothing was changed.
        OSError: the disk fails. StorageError: MLflow does. The rest is a leftover.
    """
    assert is_in_place(run.path, root)
    with ExitStack() as stack:
        _hold(run, root, stack)
        aside = run.path.with_name((WITH_MLFLOW if with_mlflow else PRUNED) + run.path.name)
        with ExitStack() as inner:  # released before the lock's own file is deleted
            _hold_directory(run, inner)
            run.path.rename(aside)
        finish(aside, root, forget)


def finish(leftover: Path, root: str, forget: Forget) -> None:
    """Delete a directory that has been renamed, and all that belongs to its run."""
    files, name = RunDirectory(leftover), name_of(leftover)
    run = None
    with suppress(DamagedFileError):
        if record := files.read_record():
            run = Run.from_record(record | {"directory": str(leftover)}, files.record)
    if run is not None:
        if original_of(run) is None:  # else MLflow's run is that of the original
            forget(run, leftover.name.startswith(WITH_MLFLOW))
        recorded = None
        with suppress(DamagedFileError):
            recorded = recorded_run(root, run.launch_id)
        if recorded is not None and (recorded.phase, recorded.path.name) == (leftover.parent.name, name):
            mark_trial(run, root)
            for path in launch_files(run, root):
                delete(path, root)
    for path in sorted(leftover.iterdir(), key=lambda path: path == files.record):
        remove(path)
    leftover.rmdir()


def mark_trial(run: Run, root: str) -> None:
    """Note in the sweep of a trial that its run was deleted: the trial's record stays there."""
    tags = run.files.tags()
    name = f"{tags.get(TRIAL_TAG, '').zfill(3)}.json"
    for sweep in Path(root, SWEEPS).glob(f"{tags.get(SWEEP_TAG, '-')}_*") if re.fullmatch(r"\d+\.json", name) else ():
        if (record := RunDirectory(sweep).trials / name).is_file():
            write_file(record.with_suffix(PRUNED_TRIAL), "")


def launch_files(run: Run, root: str) -> list[Path]:
    """What a launch has outside the directory of its run: Ray's records, those of its migration, which cannot be undone any more, and
    then its own record, by which the former are found."""
    return [Path(root) / ".ray" / run.launch_id, migration_journal(root, run.launch_id), launch_record(root, run.launch_id)]


def delete(path: Path, root: str) -> None:
    """Delete a file or directory of the form ROOT/FOLDER/NAME, if it lies there."""
    if not path.parent.is_symlink() and path.parent.parent.resolve() == Path(root).resolve():
        remove(path)


def remove_checkpoints(run: Run, root: str, send: Callable[[Run], None]) -> None:
    """Delete a run's checkpoints. It is recorded first, so that no command takes the run for a damaged one, or resumes it.

    Args:
        send: sends the record to MLflow.

    Raises:
        InUseError: a process works on the run; nothing was changed.
        OSError: the disk fails. The next call finishes.
    """
    assert is_in_place(run.path, root)
    with ExitStack() as stack:
        _hold(run, root, stack)
        _hold_directory(run, stack)
        if run.files.tags().get(PRUNED_TAG) != PRUNED_CHECKPOINTS:
            run.add_tags({PRUNED_TAG: PRUNED_CHECKPOINTS})
        page = run.files.readme.read_text() if run.files.readme.is_file() else ""
        if page and NOTE.partition("{}")[0] not in page:
            write_file(run.files.readme, page + NOTE.format(time.strftime("%Y-%m-%d")))
        checkpoints, aside = checkpoints_of(run)
        if checkpoints.is_symlink():
            checkpoints.unlink()
        remove(aside)
        if checkpoints.is_dir():
            checkpoints.rename(aside)
            remove(aside)
        send(run)


def _hold(run: Run, root: str, stack: ExitStack) -> None:
    """Let no launch of this run begin."""
    lock = launch_lock(root, run.launch_id)
    lock.path.parent.mkdir(exist_ok=True)
    if (holder := stack.enter_context(lock.held())) is not None:
        raise InUseError(f"under way: {holder}")
    if KEEP in run.files.tags():
        raise InUseError(f"tagged `{KEEP}` just now")


def _hold_directory(run: Run, stack: ExitStack) -> None:
    if (holder := stack.enter_context(run.files.lock.held())) is not None:
        raise InUseError(f"under way: {holder}")


def freed_by(paths: Iterable[Path]) -> int:
    """The bytes that deleting these files and directories frees: a file that has a name elsewhere, too, stays."""
    found = [one for path in paths if not path.is_symlink() for one in regular_files(path)]
    names = Counter((one.st_dev, one.st_ino) for one in found)
    return sum({key: one.st_size for one in found if names[key := (one.st_dev, one.st_ino)] >= one.st_nlink}.values())
