"""The aligner that phase 2 begins with: an aligner.pt, or the one inside the model.pt of a warm start."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from raytrain2p.config import Findings, InputError, InstructionSettings, Problem
from raytrain2p.config.phases import ALIGNMENT, INSTRUCTION
from raytrain2p.config.settings import ALIGNER, INIT
from raytrain2p.models.artifacts import check_fingerprint, option_problems
from raytrain2p.phases.init import WITHOUT, facts_of


@dataclass(frozen=True)
class FoundAligner:
    """An aligner as phase 2 takes it.

    Args:
        path: of the artifact that it is in.
        encoders: name, options and fingerprint of each encoder, by modality; a model.pt has those of media alone.
        shape: arguments of `Aligner`.
        weights: of the branches, by their names in there.
        known: an aligner.pt's `texts` and their `vectors`; empty in those of earlier versions.
        recall: a model.pt's state of `Recall`; empty if it has none.
        otherwise: what else than another setting helps if it does not fit; empty: train another aligner.
    """

    path: Path
    encoders: Mapping[str, Mapping[str, Any]]
    shape: Mapping[str, Any]
    weights: Mapping[str, torch.Tensor]
    known: Mapping[str, Any]
    recall: Mapping[str, torch.Tensor]
    otherwise: str

    @property
    def texts(self) -> int:
        """How many it knows."""
        return len(self.known["texts"]) if self.known else len(self.recall.get("keys", ()))


def found_aligner(settings: InstructionSettings) -> FoundAligner | None:
    """The aligner in `model.init`, if that is set, else `model.aligner`. None if there is no such file, which is reported where the
    setting is resolved to a path.

    Raises:
        InputError: it is not readable.
    """
    model = settings.model
    if (named := model.init or model.aligner) is None:
        return None
    path, phase = Path(named), INSTRUCTION if model.init is not None else ALIGNMENT
    if (artifact := facts_of(path, phase)) is None:
        return None
    shape = artifact["shape"] if phase == ALIGNMENT else artifact["shape"].get("aligner")
    if not isinstance(shape, dict):
        raise InputError(Problem(str(path), f"lacks parts of a {phase.artifact}: the aligner's shape", "train it anew"))
    weights, recall = branches_of(artifact), weights_of(artifact, "recall.")
    return FoundAligner(
        path, artifact["encoders"], shape, weights, artifact.get("known", {}), recall, WITHOUT if model.init is not None else ""
    )


def branches_of(artifact: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The weights of the aligner's branches in an artifact of either phase, such as `image.query.weight`."""
    return weights_of(artifact, "branches.")


def weights_of(artifact: Mapping[str, Any], prefix: str) -> dict[str, torch.Tensor]:
    """Those whose names begin so, without that."""
    return {name.removeprefix(prefix): value for name, value in artifact["state_dict"].items() if name.startswith(prefix)}


def required_aligner(settings: InstructionSettings) -> FoundAligner:
    """The same, where it must be: the driver has found it.

    Raises:
        InputError: it is not here.
    """
    if (aligner := found_aligner(settings)) is None:
        setting = INIT if settings.model.init is not None else ALIGNER
        named = settings.model.init or settings.model.aligner
        raise InputError(Problem(f"{setting}={named}", "no such file", "give the path of one, on storage that all nodes share"))
    return aligner


def check_encoders(settings: InstructionSettings) -> None:
    """Encoders that are set must be those that the aligner was trained with.

    Raises:
        InputError: they are not; both sides are named.
    """
    from raytrain2p.models.encoders import EncoderSpec  # loads transformers

    if (aligner := found_aligner(settings)) is None:
        return
    path, trained, findings = aligner.path, aligner.encoders, Findings()
    for modality, encoder in settings.model.encoders.by_modality().items():
        setting = f"model.encoders.{modality}"
        if modality not in trained:
            findings.add(Problem(f"{setting}={encoder.name}", f"{path} aligns {', '.join(trained)}", f"train an aligner with {setting}"))
            continue
        spec = EncoderSpec(modality, encoder.name, trained[modality]["options"])
        with findings:
            check_fingerprint(path, trained[modality], encoder.name, spec.directory(), setting, aligner.otherwise)
        findings.extend(option_problems(path, trained[modality], encoder.options(), setting, aligner.otherwise or "train another aligner"))
    findings.raise_any()
