"""Phase 2: a causal language model is trained to answer about media that it reads through the aligner of phase 1."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from raytrain2p.config import InstructionSettings
from raytrain2p.config.phases import INSTRUCTION
from raytrain2p.data.chat import load_chat_format
from raytrain2p.models.artifacts import save_artifact
from raytrain2p.models.assistant import Assistant, AssistantBatch, build_assistant
from raytrain2p.models.distributed import WorkerGroup
from raytrain2p.models.pretrained import fingerprint, model_directory
from raytrain2p.models.recall import Recall
from raytrain2p.phases.base import PhaseModule, whole_on_first
from raytrain2p.phases.inputs import Batch
from raytrain2p.phases.instruction.aligner import FoundAligner, required_aligner
from raytrain2p.phases.instruction.checks import encoder_specs
from raytrain2p.phases.instruction.data import InstructionSplit, assistant_shape, attention_of
from raytrain2p.phases.online import OnlineEncoders


class InstructionModule(PhaseModule):
    """The assistant as a LightningModule."""

    def __init__(self, settings: InstructionSettings, assistant: Assistant, total_steps: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(settings.training, settings.launch, settings.seed, total_steps)
        self.settings = settings
        self.assistant, self.dtype_of_products = assistant, dtype
        self.encoders = OnlineEncoders(encoder_specs(settings))

    def configure_model(self) -> None:
        """What was left as its files have it, is converted shard by shard, or layer by layer on its device."""
        super().configure_model()
        self.assistant.convert(self.dtype_of_products, self.trainer.strategy.root_device)

    def shardable(self) -> list[tuple[nn.Module, MixedPrecisionPolicy]]:
        """A language model that trains is gathered as autocast would cast it: in float32 it would be twice as much to send and to keep."""
        float32 = as_is = MixedPrecisionPolicy()
        if self.settings.model.tuning == "full":
            as_is = MixedPrecisionPolicy(self.dtype_of_products, reduce_dtype=torch.float32, cast_forward_inputs=False)
        own = [*(self.assistant.branch(modality).map for modality in self.assistant.branches), self.assistant.projector]
        return [*((layer, as_is) for layer in self.assistant.layers()), *((part, float32) for part in own), (self, as_is)]

    def rate_factor(self, name: str) -> float:
        part = name.removeprefix("assistant.").partition(".")[0].replace("branches", "aligner")
        return next((factor for named, factor in self.settings.model.rate_factors.items() if named == part), 1.0)

    def flops_per_token(self, positions: float) -> float | None:
        return self.assistant.flops_per_token(positions)

    def assemble(self, batch: Batch) -> AssistantBatch:
        return AssistantBatch(features=self.encoders.features(batch["items"], self.device), **batch["tokens"])

    def forward(self, batch: Batch) -> torch.Tensor:
        return self.assistant(self.assemble(batch))

    def total_loss(self, batch: Batch) -> torch.Tensor:
        """Scaled so that its mean over workers and passes is the mean over the step's supervised tokens."""
        shares = self.trainer.world_size * self.passes_per_step
        return self(batch) * (shares / batch["step_tokens"])

    def val_sums(self, batch: Batch) -> tuple[torch.Tensor, int]:
        return self(batch), len(batch["tokens"]["targets"])


def build(settings: InstructionSettings, total_steps: int, precision: str) -> InstructionModule:
    """Base model in the compute precision, what trains in float32, the aligner with the weights that it begins with.

    Raises:
        InputError: the aligner is not on storage that this node shares.
    """
    model = settings.model
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    aligner = required_aligner(settings)
    as_stored = settings.launch.strategy == "fsdp" or model.quantization is not None
    assistant = build_assistant(assistant_shape(settings), attention_of(settings), dtype, as_stored=as_stored)
    wanted = tuple(f"{modality}." for modality in assistant.branches)
    assistant.branches.load_state_dict({name: value for name, value in aligner.weights.items() if name.startswith(wanted)})
    if assistant.recall is not None:
        remember(assistant.recall, aligner, settings)
        assistant.recall.dropout = model.recall_dropout
    assistant.soft_token_dropout = model.soft_token_dropout
    if settings.training.gradient_checkpointing:
        assistant.checkpoint_layers()
    # from_pretrained returns the model in evaluation mode, which has neither dropout nor checkpointed activations
    module = InstructionModule(settings, assistant.train(), total_steps, dtype)
    if model.compile:
        assistant.compile_layers()
        module.compiled = True
    module.parameter_counts = assistant.freeze(model.tuning, model.train_aligner)
    return module


def remember(recall: Recall, aligner: FoundAligner, settings: InstructionSettings) -> None:
    """What phase 1 knows: from an aligner.pt, or as a model.pt has it."""
    if aligner.recall:
        recall.load_state_dict(aligner.recall)
        return
    chat = load_chat_format(model_directory(settings.model.language_model), {}, None)
    known = aligner.known
    recall.fill(known["vectors"], known["texts"], chat.tokenizer, chat.stop_ids[0])


def warm_start(module: InstructionModule, artifact: Mapping[str, Any]) -> None:
    """Load the weights of a model.pt: projector, branches, adapters; of `full` tuning, the language model.

    Args:
        artifact: of `model.init`, which `check_init` has looked at.
    """
    module.assistant.load_state_dict(artifact["state_dict"], strict=False)  # the rest is the language model's own


def online(module: InstructionModule, data: Mapping[str, InstructionSplit]) -> dict[str, InstructionSplit]:
    """The splits with the encoders' preprocessing, where media are encoded in the step."""
    return {name: replace(split, preprocess=module.encoders.preprocess(split.tables)) for name, split in data.items()}


def export(module: InstructionModule, path: Path, config: dict[str, Any], learnt: InstructionSplit | None = None) -> None:
    """Write model.pt: the trained weights, the aligner's branches, the shape to build them into, and the most items of a record.

    A collective: rank 0 writes.
    """
    model, weights = module.settings.model, whole_on_first(module.assistant.own_weights().items())
    if not WorkerGroup.current().is_first:
        return
    trained = required_aligner(module.settings).encoders
    save_artifact(
        path,
        INSTRUCTION,
        config,
        language_model={"name": model.language_model, "fingerprint": fingerprint(model_directory(model.language_model))},
        encoders={modality: {**trained[modality], "name": spec.name} for modality, spec in encoder_specs(module.settings).items()},
        system_prompt=model.system_prompt,
        shape=assistant_shape(module.settings).to_dict(),
        state_dict=weights,
        most_media={modality: int(table.items.lengths.max()) for modality, table in (learnt.tables if learnt else {}).items()},
    )
