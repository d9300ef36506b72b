"""Phase 1: frozen encoders, trained aligner, contrastive loss over (picture, text) pairs."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoModel

from raytrain2p.config import AlignmentSettings, Findings
from raytrain2p.data.batches import Share
from raytrain2p.data.features import FeatureStore, FeatureTable
from raytrain2p.data.images import ImageRef, content_key, decode_image
from raytrain2p.data.records import Record
from raytrain2p.models.aligner import Aligner
from raytrain2p.models.artifacts import save_artifact
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
from raytrain2p.models.pretrained import fingerprint, model_directory
from raytrain2p.phases.module import PhaseModule
from raytrain2p.phases.retrieval import retrieval_metrics
from raytrain2p.phases.survey import TRAIN, EncoderJob, check_global_batch, check_images, read_splits
from raytrain2p.phases.world import World


@dataclass(frozen=True)
class Pairs:
    """One split. `keys` (N,) are equal where the texts are. Pictures come as features, or by reference if encoded online."""

    texts: FeatureTable
    pictures: FeatureTable | list[ImageRef]
    keys: np.ndarray
    preprocess: Callable[[Any], torch.Tensor] | None = None

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def lengths(self) -> np.ndarray:
        return np.ones(len(self), np.int64)  # pairs need no bucketing

    supervised = lengths

    def __getitem__(self, share: Share) -> dict[str, Any]:
        """Tensors of one worker's share: text (b, 1, D), image (b, T, D) or pixels (b, 3, h, w), keys (b,)."""
        batch: dict[str, Any] = {
            "text": self.texts.gather(share.records),
            "keys": torch.from_numpy(self.keys[share.records]),
            "step_tokens": share.step_tokens,
        }
        if isinstance(self.pictures, FeatureTable):
            return batch | {"image": self.pictures.gather(share.records)}
        assert self.preprocess is not None
        return batch | {"pixels": self.preprocess([decode_image(self.pictures[item].read()) for item in share.records])}


@dataclass(frozen=True)
class AlignmentSurvey:
    """Everything that phase 1 needs, checked; `jobs` say what is to be encoded before `prepare()`."""

    settings: AlignmentSettings
    splits: dict[str, list[Record]]
    image_keys: dict[ImageRef, bytes]
    jobs: tuple[EncoderJob, ...]

    @property
    def records(self) -> int:
        return len(self.splits[TRAIN])

    def prepare(self) -> dict[str, Pairs]:
        """Splits as arrays, once everything is encoded."""
        text_job, image_job = self.jobs
        pairs = {}
        for name, records in self.splits.items():
            text_keys = [content_key(record.text.encode()) for record in records]
            images = [record.image for record in records if record.image is not None]
            online = self.settings.data.features == "online"
            pairs[name] = Pairs(
                text_job.store.table(text_keys),
                images if online else image_job.store.table([self.image_keys[image] for image in images]),
                np.array([int.from_bytes(key[:8], "little", signed=True) for key in text_keys], np.int64),
            )
        return pairs

    def parts(self) -> dict[str, nn.Module]:
        """The model's parts, for counting."""
        module = AlignmentModule(self.settings, total_steps=1)
        model = self.settings.model
        with torch.device("meta"):
            encoders = {
                what: AutoModel.from_config(AutoConfig.from_pretrained(model_directory(name))).requires_grad_(False)
                for what, name in (("image encoder", model.image_encoder), ("text encoder", model.text_encoder))
            }
        return encoders | {"aligner": module.aligner, "loss": module.loss}

    def tokens_per_step(self) -> int:
        """There are no tokens in phase 1; a step is measured in pairs."""
        training = self.settings.training
        return training.batch_size * training.accumulate * self.settings.launch.num_workers

    def widest(self) -> tuple[int, int]:
        """(positions, width) of the activations, for the memory estimate."""
        return 64, self.settings.model.hidden


