"""The inputs of a phase, read and checked in the driver before any worker starts: records, their digests, what to encode."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from torch import nn

from raytrain2p.config import Findings, Problem, Settings
from raytrain2p.config.settings import TrainingSettings
from raytrain2p.data.batches import MicroBatch
from raytrain2p.data.checks import image_problems, read_media_keys
from raytrain2p.data.features import Encoder, FeatureStore
from raytrain2p.data.media import ImageRef
from raytrain2p.data.records import Record, read_records

TRAIN, VAL = "train", "val"
Batch = dict[str, Any]  # tensors of one worker's part of a forward pass, and `step_tokens`


@dataclass(frozen=True)
class EncoderJob:
    """Images or texts, by content key, whose features one frozen encoder computes."""

    what: str
    store: FeatureStore
    items: dict[bytes, ImageRef | str]
    build: Callable[[], Encoder]


@dataclass(frozen=True)
class InputDigests:
    """The inputs of a run by content. run.json contains the fields under these names; a resumed run must have equal ones.

    Args:
        train_records: number of training records.
        train_digest: sha256 of their content, see `digest_records`.
    """

    train_records: int
    train_digest: str


def digest_records(records: Iterable[Record], image_keys: Mapping[ImageRef, bytes]) -> str:
    """The sha256 of the records in order: their texts, and the content keys of their images, wherever the files are."""
    digest = hashlib.sha256()
    for record in records:
        image = image_keys[record.image].hex() if record.image is not None else None
        digest.update(json.dumps([record.text, record.instruction, record.response, record.task, image]).encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class CheckedRecords:
    """What the inputs of both phases have: records by split, the content keys of their images, and what to encode."""

    splits: dict[str, list[Record]]
    image_keys: dict[ImageRef, bytes]
    jobs: tuple[EncoderJob, ...]

    @property
    def records(self) -> int:
        return len(self.splits[TRAIN])

    @cached_property
    def digests(self) -> InputDigests:
        return InputDigests(self.records, digest_records(self.splits[TRAIN], self.image_keys))


class Split(Protocol):
    """Records of one split, ready for samplers and loaders."""

    def __len__(self) -> int: ...

    @property
    def lengths(self) -> np.ndarray:
        """Tokens per record, (N,); all equal if length does not matter."""

    @property
    def supervised(self) -> np.ndarray:
        """Supervised tokens per record, (N,)."""

    def __getitem__(self, micro_batch: MicroBatch) -> Batch:
        """Tensors of one worker's part of a forward pass."""


class PhaseInputs(Protocol):
    """Everything that a phase trains on."""

    @property
    def records(self) -> int:
        """Number of training records."""

    @property
    def digests(self) -> InputDigests:
        """What a resumed run must have equal."""

    @property
    def jobs(self) -> tuple[EncoderJob, ...]:
        """What to encode before `prepare`."""

    def prepare(self) -> Mapping[str, Split]:
        """Splits by name; everything must be encoded."""

    def parts(self) -> dict[str, nn.Module]:
        """The model's parts, without weights, to count parameters."""

    def tokens_per_step(self) -> int:
        """Expected tokens of a step, over all workers."""

    def widest(self) -> tuple[int, int]:
        """(positions, width of a position's activations), for the memory estimate."""


def read_splits(settings: Settings, phase: int, findings: Findings) -> dict[str, list[Record]]:
    """The records of `train`, `val` and each test split. Problems are added to `findings`."""
    sources = {TRAIN: ("data.train", settings.data.train)}
    if settings.data.val is not None:
        sources[VAL] = ("data.val", settings.data.val)
    for name, source in settings.data.test.items():
        if name in sources or not name.replace("_", "").isalnum():
            findings.add(Problem(f"data.test.{name}", "is not a valid name of a test split", "use letters, digits, _; not train or val"))
        sources[name] = (f"data.test.{name}", source)
    splits: dict[str, list[Record]] = {}
    for name, (setting, source) in sources.items():
        with findings:
            splits[name] = read_records(source, phase, setting)
    return splits


def check_global_batch(settings: Settings, records: int, findings: Findings) -> None:
    """An epoch must have at least one step."""
    size = settings.training.global_batch_size
    if 0 < records < size:
        findings.add(
            Problem(
                f"data.train={settings.data.train}",
                f"has {records} records, but a step takes training.global_batch_size={size}",
                f"set training.global_batch_size={records} or less, or give more records",
            )
        )


def check_images(records: Iterable[Record], store: FeatureStore | None, findings: Findings) -> dict[ImageRef, bytes]:
    """Content keys of all images. Each is decoded as a check, except those whose features are stored."""
    records = list(records)
    try:
        keys = read_media_keys(record.image for record in records if record.image is not None)
    except OSError as error:
        findings.add(Problem(str(error.filename), f"cannot be read: {error.strerror}"))
        return {}
    stored = set(store.index()) if store is not None else set()
    findings.extend(image_problems(records, known=lambda image: keys[image] in stored))
    return keys


def planned_steps(training: TrainingSettings, records: int) -> int:
    """Optimizer steps of a whole run: by epochs or by max_steps, whichever is less."""
    by_epochs = records // training.global_batch_size * training.max_epochs if training.max_epochs is not None else None
    return min(steps for steps in (by_epochs, training.max_steps) if steps is not None)
