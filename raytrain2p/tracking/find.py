"""Finding a run again: by path, by run ID or the start of one, or the latest."""

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from raytrain2p.config import InputError, Problem
from raytrain2p.config.phases import Phase
from raytrain2p.storage.files import read_json
from raytrain2p.tracking.run import RUN_ID_LENGTH, SWEEP_TAG, Run, recorded_run, run_of, run_tags

RUN_DIRECTORY = re.compile(rf"[0-9a-f]{{{RUN_ID_LENGTH}}}_\d{{8}}_\d{{6}}")


def run_directories(root: str, phases: Iterable[str]) -> list[Path]:
    """All run directories of these phases, the oldest first."""
    found = [folder for phase in phases for folder in (Path(root) / phase).glob("*_*_*") if RUN_DIRECTORY.fullmatch(folder.name)]
    return sorted(found, key=lambda folder: (folder.name[RUN_ID_LENGTH:], folder.stat().st_mtime_ns))


def is_trial(directory: Path) -> bool:
    """Whether a run belongs to a sweep: `latest` never means such a one, since the last trial is not the best one."""
    return SWEEP_TAG in run_tags(directory)


def find_run(root: str, phases: Iterable[str], wanted: str, setting: str) -> Run:
    """A run by its directory, its run ID, the start of one, or `latest`.

    `latest` is the newest that is no trial of a sweep.

    Args:
        root: where run directories are.
        phases: names of the phases that it may be of.
        wanted: as the user gave it.
        setting: where `wanted` came from, for messages.

    Raises:
        InputError: none, or more than one, fits.
    """
    phases = tuple(phases)
    path = Path(wanted).expanduser()
    directory = path.absolute() if (path / "run.json").is_file() else _one(run_directories(root, phases), wanted, root, setting)
    noted = read_json(directory / "run.json")
    if noted is None:
        raise InputError(Problem(f"{setting} {wanted}", f"{directory} has no run.json: it is no run of this version", "take another run"))
    run = replace(run_of(noted), directory=str(directory))  # it may have been moved
    if run.phase not in phases:
        raise InputError(
            Problem(f"{setting} {wanted}", f"is a run of {run.phase}; required is one of {' or '.join(phases)}", "take another run")
        )
    return run


def check_in_place(run: Run, root: str, setting: str) -> None:
    """Whether a run is where its launch has recorded it: going on with a moved one would make a second directory.

    Raises:
        InputError: it is not.
    """
    known = recorded_run(root, run.launch_id)
    if known is None or known.path != run.path:
        where = known.directory if known is not None else f"a run under {root}"
        raise InputError(Problem(setting, f"{run.path} is recorded as {where}: it was moved", "move it back"))


def _one(runs: list[Path], wanted: str, root: str, setting: str) -> Path:
    fitting = (
        [run for run in runs if not is_trial(run)][-1:] if wanted == "latest" else [run for run in runs if run.name.startswith(wanted)]
    )
    if len(fitting) == 1:
        return fitting[0]
    ids = ", ".join(run.name[:RUN_ID_LENGTH] for run in fitting)
    what = f"fits {len(fitting)} runs in {root}: {ids}" if fitting else f"there is no such run in {root}"
    raise InputError(Problem(f"{setting} {wanted}", what, "give a directory, a run ID or more of it, or `latest`"))


def find_artifact(root: str, phase: Phase, wanted: str, setting: str, fits: Callable[[Path], bool] = lambda path: True) -> Path:
    """The path of an artifact.

    Args:
        root: where run directories are.
        phase: whose artifact it is.
        wanted: a path of a file or of a run directory, a run ID, the start of one, or `latest` (the newest that has one, and is no
            trial of a sweep).
        setting: where `wanted` came from, for messages.
        fits: what `latest` prefers; if none does, it is the newest of all, for the caller to say what is wrong with it.

    Raises:
        InputError: none, or more than one, fits.
    """
    path, artifact = Path(wanted).expanduser(), phase.artifact
    if path.is_file():
        return path.absolute()
    if (path / artifact).is_file():
        return (path / artifact).absolute()
    folder = Path(root) / phase.name
    runs = run_directories(root, [phase.name])
    whole = [run for run in runs if (run / artifact).is_file()]
    if wanted == "latest":
        newest_first = [run / artifact for run in reversed(whole) if not is_trial(run)]
        if not newest_first:
            raise InputError(
                Problem(
                    f"{setting}=latest",
                    f"there is no finished run with {artifact} in {folder}{', only trials of a sweep' if whole else ''}",
                    f"run `python -m raytrain2p.train --phase {phase.number}` first, or set {setting} to a path or a run ID"
                    f"{' (best.json of the sweep has one)' if whole else ''}",
                )
            )
        return next(filter(fits, newest_first), newest_first[0])
    fitting = [run for run in runs if run.name.startswith(wanted)]
    if len(fitting) != 1:
        what = (
            f"fits {len(fitting)} runs in {folder}: {', '.join(run.name[:RUN_ID_LENGTH] for run in fitting)}"
            if fitting
            else f"is neither a file nor the start of a run ID in {folder}"
        )
        raise InputError(Problem(f"{setting}={wanted}", what, "give a path, more of the run ID, or `latest`"))
    if fitting[0] not in whole:
        raise InputError(
            Problem(f"{setting}={wanted}", f"the run in {fitting[0]} has no {artifact}: it did not finish", "take another run")
        )
    return fitting[0] / artifact
