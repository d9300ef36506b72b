"""What a phase finds out in the driver, before any worker starts: its records, and what must be encoded."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
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
    """Items that one frozen encoder has to have seen: images or texts by content key."""

    what: str
    store: FeatureStore
    items: dict[bytes, ImageRef | str]
    build: Callable[[], Encoder]


class Split(Protocol):
    """Records of one split, ready to be batched: what loaders and samplers need of it."""

    def __len__(self) -> int: ...

    @property
    def lengths(self) -> np.ndarray:
        """Tokens per record, (N,); all equal where length does not matter."""

    @property
    def supervised(self) -> np.ndarray:
        """Supervised tokens per record, (N,)."""

    def __getitem__(self, micro_batch: MicroBatch) -> Batch:
        """Tensors of one worker's part of a forward pass."""


class PhaseInputs(Protocol):
    """Everything that a phase trains on, read and checked in the driver."""

    @property
    def records(self) -> int:
        """Training records."""

    @property
    def jobs(self) -> tuple[EncoderJob, ...]:
        """What must be encoded before `prepare`."""

    def prepare(self) -> Mapping[str, Split]:
        """Splits by name, once everything is encoded."""

    def parts(self) -> dict[str, nn.Module]:
        """The model's parts, for counting."""

    def tokens_per_step(self) -> int:
        """Expected tokens of a step, over all workers."""

    def widest(self) -> tuple[int, int]:
        """(positions, width of a position's activations), for the memory estimate."""


def read_splits(settings: Settings, phase: int, findings: Findings) -> dict[str, list[Record]]:
    """The records of `train`, `val` and each test split; what is wrong with one goes into `findings`."""
    sources = {TRAIN: ("data.train", settings.data.train)}
    if settings.data.val is not None:
        sources[VAL] = ("data.val", settings.data.val)
    for name, source in settings.data.test.items():
        if name in sources or not name.replace("_", "").isalnum():
            findings.add(Problem(f"data.test.{name}", "is no name for a test split", "take letters, digits and _, but not train or val"))
        sources[name] = (f"data.test.{name}", source)
    splits: dict[str, list[Record]] = {}
    for name, (setting, source) in sources.items():
        with findings:
            splits[name] = read_records(source, phase, setting)
    return splits


def check_global_batch(settings: Settings, records: int, findings: Findings) -> None:
    """At least one step must fit into an epoch."""
    training, workers = settings.training, settings.launch.num_workers
    needed = training.batch_size * training.accumulate * workers
    if 0 < records < needed:
        findings.add(
            Problem(
                f"data.train={settings.data.train}",
                f"has {records} records, but a step takes {needed} "
                f"(training.batch_size {training.batch_size} x training.accumulate {training.accumulate} x {workers} workers)",
                "lower training.batch_size, or give more records",
            )
        )


def check_images(records: Iterable[Record], store: FeatureStore | None, findings: Findings) -> dict[ImageRef, bytes]:
    """Content keys of all images. Those whose features are stored were decoded before, and are not again."""
    records = list(records)
    try:
        keys = read_media_keys(record.image for record in records if record.image is not None)
    except OSError as error:
        findings.add(Problem(str(error.filename), f"cannot be read: {error.strerror}"))
        return {}
    stored = set(store.index()) if store is not None else set()
    findings.extend(image_problems(records, known=lambda image: keys[image] in stored))
    return keys


def planned_steps(training: TrainingSettings, records: int, world_size: int) -> int:
    """Optimizer steps of a whole run: by epochs or by max_steps, whichever is less."""
    per_epoch = records // (training.batch_size * training.accumulate * world_size)
    by_epochs = per_epoch * training.max_epochs if training.max_epochs is not None else None
    return min(steps for steps in (by_epochs, training.max_steps) if steps is not None)
