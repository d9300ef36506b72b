"""The artifacts of the two phases, aligner.pt and model.pt.

An artifact is a dictionary of plain types and tensors: it loads with `weights_only=True`, so that reading one runs no code. It holds
a digest of its own content, which is compared at each load: torch.load does not compare the checksums of the file.
"""

import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from raytrain2p.config import InputError, Problem
from raytrain2p.config.phases import ALIGNMENT, INSTRUCTION, Phase
from raytrain2p.storage.files import replaced

FORMAT_VERSION = 3
WITHOUT_DIGEST = 2  # an earlier format version, which is still read
PARTS: dict[Phase, dict[str, Any]] = {  # what an artifact of each phase must hold, and its type
    ALIGNMENT: {"config": dict, "encoders": dict, "shape": dict, "state_dict": dict},
    INSTRUCTION: {"config": dict, "encoders": dict, "shape": dict, "state_dict": dict, "language_model": dict, "system_prompt": str | None},
}


def save_artifact(path: Path, phase: Phase, config: Mapping[str, Any], encoders: Mapping[str, Mapping[str, Any]], **content: Any) -> None:
    """Write an artifact, atomically.

    Args:
        config: the run's settings as nested groups.
        encoders: the frozen encoders that it belongs to, by modality: `{"name": ..., "options": ..., "fingerprint": ...}`.
        content: tensors and plain types.
    """
    artifact = {"format_version": FORMAT_VERSION, "phase": phase.name, "config": dict(config)}
    artifact["encoders"] = {modality: dict(encoder) for modality, encoder in encoders.items()}
    artifact |= content
    artifact["digest"] = digest_of(artifact)
    with replaced(path) as stream:
        torch.save(artifact, stream)


def digest_of(artifact: Mapping[str, Any]) -> str:
    """The sha256 of all that an artifact holds: plain values, and names, types, shapes and bytes of tensors. 270 MB take 0.3 s."""
    digest, tensors = hashlib.sha256(), list[torch.Tensor]()

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(key): plain(inner) for key, inner in sorted(value.items(), key=lambda item: str(item[0]))}
        if isinstance(value, list | tuple):
            return [plain(inner) for inner in value]
        if isinstance(value, torch.Tensor):
            tensors.append(value)
            return {"tensor": [str(value.dtype), *value.shape]}
        return value

    digest.update(json.dumps(plain({key: value for key, value in artifact.items() if key != "digest"})).encode())
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_artifact(path: Path, phase: Phase) -> dict[str, Any]:
    """Read and check an artifact. One of an earlier version has no digest: it is computed, and compared with nothing.

    Raises:
        InputError: no such file; damaged, be it by one bit; parts are missing; of another format version, or of the other phase.
    """
    if not path.is_file():
        raise InputError(Problem(str(path), "no such file", f"give the path of {phase.artifact}, or a run ID"))
    try:
        with warnings.catch_warnings(action="ignore"):  # torch's, of a damaged file
            artifact = torch.load(path, map_location="cpu", weights_only=True)
        version, found = artifact["format_version"], artifact["phase"]
        digest = digest_of(artifact)
    except Exception as error:  # torch raises many kinds for a torn or foreign file; all mean the same to the user
        what = f"is not a valid {phase.artifact} ({type(error).__name__}): torn, damaged, or not written by raytrain2p"
        raise InputError(Problem(str(path), what, "restore it from a copy, or train it anew")) from None
    if version not in (FORMAT_VERSION, WITHOUT_DIGEST):
        what = f"has format version {version}; this raytrain2p reads {FORMAT_VERSION} and {WITHOUT_DIGEST}"
        raise InputError(Problem(str(path), what, "train it anew, or use the raytrain2p that wrote it"))
    if artifact.setdefault("digest", digest if version == WITHOUT_DIGEST else None) != digest:
        what = "is damaged: its content is not what was written (the digest in it differs)"
        raise InputError(Problem(str(path), what, "restore it from a copy, or train it anew"))
    if found != phase.name:
        raise InputError(Problem(str(path), f"comes from phase `{found}`; required is `{phase.name}` ({phase.artifact})"))
    if lacking := [name for name, kind in PARTS[phase].items() if name not in artifact or not isinstance(artifact[name], kind)]:
        what = f"lacks parts of a {phase.artifact}: {', '.join(lacking)}"
        raise InputError(Problem(str(path), what, "restore it from a copy, or train it anew"))
    return artifact


def recorded_digest(path: Path) -> str | None:
    """The digest that an artifact holds, without reading its tensors; None if there is none, or the file is damaged."""
    try:
        return str(torch.load(path, map_location="meta", weights_only=True, mmap=True)["digest"])
    except Exception:  # torch raises many kinds for a torn or foreign file
        return None


def check_weights(path: Path, found: Mapping[str, torch.Tensor], required: Mapping[str, torch.Tensor]) -> None:
    """The weights of an artifact must be those of the model that it is loaded into: otherwise some would stay untrained.

    Args:
        path: of the artifact.
        required: the model's, by name; may be on the meta device.

    Raises:
        InputError: weights are missing, unknown, or of another shape.
    """
    problems = {
        "lacks": [name for name in required if name not in found],
        "has unknown": [name for name in found if name not in required],
        "has other shapes of": [name for name, weight in found.items() if name in required and weight.shape != required[name].shape],
    }
    for what, names in problems.items():
        if names:
            text = f"{what} weights: {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
            raise InputError(Problem(str(path), text, "restore it from a copy, or train it anew"))


def check_fingerprint(path: Path, needed: Mapping[str, Any], name: str, directory: Path, setting: str, otherwise: str = "") -> None:
    """Refuse to combine an artifact with a frozen model that it was not trained with.

    Args:
        path: of the artifact.
        needed: name and fingerprint of the model that it was trained with.
        name, directory: of the model that is there.
        setting: which names the model.
        otherwise: what else the user can do (default: train another aligner).

    Raises:
        InputError: the fingerprints differ. The message names both models.
    """
    from raytrain2p.models.pretrained import fingerprint, is_model  # imports transformers, which who reads artifacts alone does not need

    if not is_model(directory, needed["fingerprint"]):
        found = fingerprint(directory)
        raise InputError(
            Problem(
                f"{setting}={name}",
                f"its fingerprint is {found[:12]}, but {path} was trained with {needed['name']} (fingerprint {needed['fingerprint'][:12]})",
                f"set {setting}={needed['name']}, or {otherwise or f'train another aligner with {name}'}",
            )
        )


def option_problems(path: Path, trained: Mapping[str, Any], options: Mapping[str, Any], setting: str, otherwise: str) -> list[Problem]:
    """A problem for each option of an encoder that differs from the one in training.

    Args:
        path: of the artifact.
        trained: the encoder in it.
        options: to compare.
        setting: of the encoder.
        otherwise: what else the user can do than leave the option as it was.
    """
    problems = []
    for option, value in options.items():
        if value != (used := trained["options"].get(option)):
            what = f"{path} was trained with {'the default of the encoder' if used is None else used}"
            leave = f"leave out {setting}.{option}" if used is None else f"set {setting}.{option}={used}"
            problems.append(Problem(f"{setting}.{option}={value}", what, f"{leave}, or {otherwise}"))
    return problems
