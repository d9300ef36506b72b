"""aligner.pt and model.pt: the only thing that the two phases share.

An artifact is a dictionary of plain types and tensors: it loads with `weights_only=True`, so reading one runs no code.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from raytrain2p.config import InputError, Problem
from raytrain2p.config.phases import PHASES_BY_NAME

FORMAT_VERSION = 1


def save_artifact(path: Path, phase: str, config: Mapping[str, Any], models: Mapping[str, Mapping[str, Any]], **content: Any) -> None:
    """Write aside, then rename: a reader sees the whole file or none.

    Args:
        path: where it goes.
        phase: `alignment` or `phase2`.
        config: the run's settings by dotted path.
        models: the frozen models it belongs to, by role: `{"image_encoder": {"name": ..., "fingerprint": ...}}`.
        content: tensors and plain types.
    """
    artifact = {"format_version": FORMAT_VERSION, "phase": phase, "config": dict(config), "models": {k: dict(v) for k, v in models.items()}}
    aside = path.with_name(f".{path.name}.aside-{os.getpid()}")
    try:
        with aside.open("wb") as stream:
            torch.save(artifact | content, stream)
            stream.flush()
            os.fsync(stream.fileno())
        aside.rename(path)
    finally:
        aside.unlink(missing_ok=True)


def load_artifact(path: Path, phase: str) -> dict[str, Any]:
    """Read and check an artifact.

    Raises:
        InputError: no such file, torn, of another format version, or of the other phase.
    """
    if not path.is_file():
        raise InputError(Problem(str(path), "no such file", f"give the path of {PHASES_BY_NAME[phase].artifact}, or a run ID"))
    try:
        artifact = torch.load(path, map_location="cpu", weights_only=True)
        version, found = artifact["format_version"], artifact["phase"]
    except Exception as error:  # torch raises many kinds for a torn or foreign file; all mean the same to the user
        raise InputError(
            Problem(str(path), f"is no {PHASES_BY_NAME[phase].artifact} ({type(error).__name__}): torn, or not written by raytrain2p")
        ) from None
    if version != FORMAT_VERSION:
        raise InputError(Problem(str(path), f"has format version {version}; this raytrain2p reads {FORMAT_VERSION}"))
    if found != phase:
        raise InputError(Problem(str(path), f"comes from phase `{found}`; required is `{phase}` ({PHASES_BY_NAME[phase].artifact})"))
    return artifact


def check_fingerprint(path: Path, artifact: Mapping[str, Any], role: str, name: str, found: str, setting: str) -> None:
    """Refuse to combine an artifact with another frozen model than it was trained with.

    Raises:
        InputError: the fingerprints differ; both sides are named.
    """
    needed = artifact["models"][role]
    if needed["fingerprint"] != found:
        raise InputError(
            Problem(
                f"{setting}={name}",
                f"its fingerprint is {found[:12]}, but {path} was trained with {needed['name']} (fingerprint {needed['fingerprint'][:12]})",
                f"set {setting}={needed['name']}, or train another aligner with {name}",
            )
        )
