"""The inputs of a phase, read and checked in the driver before any worker starts: records, their digests, what to encode."""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import nn

from raytrain2p.config import Findings, Problem, Settings
from raytrain2p.config.settings import Source, TrainingSettings
from raytrain2p.data.batches import MicroBatch, Ragged, drawn_records
from raytrain2p.data.checks import check_media, foreign_marks
from raytrain2p.data.features import ITEM, Features, FeatureStore, FeatureTable, padded
from raytrain2p.data.media import MediaRef, decode
from raytrain2p.data.reading import EMBEDDED_FORMAT, scan_source
from raytrain2p.data.records import Record
from raytrain2p.phases.init import init_content

if TYPE_CHECKING:  # transformers
    from raytrain2p.models.encoders import EncoderSpec
    from raytrain2p.models.tracing import Pass

TRAIN, VAL = "train", "val"
SAMPLED = 128  # items from which the size of all features is estimated
ABSENT = {"val": "no validation loss", "test": "nothing is evaluated after training"}  # what the user should know if it is
Preprocess = Callable[[Sequence[Any]], list[torch.Tensor]]  # decoded items to what their encoder takes
Batch = dict[str, Any]  # tensors of one worker's part of a forward pass, `step_tokens`, and in phase 2 `tokens_read`


@dataclass(frozen=True)
class EncoderJob:
    """Items of one modality, by content key, whose features one frozen encoder computes."""

    modality: str
    store: FeatureStore
    items: dict[bytes, MediaRef | str]
    spec: "EncoderSpec"

    @cached_property
    def bytes_needed(self) -> int:
        """What the features of the missing items will need, estimated from some of them when it is first asked for.

        The positions of an item grow with what the encoder takes of it (pixels, frames, tokens), so the smallest and the largest of these
        items alone are encoded.
        """
        missing = self.store.missing(self.items)
        if not missing:
            return 0
        encoder = self.spec.build()
        some = [self.items[missing[number]] for number in np.linspace(0, len(missing) - 1, min(len(missing), SAMPLED), dtype=int)]
        inputs = [encoder.preprocess([item if isinstance(item, str) else decode(item)])[0] for item in some]
        sizes = np.array([one.numel() for one in inputs])
        least, most = (encoder.encode([inputs[place]])[0] for place in (sizes.argmin(), sizes.argmax()))
        positions = np.interp(sizes, [sizes.min(), sizes.max()], [len(least), len(most)]).mean()
        return round(len(missing) * (positions * least.shape[1] * least.element_size() + ITEM.itemsize))


@dataclass(frozen=True)
class InputDigests:
    """The inputs of a run by content. run.json contains the fields under these names; a resumed run must have equal ones.

    Args:
        train_records: number of training records.
        train_digest: sha256 of their content, see `digest_records`.
        split_records: number of records of every split, by setting, as `SETTING=SOURCES`.
        inputs: all else by setting, as `SETTING=VALUE`, and part: each model's files, the content of `model.init`
            and of the aligner, the records of other splits.
    """

    train_records: int
    train_digest: str
    inputs: dict[str, dict[str, str]] = field(default_factory=dict)
    split_records: dict[str, int] = field(default_factory=dict)


