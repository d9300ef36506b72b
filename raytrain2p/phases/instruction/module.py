"""Phase 2: a causal language model is trained to answer about images that it reads through the aligner of phase 1."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from raytrain2p.config import InstructionSettings
from raytrain2p.config.phases import ALIGNMENT, INSTRUCTION
from raytrain2p.models.artifacts import load_artifact, save_artifact
from raytrain2p.models.assistant import Assistant, AssistantBatch, build_assistant
from raytrain2p.models.encoders import ImageEncoder
from raytrain2p.models.pretrained import fingerprint, model_directory
from raytrain2p.phases.base import PhaseModule
from raytrain2p.phases.inputs import Batch
from raytrain2p.phases.instruction.data import InstructionSplit, assistant_shape


class InstructionModule(PhaseModule):
    """The assistant as a LightningModule."""

    def __init__(self, settings: InstructionSettings, assistant: Assistant, total_steps: int) -> None:
        super().__init__(settings.training, settings.seed, total_steps)
        self.settings = settings
        self.assistant = assistant
        self.encoder: list[ImageEncoder] = []  # in a list, which keeps its weights out of this module

    def shardable(self) -> list[nn.Module]:
        layers = max((m for m in self.assistant.language_model.modules() if isinstance(m, nn.ModuleList)), key=len)
        return [*layers, self.assistant.branch.map, self.assistant.projector]

    def assemble(self, batch: Batch) -> AssistantBatch:
        if "features" not in batch:
            pixels = batch["pixels"]
            batch = batch | {"features": self.online_encoder().encode_pixels(pixels) if len(pixels) else pixels.new_empty(0, 1, 1)}
        return AssistantBatch(features=batch["features"], **batch["tokens"])

    def online_encoder(self) -> ImageEncoder:
        if not self.encoder:
            model = self.settings.model
            self.encoder.append(ImageEncoder(model.image_encoder, model.image_size, self.device.type))
        return self.encoder[0]

    def forward(self, batch: Batch) -> torch.Tensor:
        return self.assistant(self.assemble(batch))

    def total_loss(self, batch: Batch) -> torch.Tensor:
        """Scaled so that its mean over workers and passes is the mean over the step's supervised tokens."""
        shares = self.trainer.world_size * self.passes_per_step
        return self(batch) * (shares / batch["step_tokens"])

    def val_sums(self, batch: Batch) -> tuple[torch.Tensor, int]:
        return self(batch), int((batch["tokens"]["labels"] != -100).sum())


def build(settings: InstructionSettings, total_steps: int, precision: str) -> InstructionModule:
    """Base model in the compute precision, what trains in float32, the aligner with the weights of phase 1."""
    model, attention = settings.model, settings.model.attention
    if attention == "auto":
        attention = "sdpa" if settings.launch.use_gpu else "eager"
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    assistant = build_assistant(assistant_shape(settings), attention, dtype)
    aligner = load_artifact(Path(model.aligner), ALIGNMENT)["state_dict"]
    prefix = "branches.image."
    assistant.branch.load_state_dict({k.removeprefix(prefix): v for k, v in aligner.items() if k.startswith(prefix)})
    assistant.soft_token_dropout = model.soft_token_dropout
    if settings.training.gradient_checkpointing:
        assistant.language_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # from_pretrained returns the model in evaluation mode, which has neither dropout nor checkpointed activations
    module = InstructionModule(settings, assistant.train(), total_steps)
    module.parameter_counts = assistant.freeze(model.tuning, model.train_aligner)
    return module


def online(module: InstructionModule, data: Mapping[str, InstructionSplit]) -> dict[str, InstructionSplit]:
    """The splits with the encoder's preprocessing, where images are encoded in the step."""
    preprocess = module.online_encoder().preprocess
    return {name: replace(split, preprocess=preprocess) for name, split in data.items()}


def export(module: InstructionModule, path: Path, config: dict[str, Any]) -> None:
    """Write model.pt: the trained weights, the aligner branch, and the shape to build them into."""
    model, assistant = module.settings.model, module.assistant
    frozen = {
        name for name, p in assistant.named_parameters(remove_duplicate=False) if not p.requires_grad and name.startswith("language_model.")
    }
    directories = {
        "language_model": (model.language_model, model_directory(model.language_model)),
        "image_encoder": (model.image_encoder, model_directory(model.image_encoder)),
    }
    save_artifact(
        path,
        INSTRUCTION,
        config,
        {role: {"name": name, "fingerprint": fingerprint(directory)} for role, (name, directory) in directories.items()},
        image_size=model.image_size,
        system_prompt=model.system_prompt,
        shape=assistant_shape(module.settings).to_dict(),
        state_dict={
            name: value.detach().cpu()
            for name, value in assistant.state_dict().items()
            if name not in frozen and _is_weight(assistant, name)
        },
    )


def _is_weight(assistant: Assistant, name: str) -> bool:
    """Buffers of the frozen language model are rebuilt with it."""
    return not name.startswith("language_model.") or name in dict(assistant.named_parameters(remove_duplicate=False))
