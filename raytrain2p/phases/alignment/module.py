"""Phase 1: an aligner is trained to map the features of frozen encoders into one space, by a contrastive loss over pairs."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from raytrain2p.config import AlignmentSettings
from raytrain2p.config.phases import ALIGNMENT
from raytrain2p.data.batches import MicroBatch
from raytrain2p.models.artifacts import save_artifact
from raytrain2p.models.distributed import WorkerGroup
from raytrain2p.models.encoders import ImageEncoder
from raytrain2p.models.losses import ContrastiveLoss
from raytrain2p.models.parameters import count_parameters
from raytrain2p.models.pretrained import fingerprint
from raytrain2p.phases.alignment.data import AlignmentSplit, build_aligner, encoder_specs
from raytrain2p.phases.alignment.retrieval import retrieval_metrics
from raytrain2p.phases.base import Answer, PhaseModule
from raytrain2p.phases.inputs import Batch


class AlignmentModule(PhaseModule):
    """The aligner and its loss as a LightningModule."""

    def __init__(self, settings: AlignmentSettings, total_steps: int) -> None:
        super().__init__(settings.training, settings.seed, total_steps)
        self.settings = settings
        self.aligner = build_aligner(settings.model)
        self.loss = ContrastiveLoss(settings.model.loss)
        self.parameter_counts = count_parameters({"aligner": self.aligner, "loss": self.loss})
        self.encoder: list[ImageEncoder] = []  # in a list, which keeps its weights out of this module

    def shardable(self) -> list[nn.Module]:
        return list(self.aligner.branches.values())

    def features(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Features of both modalities, (b, T, D), float32."""
        image = batch["image"] if "image" in batch else self.online_encoder().encode_pixels(batch["pixels"])
        return {"image": image.float(), "text": batch["text"].float()}

    def online_encoder(self) -> ImageEncoder:
        if not self.encoder:
            model = self.settings.model
            self.encoder.append(ImageEncoder(model.image_encoder, model.image_size, self.device.type))
        return self.encoder[0]

    def forward(self, batch: Batch, alone: bool = False) -> torch.Tensor:
        vectors = self.aligner(self.features(batch))
        return self.loss(vectors["image"], vectors["text"], batch["keys"], alone)

    def total_loss(self, batch: Batch) -> torch.Tensor:
        return self(batch)

    def val_sums(self, batch: Batch) -> tuple[torch.Tensor, int]:
        """Negatives come from the batch alone: the batches of other workers may have another size."""
        count = batch["keys"].shape[0]
        return self(batch, alone=True) * count, count


def build(settings: AlignmentSettings, total_steps: int, precision: str) -> AlignmentModule:
    """The untrained module; all of it trains."""
    return AlignmentModule(settings, total_steps)


def online(module: AlignmentModule, data: Mapping[str, AlignmentSplit]) -> dict[str, AlignmentSplit]:
    """The splits with the encoder's preprocessing, where images are encoded in the step."""
    preprocess = module.online_encoder().preprocess
    return {name: replace(pairs, preprocess=preprocess) for name, pairs in data.items()}


@torch.inference_mode()
def evaluate(
    module: AlignmentModule, data: Mapping[str, AlignmentSplit], tests: list[str], group: WorkerGroup
) -> tuple[dict[str, float], list[Answer]]:
    """Recall at 1 and 5, both ways, on each test split, and of random retrieval. Each worker maps its share of the split."""
    metrics: dict[str, float] = {}
    size = module.settings.evaluation.batch_size
    for name in tests:
        pairs = data[name]
        mine = group.share(np.arange(len(pairs)))
        vectors: dict[str, list[np.ndarray]] = {"image": [], "text": []}
        for start in range(0, len(mine), size):
            batch = pairs[MicroBatch(mine[start : start + size], 0)]
            batch = module.transfer_batch_to_device(batch, module.device, 0)
            for modality, rows in module.aligner(module.features(batch)).items():
                vectors[modality].append(rows.cpu().numpy())
        parts = group.gather((mine, {modality: np.concatenate(rows) for modality, rows in vectors.items() if rows}))
        order = np.argsort(np.concatenate([share for share, _ in parts]))
        whole = {modality: np.concatenate([part[modality] for _, part in parts if part])[order] for modality in vectors}
        found = retrieval_metrics(whole["image"], whole["text"], pairs.keys)
        metrics |= {f"{name}/{metric}": value for metric, value in found.items()}
    return metrics, []


def export(module: AlignmentModule, path: Path, config: dict[str, Any]) -> None:
    """Write aligner.pt."""
    model = module.settings.model
    save_artifact(
        path,
        ALIGNMENT,
        config,
        {spec.role: {"name": spec.name, "fingerprint": fingerprint(spec.directory())} for spec in encoder_specs(model).values()},
        image_size=model.image_size,
        shape=module.aligner.shape,
        state_dict={key: value.detach().cpu() for key, value in module.aligner.state_dict().items()},
    )
