"""Trained assistants for the tests of inference: made in process from tiny models, with weights that differ from those at the start."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from raytrain2p.config import InstructionSettings
from raytrain2p.config.phases import ALIGNMENT
from raytrain2p.models.aligner import Aligner
from raytrain2p.models.artifacts import save_artifact
from raytrain2p.models.encoders import EncoderSpec
from raytrain2p.models.pretrained import fingerprint
from raytrain2p.phases.instruction.module import build, export


def known(dimension: int) -> dict[str, Any]:
    """Texts as an aligner.pt keeps them."""
    texts = ["red", "blue: sea, sky", "green: grass", "the colour of milk"]
    return {"texts": texts, "vectors": F.normalize(torch.randn(len(texts), dimension), dim=-1)}


def trained_assistant(
    folder: Path,
    language_model: Path,
    encoders: dict[str, Path],
    options: dict[str, dict[str, Any]] | None = None,
    shape: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    **model: Any,
) -> Path:
    """The path of a model.pt.

    Args:
        encoders: directories by modality.
        options: of the encoders.
        shape: of the aligner, beside its widths.
        data: settings of the data, which is not read.
        model: settings of the model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    specs = {modality: EncoderSpec(modality, str(path), (options or {}).get(modality, {})) for modality, path in encoders.items()}
    torch.manual_seed(3)
    aligner = Aligner({modality: spec.width() for modality, spec in specs.items()}, **({"hidden": 24, "dimension": 12} | (shape or {})))
    of_encoders = {
        modality: {"name": spec.name, "options": dict(spec.options), "fingerprint": fingerprint(spec.directory())}
        for modality, spec in specs.items()
    }
    save_artifact(
        folder / "aligner.pt",
        ALIGNMENT,
        {},
        of_encoders,
        shape=aligner.shape,
        state_dict=aligner.state_dict(),
        known=known(aligner.dimension),
    )
    settings = InstructionSettings.model_validate(
        {
            "data": data or {"train": "train.jsonl"},
            "training": {"max_steps": 1, "precision": "float32"},
            "model": {"language_model": str(language_model), "aligner": str(folder / "aligner.pt"), "soft_tokens": 4} | model,
        }
    )
    torch.manual_seed(4)
    module = build(settings, 1, settings.training.precision).eval()
    for name, parameter in module.assistant.named_parameters():
        if parameter.requires_grad and "lora_" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    export(module, folder / "model.pt", settings.model_dump(mode="json"))
    return folder / "model.pt"
