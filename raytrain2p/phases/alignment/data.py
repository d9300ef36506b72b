"""The inputs of phase 1: items of several modalities that belong together, checked, as features of frozen encoders."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from raytrain2p.config import AlignmentSettings, Findings, Problem
from raytrain2p.config.loading import packaged_tree
from raytrain2p.config.paths import is_embedded
from raytrain2p.config.phases import INSTRUCTION
from raytrain2p.config.settings import INIT, AlignmentModelSettings
from raytrain2p.data.batches import MicroBatch
from raytrain2p.data.features import FeatureStore
from raytrain2p.data.media import TEXT, MediaRef, content_key
from raytrain2p.data.records import Record
from raytrain2p.models.aligner import Aligner
from raytrain2p.models.artifacts import check_fingerprint, check_weights, option_problems
from raytrain2p.models.encoders import EncoderSpec
from raytrain2p.models.losses import ContrastiveLoss
from raytrain2p.models.tracing import Pass
from raytrain2p.phases.init import WITHOUT, differs, init_facts
from raytrain2p.phases.inputs import (
    TRAIN,
    Batch,
    CheckedRecords,
    EncoderJob,
    MediaTable,
    Preprocess,
    SourceShare,
    check_global_batch,
    check_modalities,
    check_shares,
    media_table,
    read_media_keys,
    read_splits,
)

MOST_TEXTS = 4096  # that aligner.pt keeps, with their vectors: phase 2 compares each item with them


@dataclass(frozen=True)
class AlignmentSplit:
    """One split: a table for each modality that it has, and the records' `keys` (N,), equal where the concept is.

    Args:
        texts: of the training split, at most MOST_TEXTS of them, and their numbers in the table of texts.
    """

    tables: Mapping[str, MediaTable]
    keys: np.ndarray
    shares: tuple[SourceShare, ...] = ()
    places: tuple[str, ...] = ()
    preprocess: Mapping[str, Preprocess] = field(default_factory=dict)
    texts: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def lengths(self) -> np.ndarray:
        return np.ones(len(self), np.int64)  # pairs need no bucketing

    supervised = lengths

    tasks = None

    def __getitem__(self, micro_batch: MicroBatch) -> Batch:
        """Per modality: the items that the b records have (at most b), and which records these are, `present` (b,). Keys (b,)."""
        records = micro_batch.records
        batch: Batch = {"keys": torch.from_numpy(self.keys[records]), "step_tokens": micro_batch.step_tokens, "items": {}, "present": {}}
        for modality, table in self.tables.items():
            batch["items"][modality] = table.load(table.of(records), self.preprocess.get(modality))
            batch["present"][modality] = torch.from_numpy(table.items.lengths[records] > 0)
        return batch


@dataclass(frozen=True)
class AlignmentInputs(CheckedRecords):
    """Everything that phase 1 trains on, checked."""

    settings: AlignmentSettings

    def prepare(self) -> dict[str, AlignmentSplit]:
        """Splits as arrays, once everything is encoded."""
        prepared = {}
        for name, records in self.splits.items():
            items = [record.by_modality() for record in records]
            tables = {
                job.modality: media_table(
                    [[one[job.modality]] if job.modality in one else [] for one in items], job.store, self.key, self.online(job.modality)
                )
                for job in self.jobs
                if any(job.modality in one for one in items)
            }
            keys = [int.from_bytes(concept_key(record)[:8], "little", signed=True) for record in records]
            texts = some_texts(items, self.settings.seed) if name == TRAIN and TEXT in tables else {}
            prepared[name] = AlignmentSplit(tables, np.array(keys, np.int64), *self.sources_of(name), texts=texts)
        return prepared

    def key(self, item: MediaRef | str) -> bytes:
        return content_key(item.encode()) if isinstance(item, str) else self.media_keys[item]

    def online(self, modality: str) -> bool:
        """Texts are always encoded beforehand: they are not changed on the way."""
        return self.settings.data.features == "online" and modality != TEXT

    @property
    def use(self) -> list[str]:
        """Arguments of the command that uses the result: phase 2 has its own records, which are these only if they are embedded."""
        paths = [source.path for source in self.settings.data.train]
        if not all(map(is_embedded, paths)):
            return ["data.train=FILE"]
        usual = packaged_tree(INSTRUCTION.number, {})["data"]["train"]
        return [] if paths == [usual] else [f"data.train=[{', '.join(paths)}]"]

    def parts(self) -> dict[str, nn.Module]:
        """The model's parts, for counting."""
        model = self.settings.model
        encoders = {f"{modality} encoder": spec.without_weights() for modality, spec in encoder_specs(model).items()}
        return encoders | {"aligner": build_aligner(model), "loss": ContrastiveLoss(model.loss)}

    def tokens_per_step(self) -> int:
        """There are no tokens in phase 1; a step is measured in records."""
        return self.settings.training.global_batch_size

    def pass_of(self, precision: str, longest: bool = True) -> Pass:
        """Its memory alone, an estimate, of 64 positions an item."""
        micro_batch = self.settings.training.micro_batch(self.settings.launch.min_workers)
        return Pass(4 * 64 * self.settings.model.hidden * micro_batch, Counter())

    def flops_per_token(self) -> None:
        return None


