"""The artifacts of the two phases, aligner.pt and model.pt.

An artifact is a dictionary of plain types and tensors: it loads with `weights_only=True`, so that reading one runs no code.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from raytrain2p.config import InputError, Problem
from raytrain2p.config.phases import Phase
from raytrain2p.storage.files import replaced

FORMAT_VERSION = 2


def save_artifact(path: Path, phase: Phase, config: Mapping[str, Any], encoders: Mapping[str, Mapping[str, Any]], **content: Any) -> None:
    """Write an artifact, atomically.

    Args:
        config: the run's settings as nested groups.
        encoders: the frozen encoders that it belongs to, by modality: `{"name": ..., "options": ..., "fingerprint": ...}`.
        content: tensors and plain types.
    """
    header = {"format_version": FORMAT_VERSION, "phase": phase.name, "config": dict(config)}
    header["encoders"] = {modality: dict(encoder) for modality, encoder in encoders.items()}
    with replaced(path) as stream:
        torch.save(header | content, stream)


def load_artifact(path: Path, phase: Phase) -> dict[str, Any]:
    """Read and check an artifact.

    Raises:
        InputError: no such file, truncated, of another format version, or of the other phase.
    """
    if not path.is_file():
        raise InputError(Problem(str(path), "no such file", f"give the path of {phase.artifact}, or a run ID"))
    try:
        artifact = torch.load(path, map_location="cpu", weights_only=True)
        version, found = artifact["format_version"], artifact["phase"]
    except Exception as error:  # torch raises many kinds for a torn or foreign file; all mean the same to the user
        raise InputError(
            Problem(str(path), f"is not a valid {phase.artifact} ({type(error).__name__}): torn, or not written by raytrain2p")
        ) from None
    if version != FORMAT_VERSION:
        what = f"has format version {version}; this raytrain2p reads {FORMAT_VERSION}"
        raise InputError(Problem(str(path), what, "train it anew, or use the raytrain2p that wrote it"))
    if found != phase.name:
        raise InputError(Problem(str(path), f"comes from phase `{found}`; required is `{phase.name}` ({phase.artifact})"))
    return artifact


def check_fingerprint(path: Path, needed: Mapping[str, Any], name: str, found: str, setting: str) -> None:
    """Refuse to combine an artifact with a frozen model that it was not trained with.

    Args:
        path: of the artifact.
        needed: name and fingerprint of the model that it was trained with.
        name, found: name and fingerprint of the model that is there.
        setting: which names the model.

    Raises:
        InputError: the fingerprints differ. The message names both models.
    """
    if needed["fingerprint"] != found:
        raise InputError(
            Problem(
                f"{setting}={name}",
                f"its fingerprint is {found[:12]}, but {path} was trained with {needed['name']} (fingerprint {needed['fingerprint'][:12]})",
                f"set {setting}={needed['name']}, or train another aligner with {name}",
            )
        )
