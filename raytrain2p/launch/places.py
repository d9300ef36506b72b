"""Whether a launch can write where it must, found before anything starts."""

import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from raytrain2p.config import Problem, Settings
from raytrain2p.config.paths import is_kind
from raytrain2p.phases.inputs import EncoderJob
from raytrain2p.tracking.mlflow_store import store_path
from raytrain2p.tracking.run_objects import check_root


def existing(path: Path) -> Path:
    """The nearest directory that exists.

    Raises:
        OSError: the path is too long, or its disk has failed.
    """
    while not path.exists():
        path = path.parent
    return path


def place_problem(setting: str, path: str | Path) -> Problem | None:
    """A directory that is not there and cannot be made, or that cannot be written to. Leaves nothing behind.

    Tried in the nearest directory that exists: permissions say nothing about a file system that is read-only, or virtual.
    """
    nearest = Path(path)
    try:
        nearest = existing(nearest)
        with tempfile.TemporaryFile(dir=nearest):
            return None
    except OSError as error:
        return Problem(f"{setting}={path}", f"cannot be written to: {nearest}: {error.strerror}", "give a directory that can be")


def bytes_needed(jobs: Iterable[EncoderJob]) -> int:
    """What all missing features will need. Trials of a sweep may share them."""
    merged: dict[Path, EncoderJob] = {}
    for job in jobs:
        known = merged.setdefault(job.store.directory, job)
        if not job.items.keys() <= known.items.keys():
            merged[job.store.directory] = replace(known, items=known.items | job.items)
    return sum(job.bytes_needed for job in merged.values())


def free_space(store: str) -> int:
    """Bytes on the disk of a feature store, which need not exist yet."""
    return shutil.disk_usage(existing(Path(store))).free


def space_problem(store: str, jobs: Iterable[EncoderJob]) -> Problem | None:
    """More features to compute than fit."""
    if (needed := bytes_needed(jobs)) <= (free := free_space(store)):
        return None
    what = f"no space left for the features: about {size(needed)} are needed, {size(free)} are free"
    fix = "set data.features=online, which stores none, or data.feature_store to a directory on another disk"
    return Problem(f"data.feature_store={store}", what, fix)


def size(count: int) -> str:
    """Bytes for people."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def place_problems(settings: Settings, is_new: bool, jobs: Sequence[EncoderJob] = ()) -> list[Problem]:
    """Problems of the output root, of the feature store and its free space, and of the folder of an SQLite store.

    Args:
        is_new: whether the run is new; a resumed one trains without its MLflow store.
        jobs: what to encode. A feature store that exists may be read-only if it has all features.
    """
    store = str(settings.data.feature_store)
    places: dict[str, str | Path] = {"output.root": settings.output.root}
    missing = any(job.store.missing(job.items) for job in jobs)
    if missing or not is_kind(Path(store), Path.is_dir):
        places["data.feature_store"] = store
    uri = settings.tracking.uri
    if is_new and uri.startswith("sqlite:") and (database := store_path(uri)) is not None:
        places["directory of tracking.uri"] = database.parent
    found = {setting: place_problem(setting, path) for setting, path in places.items()}
    if missing and found["data.feature_store"] is None:
        found["data.feature_store"] = space_problem(store, jobs)
    return [problem for problem in found.values() if problem is not None] + check_root(settings.output.root)