def survey(settings: AlignmentSettings) -> AlignmentSurvey:
    """Read and check all that phase 1 takes in.

    Raises:
        InputError: every problem with models, records and pictures.
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
            "pictures",
            image_store,
            {} if settings.data.features == "online" else images,
            partial(ImageEncoder, model.image_encoder, model.image_size),
        ),
    )
    return AlignmentSurvey(settings, splits, image_keys, jobs)


class AlignmentModule(PhaseModule):
    """The aligner and its loss as a LightningModule."""

    def __init__(self, settings: AlignmentSettings, total_steps: int) -> None:
        super().__init__(settings.training, settings.seed, total_steps)
        model = settings.model
        widths = {
            "image": encoder_width(model.image_encoder, "model.image_encoder"),
            "text": encoder_width(model.text_encoder, "model.text_encoder"),
        }
        self.settings = settings
        self.aligner = Aligner(widths, model.hidden, model.dimension, model.dropout)
        self.loss = ContrastiveLoss(model.loss)
        self.encoder: list[ImageEncoder] = []  # in a list, so that its weights are no part of this module

    def shardable(self) -> list[nn.Module]:
        return list(self.aligner.branches.values())

    def features(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Features of both modalities, (b, T, D), float32."""
        image = batch["image"] if "image" in batch else self.online_encoder().encode_pixels(batch["pixels"])
        return {"image": image.float(), "text": batch["text"].float()}

    def online_encoder(self) -> ImageEncoder:
        if not self.encoder:
            model = self.settings.model
            self.encoder.append(ImageEncoder(model.image_encoder, model.image_size, self.device.type))
        return self.encoder[0]

    def forward(self, batch: dict[str, Any], alone: bool = False) -> torch.Tensor:
        vectors = self.aligner(self.features(batch))
        return self.loss(vectors["image"], vectors["text"], batch["keys"], alone)

    def total_loss(self, batch: dict[str, Any]) -> torch.Tensor:
        return self(batch)

    def val_sums(self, batch: dict[str, Any]) -> tuple[torch.Tensor, int]:
        """Negatives come from the batch alone, not from other workers, whose batches may be of another size."""
        count = batch["keys"].shape[0]
        return self(batch, alone=True) * count, count


def build(settings: AlignmentSettings, data: dict[str, Pairs], total_steps: int, precision: str) -> AlignmentModule:
    """The module, with what it needs of the data's side."""
    return AlignmentModule(settings, total_steps)


def online(module: AlignmentModule, data: dict[str, Pairs]) -> dict[str, Pairs]:
    """The splits with the encoder's preprocessing, where pictures are encoded in the step."""
    preprocess = module.online_encoder().preprocess
    return {name: Pairs(pairs.texts, pairs.pictures, pairs.keys, preprocess) for name, pairs in data.items()}


@torch.inference_mode()
def evaluate(module: AlignmentModule, data: dict[str, Pairs], tests: list[str], world: World) -> tuple[dict[str, float], dict[str, Any]]:
    """Recall at 1 and 5, both ways, on each test split, beside chance. Every worker encodes a share of the split."""
    metrics: dict[str, float] = {}
    size = module.settings.evaluation.batch_size
    for name in tests:
        pairs = data[name]
        mine = world.share(np.arange(len(pairs)))
        vectors: dict[str, list[np.ndarray]] = {"image": [], "text": []}
        for start in range(0, len(mine), size):
            batch = pairs[Share(mine[start : start + size], 0)]
            batch = module.transfer_batch_to_device(batch, module.device, 0)
            for modality, rows in module.aligner(module.features(batch)).items():
                vectors[modality].append(rows.cpu().numpy())
        parts = world.gather((mine, {modality: np.concatenate(rows) for modality, rows in vectors.items() if rows}))
        order = np.argsort(np.concatenate([share for share, _ in parts]))
        whole = {modality: np.concatenate([part[modality] for _, part in parts if part])[order] for modality in vectors}
        found = retrieval_metrics(whole["image"], whole["text"], pairs.keys)
        metrics |= {f"{name}/{metric}": value for metric, value in found.items()}
    return metrics, {}


def export(module: AlignmentModule, path: Path, config: dict[str, Any]) -> None:
    """Write aligner.pt."""
    model = module.settings.model
    directories = {
        "image_encoder": (model.image_encoder, model_directory(model.image_encoder)),
        "text_encoder": (model.text_encoder, model_directory(model.text_encoder)),
    }
    save_artifact(
        path,
        "alignment",
        config,
        {role: {"name": name, "fingerprint": fingerprint(directory)} for role, (name, directory) in directories.items()},
        image_size=model.image_size,
        shape=module.aligner.shape,
        state_dict={key: value.detach().cpu() for key, value in module.aligner.state_dict().items()},
    )
