"""Whether a launch can write where it must, found before anything starts."""

import tempfile
from collections.abc import Iterable
from pathlib import Path

from raytrain2p.config import Problem, Settings
from raytrain2p.config.paths import is_kind
from raytrain2p.phases.inputs import EncoderJob
from raytrain2p.tracking.mlflow_store import local_path
from raytrain2p.tracking.run_objects import check_root


def place_problem(setting: str, path: str | Path) -> Problem | None:
    """A directory that is not there and cannot be made, or that cannot be written to. Leaves nothing behind.

    Tried in the nearest directory that exists: permissions say nothing about a file system that is read-only, or virtual.
    """
    nearest = Path(path)
    try:
        while not nearest.exists():
            nearest = nearest.parent
        with tempfile.TemporaryFile(dir=nearest):
            return None
    except OSError as error:
        return Problem(f"{setting}={path}", f"cannot be written to: {nearest}: {error.strerror}", "give a directory that can be")


def place_problems(settings: Settings, is_new: bool, jobs: Iterable[EncoderJob] = ()) -> list[Problem]:
    """Problems of the output root, of the feature store, and of the folder of an SQLite store.

    Args:
        is_new: whether the run is new; a resumed one trains without its MLflow store.
        jobs: what to encode. A feature store that exists may be read-only if it has all features.
    """
    store = str(settings.data.feature_store)
    places: dict[str, str | Path] = {"output.root": settings.output.root}
    if not is_kind(Path(store), Path.is_dir) or any(job.store.missing(job.items) for job in jobs):
        places["data.feature_store"] = store
    uri = settings.tracking.uri
    if is_new and uri.startswith("sqlite:") and (database := local_path(uri)) is not None:
        places["directory of tracking.uri"] = database.parent
    found = [place_problem(setting, path) for setting, path in places.items()]
    return [problem for problem in found if problem is not None] + check_root(settings.output.root)