def some_texts(items: Iterable[Mapping[str, MediaRef | str]], seed: int) -> dict[str, int]:
    """Texts and their numbers, in the order in which `media_table` numbers them; of more than MOST_TEXTS a random part."""
    texts = [text for text in dict.fromkeys(one[TEXT] for one in items if TEXT in one) if isinstance(text, str)]
    chosen = np.sort(np.random.default_rng(seed).permutation(len(texts))[:MOST_TEXTS])
    return {texts[number]: int(number) for number in chosen}


def concept_key(record: Record) -> bytes:
    """Equal for records that are positives of each other: of one concept, or else of one text."""
    return content_key((record.concept or "\n".join(record.answers) or record.where).encode())


def read_inputs(settings: AlignmentSettings) -> AlignmentInputs:
    """Read and check the inputs of phase 1.

    Raises:
        InputError: every problem with models, records and media.
    """
    findings = Findings()
    specs, stores = encoder_specs(settings.model), dict[str, FeatureStore]()
    if len(specs) < 2:
        findings.add(Problem("model.encoders", f"has {', '.join(specs) or 'no modality'}", "set the encoders of at least two modalities"))
    for modality, spec in specs.items():
        with findings:
            spec.width()
            spec.probe()
            stores[modality] = FeatureStore(str(settings.data.feature_store), spec.fingerprint())
    begins = list[str]()
    with findings:
        begins = check_init(settings)
    read = read_splits(settings, 1, findings)
    records = [record for split in read.splits.values() for record in split]
    check_modalities(records, specs, "set model.encoders.{modality}", findings)
    check_trained(read.splits.get(TRAIN, []), specs, findings)
    media_keys = read_media_keys(read.splits.values(), specs, stores, findings)
    check_global_batch(settings, len(read.splits.get(TRAIN, [])), findings)
    check_shares(settings, read.shares, findings)
    findings.raise_any()
    inputs = AlignmentInputs(read.splits, read.shares, media_keys, (), (*read.notes, *begins), settings)
    items: dict[str, dict[bytes, MediaRef | str]] = {modality: {} for modality in specs}
    for record in records:
        for modality, item in record.by_modality().items():
            if modality in items and not inputs.online(modality):
                items[modality][inputs.key(item)] = item
    jobs = tuple(EncoderJob(modality, stores[modality], found, specs[modality]) for modality, found in items.items())
    return replace(inputs, jobs=jobs)


def check_init(settings: AlignmentSettings) -> list[str]:
    """The aligner.pt of `model.init` must have been trained with the encoders of the modalities that both have, and these widths.

    Returns:
        Lines about what begins untrained.

    Raises:
        InputError: every setting that differs and must not; or weights are missing, or not finite.
    """
    if (artifact := init_facts(settings)) is None:
        return []
    model, path, findings = settings.model, Path(str(settings.model.init)), Findings()
    specs, trained, shape = encoder_specs(model), artifact["encoders"], artifact["shape"]
    common = [modality for modality in specs if modality in trained]
    if specs and not common:
        what = f"has the branches of {', '.join(trained)}, and model.encoders has {', '.join(specs)}"
        findings.add(Problem(f"{INIT}={path}", what, f"set an encoder that both have, or {WITHOUT}"))
    for modality in common:
        setting, spec = f"model.encoders.{modality}", specs[modality]
        with findings:
            check_fingerprint(path, trained[modality], spec.name, spec.directory(), setting, WITHOUT)
        options = {**dict.fromkeys(trained[modality]["options"]), **spec.options}
        findings.extend(option_problems(path, trained[modality], options, setting, WITHOUT))
    for name in ("hidden", "dimension", "input_norm"):
        if (here := getattr(model, name)) != (there := ({"input_norm": True} | shape).get(name)):
            findings.add(differs(f"model.{name}", here, model.init, there))
    findings.raise_any()
    wanted = tuple(f"branches.{modality}." for modality in common)
    weights, required = artifact["state_dict"], build_aligner(model).state_dict()
    check_weights(path, *({name: value for name, value in these.items() if name.startswith(wanted)} for these in (weights, required)))
    untrained = [f"the branch of {modality}" for modality in specs if modality not in trained]
    if artifact.get("loss", {}).get("form") != model.loss:
        untrained.append(f"the scale of the {model.loss} loss")
    return [f"{INIT}={path} lacks {', '.join(untrained)}, which begins untrained"] if untrained else []


def check_trained(records: list[Record], specs: Iterable[str], findings: Findings) -> None:
    """Each branch of the aligner must have items to learn from."""
    found = {modality for record in records for modality in record.by_modality()}
    for modality in specs if records else ():
        if modality not in found:
            setting = f"model.encoders.{modality}"
            findings.add(Problem(setting, f"no record of data.train has {modality}", f"set {setting}=null, or add records with {modality}"))


def encoder_specs(model: AlignmentModelSettings) -> dict[str, EncoderSpec]:
    """By modality."""
    return {modality: EncoderSpec(modality, encoder.name, encoder.options()) for modality, encoder in model.encoders.by_modality().items()}


def build_aligner(model: AlignmentModelSettings) -> Aligner:
    """Untrained, as wide as its encoders."""
    widths = {modality: spec.width() for modality, spec in encoder_specs(model).items()}
    return Aligner(widths, model.hidden, model.dimension, model.dropout, model.input_norm)