def digest_records(records: Iterable[Record], media_keys: Mapping[MediaRef, bytes]) -> str:
    """The sha256 of the records in order: their texts, and the content keys of their media, wherever the files are."""
    digest = hashlib.sha256()
    for record in records:
        messages = [
            [message.role, *(part if isinstance(part, str) else [part.modality, media_keys[part].hex()] for part in message.parts)]
            for message in record.messages
        ]
        digest.update(json.dumps([messages, record.task, record.concept]).encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class SourceShare:
    """One source of a split: its number of records, and its weight."""

    records: int
    weight: float | None


@dataclass(frozen=True)
class CheckedRecords:
    """What the inputs of both phases have.

    Args:
        splits: records by split.
        shares: the sources of the training records, in order.
        media_keys: content keys of all media.
        jobs: what to encode.
        notes: what the user should know of the records, a line each.
        settings: of the run.
    """

    splits: dict[str, list[Record]]
    shares: tuple[SourceShare, ...]
    media_keys: dict[MediaRef, bytes]
    jobs: tuple[EncoderJob, ...]
    notes: tuple[str, ...]
    settings: Settings

    def with_settings(self, settings: Any) -> Any:
        return replace(self, settings=settings)

    @property
    def records(self) -> int:
        return len(self.splits[TRAIN])

    @property
    def model_names(self) -> list[str]:
        return [job.spec.name for job in self.jobs]

    def sources_of(self, split: str) -> tuple[tuple[SourceShare, ...], tuple[str, ...]]:
        """`shares` and `places` of a split; those of the training split alone are used."""
        return (self.shares, tuple(record.where for record in self.splits[TRAIN])) if split == TRAIN else ((), ())

    @cached_property
    def digests(self) -> InputDigests:
        of = {name: digest_records(records, self.media_keys) for name, records in self.splits.items()}
        where = {name: f"{setting}={described(listed)}" for name, (setting, listed) in split_sources(self.settings).items()}
        others = {where[name]: {"records": of[name]} for name in where if name != TRAIN}
        counts = {where[name]: len(self.splits[name]) for name in where}
        return InputDigests(self.records, of[TRAIN], others | self.models(), counts)

    def models(self) -> dict[str, dict[str, str]]:
        """The content of the models by setting and file, and of the weights of a warm start."""
        from raytrain2p.models.pretrained import content_of

        return {job.spec.where: content_of(job.spec.directory()) for job in self.jobs} | init_content(self.settings)


class Split(Protocol):
    """Records of one split, ready for samplers and loaders."""

    def __len__(self) -> int: ...

    @property
    def lengths(self) -> np.ndarray:
        """Tokens per record, (N,); all equal if length does not matter."""

    @property
    def supervised(self) -> np.ndarray:
        """Supervised tokens per record, (N,)."""

    @property
    def tasks(self) -> Sequence[str] | None:
        """Of each record, (N,), if they differ; a step has a share of each."""

    @property
    def shares(self) -> tuple[SourceShare, ...]:
        """Where the records come from, in order; a source may have a weight."""

    @property
    def places(self) -> tuple[str, ...]:
        """Of each training record: its file and line, for messages."""

    def __getitem__(self, micro_batch: MicroBatch) -> Batch:
        """Tensors of one worker's part of a forward pass."""


class PhaseInputs(Protocol):
    """Everything that a phase trains on."""

    @property
    def settings(self) -> Settings:
        """By which it was read."""

    def with_settings(self, settings: Any) -> "PhaseInputs":
        """The same records, trained otherwise."""

    @property
    def records(self) -> int:
        """Number of training records."""

    @property
    def digests(self) -> InputDigests:
        """What a resumed run must have equal."""

    @property
    def splits(self) -> Mapping[str, Sequence[Record]]:
        """Records by split."""

    @property
    def media_keys(self) -> Mapping[MediaRef, bytes]:
        """Content keys of all media."""

    @property
    def jobs(self) -> tuple[EncoderJob, ...]:
        """What to encode before `prepare`."""

    @property
    def model_names(self) -> list[str]:
        """The pretrained models that workers and encoder processes load, as the settings name them."""

    @property
    def use(self) -> list[str]:
        """Arguments of the command that uses the result, see `tracking/next_commands.py`."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know of the records, a line each."""

    def prepare(self) -> Mapping[str, Split]:
        """Splits by name; everything must be encoded."""

    def parts(self) -> dict[str, nn.Module]:
        """The model's parts, without weights, to count parameters."""

    def tokens_per_step(self) -> int:
        """Expected tokens of a step, over all workers."""

    def pass_of(self, precision: str, longest: bool = True) -> "Pass":
        """A worker's forward and backward pass, of the smallest number of workers, over the longest records or over usual ones."""

    def flops_per_token(self) -> float | None:
        """That a forward and a backward pass need, if it is known."""


@dataclass(frozen=True)
class ReadSplits:
    """Records by split, the sources of the training records, and a line about each file."""

    splits: dict[str, list[Record]]
    shares: tuple[SourceShare, ...]
    notes: tuple[str, ...]


def split_sources(settings: Settings) -> dict[str, tuple[str, list[Source]]]:
    """The setting and the sources of each split."""
    sources = {TRAIN: ("data.train", settings.data.train)}
    if settings.data.val is not None:
        sources[VAL] = ("data.val", settings.data.val)
    return sources | {name: (f"data.test.{name}", listed) for name, listed in settings.data.test.items()}


def read_splits(settings: Settings, phase: int, findings: Findings) -> ReadSplits:
    """The records of `train`, `val` and each test split. Problems are added to `findings`."""
    for name in settings.data.test:
        if name in (TRAIN, VAL) or not name.replace("_", "").isalnum():
            findings.add(Problem(f"data.test.{name}", "is not a valid name of a test split", "use letters, digits, _; not train or val"))
    splits: dict[str, list[Record]] = {}
    shares, notes = [], []
    for name, (setting, listed) in split_sources(settings).items():
        for source in listed:
            with findings:
                scan = scan_source(source.path, phase, setting)
                findings.extend(scan.problems)
                splits[name] = splits.get(name, []) + scan.records
                notes += [f"{setting}: {count:,} records of {path} ({form})" for path, form, count in scan.files if form != EMBEDDED_FORMAT]
                if marks := foreign_marks(scan.records):
                    notes.append(f"{setting}: {marks}")
                if name == TRAIN:
                    shares.append(SourceShare(len(scan.records), source.weight))
    if absent := [f"data.{what} is not set: {so}" for what, so in ABSENT.items() if not getattr(settings.data, what)]:
        notes.append("; ".join(absent))
    return ReadSplits(splits, tuple(shares), tuple(notes))


def check_global_batch(settings: Settings, records: int, findings: Findings) -> None:
    """An epoch must have at least one step."""
    size = settings.training.global_batch_size
    if 0 < records < size:
        findings.add(
            Problem(
                f"data.train={described(settings.data.train)}",
                f"has {records} records, but a step takes training.global_batch_size={size}",
                f"set training.global_batch_size={records} or less, or give more records",
            )
        )


def weighted(shares: Sequence[SourceShare]) -> list[tuple[int, float]] | None:
    """Number of records and weight of each source; None if none has a weight: then each record is drawn once per epoch."""
    if all(share.weight is None for share in shares):
        return None
    return [(share.records, 1.0 if share.weight is None else share.weight) for share in shares]


def check_shares(settings: Settings, shares: Sequence[SourceShare], findings: Findings) -> None:
    """A weight may be so small that no record of its source is ever drawn: each epoch takes the same number."""
    steps = sum(share.records for share in shares) // settings.training.global_batch_size
    if not steps or len(shares) < len(settings.data.train) or all(share.weight is None for share in shares):
        return
    drawn = drawn_records([(share.records, share.weight or 1.0) for share in shares], steps * settings.training.global_batch_size)
    for source, share, count in zip(settings.data.train, shares, drawn, strict=True):
        if share.records and not count:
            what = f"its weight {source.weight or 1.0:g} is so small beside the others that no record of it is ever drawn"
            findings.add(Problem(f"data.train={source.path}", what, "raise it, or leave the source out"))


def described(sources: Iterable[Source]) -> str:
    """Sources as a user wrote them, for messages."""
    return ", ".join(source.path for source in sources)


def read_media_keys(
    splits: Iterable[list[Record]], specs: Mapping[str, "EncoderSpec"], stores: Mapping[str, FeatureStore], findings: Findings
) -> dict[MediaRef, bytes]:
    """Content keys of all media. Each item is decoded, and must be one that its encoder takes, except those whose features are stored.

    Args:
        specs, stores: by modality; a modality whose encoder has a problem of its own has no store.
    """
    checks = {modality: specs[modality].item_check() for modality in stores}
    stored = {modality: store.places() for modality, store in stores.items()}
    checked = check_media(itertools.chain.from_iterable(splits), checks, stored)
    findings.extend(checked.problems)
    return checked.keys


def check_modalities(records: Iterable[Record], allowed: Iterable[str], fix: str, findings: Findings) -> None:
    """Records may have media of the modalities that have an encoder alone."""
    known = set(allowed)
    for record in records:
        for modality in sorted({ref.modality for ref in record.media()} - known):
            findings.add(Problem(record.where, f"has {modality}, but there is no encoder of {modality}", fix.format(modality=modality)))


@dataclass(frozen=True)
class MediaTable:
    """The media of one modality in a split: an item is computed and kept once, however many records have it.

    Args:
        items: of each record, the numbers of its items in order.
        source: their features, or references if they are encoded in the step.
    """

    items: Ragged
    source: FeatureTable | tuple[MediaRef, ...]

    @property
    def online(self) -> bool:
        return not isinstance(self.source, FeatureTable)

    def of(self, records: np.ndarray) -> np.ndarray:
        """Item numbers of these records, in order."""
        return np.concatenate([self.items[record] for record in records]) if len(records) else np.empty(0, np.int64)

    def load(self, items: np.ndarray, preprocess: Preprocess | None) -> Features | list[torch.Tensor]:
        """Stored features, or what the encoder takes."""
        if isinstance(self.source, FeatureTable):
            return self.source.gather(items) if len(items) else padded([])
        assert preprocess is not None, "call phase.online first"
        # one by one: an image may be large until it is resized
        return [tensor for item in items for tensor in preprocess([decode(self.source[item])])]


def media_table(
    records: Sequence[Iterable[MediaRef | str]], store: FeatureStore, keys: Callable[[MediaRef | str], bytes], online: bool
) -> MediaTable:
    """The table of one modality, from the items of each record."""
    number: dict[MediaRef | str, int] = {}
    items = Ragged([[number.setdefault(item, len(number)) for item in record] for record in records])
    if online:
        return MediaTable(items, tuple(item for item in number if isinstance(item, MediaRef)))
    return MediaTable(items, store.table(keys(item) for item in number))


def planned_steps(training: TrainingSettings, records: int) -> int:
    """Optimizer steps of a whole run: by epochs or by max_steps, whichever is less."""
    by_epochs = records // training.global_batch_size * training.max_epochs if training.max_epochs is not None else None
    return min(steps for steps in (by_epochs, training.max_steps) if steps is not None)


def warmup_of(training: TrainingSettings, steps: int) -> int:
    """Steps of warm-up in a run of so many: half of them at most."""
    return min(training.warmup_steps, max(1, steps // 2))


def plan_notes(settings: Settings, records: int) -> list[str]:
    """What a run makes of its settings that was not asked for: records that no step takes, and a shorter warm-up."""
    training, notes = settings.training, []
    steps, size = planned_steps(training, records), training.global_batch_size
    if all(source.weight is None for source in settings.data.train):  # else sources are drawn from, as often as they weigh
        if steps < records // size:
            notes.append(f"data.train: {steps * size:,} of {records:,} records are used: training ends after {steps:,} steps of {size:,}")
        elif rest := records % size:
            notes.append(f"data.train: {rest:,} of {records:,} records, others in each epoch, are left out: they fill no step of {size:,}")
    if (warmup := warmup_of(training, steps)) < training.warmup_steps:
        notes.append(f"training.warmup_steps={training.warmup_steps:,} is shortened to {warmup:,}, since training has {steps:,} steps")
    return notes
