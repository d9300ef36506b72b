"""A model.pt with random weights over tiny base models, as phase 2 writes it."""

from pathlib import Path
from typing import Any

import torch

from raytrain2p.config.phases import INSTRUCTION
from raytrain2p.models.artifacts import save_artifact
from raytrain2p.models.assistant import AssistantShape, build_assistant
from raytrain2p.models.pretrained import fingerprint

LORA = {"rank": 2, "alpha": 4, "dropout": 0.0, "target_modules": "all-linear"}


def save_tiny_model(path: Path, language_model: Path, vit: Path, seed: int = 0, quantization: str | None = None) -> None:
    """Write a model.pt that has learnt images. Other seeds are other models."""
    torch.manual_seed(seed)
    aligner: dict[str, Any] = {"widths": {"image": 32}, "hidden": 16, "dimension": 12, "dropout": 0.0}
    shape = AssistantShape(str(language_model), {"image": 4}, "lora", LORA, aligner, quantization=quantization)
    assistant = build_assistant(shape, "eager", torch.float32)
    assistant.freeze("lora", train_aligner=True)
    save_artifact(
        path,
        INSTRUCTION,
        {"training": {"precision": "float32"}},
        {"image": {"name": str(vit), "options": {}, "fingerprint": fingerprint(vit)}},
        language_model={"name": str(language_model), "fingerprint": fingerprint(language_model)},
        system_prompt=None,
        shape=shape.to_dict(),
        state_dict={name: weight.detach() for name, weight in assistant.own_weights().items()},
    )
