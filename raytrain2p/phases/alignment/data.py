"""What phase 1 takes in: pairs of images and texts, checked, as features of frozen encoders."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
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
from raytrain2p.data.records import Record
from raytrain2p.models.aligner import Aligner
from raytrain2p.models.encoders import (
    ImageEncoder,
    TextEncoder,
    encoder_width,
    image_fingerprint,
    probe_image_encoder,
    probe_text_encoder,
    text_fingerprint,
)
from raytrain2p.models.losses import ContrastiveLoss
from raytrain2p.models.pretrained import model_directory
from raytrain2p.phases.inputs import TRAIN, EncoderJob, InputDigests, check_global_batch, check_images, digest_records, read_splits


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

    def __getitem__(self, share: MicroBatch) -> dict[str, Any]:
        """Tensors of one worker's share: text (b, 1, D), image (b, T, D) or pixels (b, 3, h, w), keys (b,)."""
        batch: dict[str, Any] = {
            "text": self.texts.gather(share.records),
            "keys": torch.from_numpy(self.keys[share.records]),
            "step_tokens": share.step_tokens,
        }
        if isinstance(self.images, FeatureTable):
            return batch | {"image": self.images.gather(share.records)}
        assert self.preprocess is not None
        return batch | {"pixels": self.preprocess([decode_image(self.images[item].read()) for item in share.records])}


@dataclass(frozen=True)
class AlignmentInputs:
    """Everything that phase 1 needs, checked; `jobs` say what is to be encoded before `prepare()`."""

    settings: AlignmentSettings
    splits: dict[str, list[Record]]
    image_keys: dict[ImageRef, bytes]
    jobs: tuple[EncoderJob, ...]

    @property
    def records(self) -> int:
        return len(self.splits[TRAIN])

    @cached_property
    def digests(self) -> InputDigests:
        return InputDigests(self.records, digest_records(self.splits[TRAIN], self.image_keys))

    def prepare(self) -> dict[str, AlignmentSplit]:
        """Splits as arrays, once everything is encoded."""
        text_job, image_job = self.jobs
        pairs = {}
        for name, records in self.splits.items():
            text_keys = [content_key(record.text.encode()) for record in records]
            images = [record.image for record in records if record.image is not None]
            online = self.settings.data.features == "online"
            pairs[name] = AlignmentSplit(
                text_job.store.table(text_keys),
                images if online else image_job.store.table([self.image_keys[image] for image in images]),
                np.array([int.from_bytes(key[:8], "little", signed=True) for key in text_keys], np.int64),
            )
        return pairs

    def parts(self) -> dict[str, nn.Module]:
        """The model's parts, for counting."""
        model = self.settings.model
        with torch.device("meta"):
            encoders = {
                what: AutoModel.from_config(AutoConfig.from_pretrained(model_directory(name))).requires_grad_(False)
                for what, name in (("image encoder", model.image_encoder), ("text encoder", model.text_encoder))
            }
        return encoders | {"aligner": build_aligner(model), "loss": ContrastiveLoss(model.loss)}

    def tokens_per_step(self) -> int:
        """There are no tokens in phase 1; a step is measured in pairs."""
        return self.settings.training.global_batch_size

    def widest(self) -> tuple[int, int]:
        """(positions, width) of the activations, for the memory estimate."""
        return 64, self.settings.model.hidden


def read_inputs(settings: AlignmentSettings) -> AlignmentInputs:
    """Read and check all that phase 1 takes in.

    Raises:
        InputError: every problem with models, records and images.
    """
    findings = Findings()
    model, store_root = settings.model, str(settings.data.feature_store)
    image_store = text_store = None
    with findings:
        image_directory = model_directory(model.image_encoder, "model.image_encoder")
        encoder_width(model.image_encoder, "model.image_encoder")
        probe_image_encoder(model.image_encoder, model.image_size)
        image_store = FeatureStore(store_root, image_fingerprint(image_directory, model.image_size))
    with findings:
        text_directory = model_directory(model.text_encoder, "model.text_encoder")
        encoder_width(model.text_encoder, "model.text_encoder")
        probe_text_encoder(model.text_encoder)
        text_store = FeatureStore(store_root, text_fingerprint(text_directory))
    splits = read_splits(settings, 1, findings)
    records = [record for split in splits.values() for record in split]
    image_keys = check_images(records, image_store, findings)
    check_global_batch(settings, len(splits.get(TRAIN, [])), findings)
    findings.raise_any()
    assert image_store is not None
    assert text_store is not None
    images: dict[bytes, ImageRef | str] = {key: image for image, key in image_keys.items()}
    texts: dict[bytes, ImageRef | str] = {content_key(record.text.encode()): record.text for record in records}
    jobs = (
        EncoderJob("texts", text_store, texts, partial(TextEncoder, model.text_encoder)),
        EncoderJob(
            "images",
            image_store,
            {} if settings.data.features == "online" else images,
            partial(ImageEncoder, model.image_encoder, model.image_size),
        ),
    )
    return AlignmentInputs(settings, splits, image_keys, jobs)


def build_aligner(model: AlignmentModelSettings) -> Aligner:
    """Untrained, as wide as its encoders."""
    widths = {
        "image": encoder_width(model.image_encoder, "model.image_encoder"),
        "text": encoder_width(model.text_encoder, "model.text_encoder"),
    }
    return Aligner(widths, model.hidden, model.dimension, model.dropout)
