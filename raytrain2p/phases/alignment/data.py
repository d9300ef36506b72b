"""The inputs of phase 1: pairs of images and texts, checked, as features of frozen encoders."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoModel

from raytrain2p.config import AlignmentSettings, Findings
from raytrain2p.config.settings import AlignmentModelSettings
from raytrain2p.data.batches import MicroBatch
from raytrain2p.data.features import FeatureStore, FeatureTable
from raytrain2p.data.media import ImageRef, content_key, decode_image
from raytrain2p.models.aligner import Aligner
from raytrain2p.models.encoders import EncoderSpec
from raytrain2p.models.losses import ContrastiveLoss
from raytrain2p.phases.inputs import (
    TRAIN,
    Batch,
    CheckedRecords,
    EncoderJob,
    check_global_batch,
    check_images,
    read_splits,
)


@dataclass(frozen=True)
class AlignmentSplit:
    """One split. `keys` (N,) are equal where the texts are. Images come as features, or by reference if encoded online."""

    texts: FeatureTable
    images: FeatureTable | list[ImageRef]
    keys: np.ndarray
    preprocess: Callable[[Any], torch.Tensor] | None = None

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def lengths(self) -> np.ndarray:
        return np.ones(len(self), np.int64)  # pairs need no bucketing

    supervised = lengths

    def __getitem__(self, micro_batch: MicroBatch) -> Batch:
        """Tensors: text (b, 1, D), image (b, T, D) or pixels (b, 3, h, w), keys (b,)."""
        batch: Batch = {
            "text": self.texts.gather(micro_batch.records),
            "keys": torch.from_numpy(self.keys[micro_batch.records]),
            "step_tokens": micro_batch.step_tokens,
        }
        if isinstance(self.images, FeatureTable):
            return batch | {"image": self.images.gather(micro_batch.records)}
        assert self.preprocess is not None
        return batch | {"pixels": self.preprocess([decode_image(self.images[item].read()) for item in micro_batch.records])}


@dataclass(frozen=True)
class AlignmentInputs(CheckedRecords):
    """Everything that phase 1 trains on, checked."""

    settings: AlignmentSettings

    def prepare(self) -> dict[str, AlignmentSplit]:
        """Splits as arrays, once everything is encoded."""
        jobs = {job.what: job.store for job in self.jobs}
        pairs = {}
        for name, records in self.splits.items():
            text_keys = [content_key(record.text.encode()) for record in records]
            images = [record.image for record in records if record.image is not None]
            online = self.settings.data.features == "online"
            pairs[name] = AlignmentSplit(
                jobs["texts"].table(text_keys),
                images if online else jobs["images"].table([self.image_keys[image] for image in images]),
                np.array([int.from_bytes(key[:8], "little", signed=True) for key in text_keys], np.int64),
            )
        return pairs

    def parts(self) -> dict[str, nn.Module]:
        """The model's parts, for counting."""
        model = self.settings.model
        with torch.device("meta"):
            encoders = {
                f"{modality} encoder": AutoModel.from_config(AutoConfig.from_pretrained(spec.directory())).requires_grad_(False)
                for modality, spec in encoder_specs(model).items()
            }
        return encoders | {"aligner": build_aligner(model), "loss": ContrastiveLoss(model.loss)}

    def tokens_per_step(self) -> int:
        """There are no tokens in phase 1; a step is measured in pairs."""
        return self.settings.training.global_batch_size

    def widest(self) -> tuple[int, int]:
        """(positions, width) of the activations, for the memory estimate."""
        return 64, self.settings.model.hidden


def read_inputs(settings: AlignmentSettings) -> AlignmentInputs:
    """Read and check the inputs of phase 1.

    Raises:
        InputError: every problem with models, records and images.
    """
    findings = Findings()
    specs, stores = encoder_specs(settings.model), dict[str, FeatureStore]()
    for modality, spec in specs.items():
        with findings:
            spec.width()
            spec.probe()
            stores[modality] = FeatureStore(str(settings.data.feature_store), spec.fingerprint())
    splits = read_splits(settings, 1, findings)
    records = [record for split in splits.values() for record in split]
    image_keys = check_images(records, stores.get("image"), findings)
    check_global_batch(settings, len(splits.get(TRAIN, [])), findings)
    findings.raise_any()
    images: dict[bytes, ImageRef | str] = {key: image for image, key in image_keys.items()}
    texts: dict[bytes, ImageRef | str] = {content_key(record.text.encode()): record.text for record in records}
    items = {"text": texts, "image": {} if settings.data.features == "online" else images}
    jobs = tuple(EncoderJob(f"{modality}s", stores[modality], items[modality], specs[modality].build) for modality in items)
    return AlignmentInputs(splits, image_keys, jobs, settings)


def encoder_specs(model: AlignmentModelSettings) -> dict[str, EncoderSpec]:
    """By modality."""
    return {"image": EncoderSpec("image", model.image_encoder, model.image_size), "text": EncoderSpec("text", model.text_encoder)}


def build_aligner(model: AlignmentModelSettings) -> Aligner:
    """Untrained, as wide as its encoders."""
    widths = {modality: spec.width() for modality, spec in encoder_specs(model).items()}
    return Aligner(widths, model.hidden, model.dimension, model.dropout)
