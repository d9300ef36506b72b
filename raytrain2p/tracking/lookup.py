"""Finding a run again: by path, by run ID or the start of one, or the latest."""

import re
from pathlib import Path

from raytrain2p.config import InputError, Problem
from raytrain2p.tracking.run import RUN_ID_LENGTH

RUN_DIRECTORY = re.compile(rf"[0-9a-f]{{{RUN_ID_LENGTH}}}_\d{{8}}_\d{{6}}")


def find_artifact(root: str, phase: str, artifact: str, wanted: str, setting: str) -> Path:
    """The path of an artifact.

    Args:
        root: where run directories are.
        phase: `alignment` or `phase2`.
        artifact: `aligner.pt` or `model.pt`.
        wanted: a path of a file or of a run directory, a run ID, the start of one, or `latest` (the newest that has one).
        setting: where `wanted` came from, for messages.

    Raises:
        InputError: none, or more than one, fits.
    """
    path = Path(wanted).expanduser()
    if path.is_file():
        return path.absolute()
    if (path / artifact).is_file():
        return (path / artifact).absolute()
    folder = Path(root) / phase
    runs = sorted(
        (run for run in folder.glob("*_*_*") if RUN_DIRECTORY.fullmatch(run.name)),
        key=lambda run: (run.name[RUN_ID_LENGTH:], run.stat().st_mtime_ns),
    )
    whole = [run for run in runs if (run / artifact).is_file()]
    if wanted == "latest":
        if not whole:
            number = 1 if phase == "alignment" else 2
            raise InputError(
                Problem(
                    f"{setting}=latest",
                    f"there is no finished run with {artifact} in {folder}",
                    f"run `python -m raytrain2p.train --phase {number}` first, or set {setting} to a path or a run ID",
                )
            )
        return whole[-1] / artifact
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
