"""The inputs of phase 2: records, checked and tokenized, with their media."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from raytrain2p.config import Findings, InstructionSettings, Problem
from raytrain2p.config.phases import ALIGNMENT
from raytrain2p.config.problems import ReportedError
from raytrain2p.config.settings import ALIGNER
from raytrain2p.data.batches import MicroBatch, StepSampler
from raytrain2p.data.features import FeatureStore
from raytrain2p.data.media import TEXT, MediaRef
from raytrain2p.data.records import Record
from raytrain2p.data.tokens import TokenRecords, left_padded, right_padded
from raytrain2p.models.assistant import Assistant, AssistantBatch, AssistantShape, build_assistant
from raytrain2p.models.encoders import EncoderSpec
from raytrain2p.models.pretrained import content_of, model_directory
from raytrain2p.models.tracing import Pass, traced
from raytrain2p.phases.init import facts_of
from raytrain2p.phases.inputs import (
    TRAIN,
    VAL,
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
    weighted,
)
from raytrain2p.phases.instruction.aligner import check_encoders, found_aligner, required_aligner
from raytrain2p.phases.instruction.checks import (
    check_aligner,
    check_base_model,
    check_encoder,
    check_soft_tokens,
    checked_language_model,
    encoder_specs,
    longest_record,
)
from raytrain2p.phases.instruction.init import check_init
from raytrain2p.phases.instruction.question import question_arguments
from raytrain2p.phases.instruction.tokenize import kept_shares, tokenize


@dataclass(frozen=True)
class InstructionSplit:
    """One split: tokens, and a table of the items of each modality that it has.

    Args:
        tasks: of each record.
        records: of test splits, for the table of sample answers.
    """

    tokens: TokenRecords
    tables: Mapping[str, MediaTable]
    tasks: tuple[str, ...]
    records: tuple[Record, ...] = ()
    shares: tuple[SourceShare, ...] = ()
    places: tuple[str, ...] = ()
    preprocess: Mapping[str, Preprocess] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tasks)

    @property
    def lengths(self) -> np.ndarray:
        return self.tokens.lengths

    @property
    def supervised(self) -> np.ndarray:
        return self.tokens.supervised_counts

    def __getitem__(self, micro_batch: MicroBatch) -> Batch:
        """Whole records, padded on the right, to learn from."""
        return self.batch(micro_batch, right_padded(self.tokens, micro_batch.records))

    def prompts(self, micro_batch: MicroBatch) -> Batch:
        """What stands before the last answer, padded on the left, for generation."""
        return self.batch(micro_batch, left_padded(self.tokens, micro_batch.records))

    def batch(self, micro_batch: MicroBatch, padded: dict[str, Any]) -> Batch:
        """Adds the items to the tokens, by modality."""
        items = {
            modality: table.load(table.of(micro_batch.records), self.preprocess.get(modality)) for modality, table in self.tables.items()
        }
        read = int(self.lengths[micro_batch.records].sum())
        return {"tokens": padded, "items": items, "tokens_read": read, "step_tokens": micro_batch.step_tokens}


@dataclass(frozen=True)
class InstructionInputs(CheckedRecords):
    """Everything that phase 2 trains on, checked."""

    settings: InstructionSettings
    tokens: dict[str, TokenRecords]

    def prepare(self) -> dict[str, InstructionSplit]:
        """Splits as arrays, once everything is encoded."""
        online = self.settings.data.features == "online"
        prepared = {}
        for name, records in self.splits.items():
            refs = [list(record.media()) for record in records]
            tables = {
                job.modality: media_table(
                    [[ref for ref in one if ref.modality == job.modality] for one in refs], job.store, self.key, online
                )
                for job in self.jobs
                if any(ref.modality == job.modality for one in refs for ref in one)
            }
            tasks = tuple(record.task for record in records)
            is_test = name not in (TRAIN, VAL)
            prepared[name] = InstructionSplit(self.tokens[name], tables, tasks, tuple(records) if is_test else (), *self.sources_of(name))
        return prepared

    def key(self, item: MediaRef | str) -> bytes:
        assert isinstance(item, MediaRef)
        return self.media_keys[item]

    @property
    def use(self) -> list[str]:
        """A question of these records, for `predict`."""
        return question_arguments(self.splits)

    @property
    def model_names(self) -> list[str]:
        return [*super().model_names, self.settings.model.language_model]

    def models(self) -> dict[str, dict[str, str]]:
        """Also the language model, with tokenizer and template, and the aligner, unless it is that of a warm start."""
        language_model, aligner = self.settings.model.language_model, self.settings.model.aligner
        found = super().models() | {f"model.language_model={language_model}": content_of(model_directory(language_model))}
        if aligner is not None and (artifact := facts_of(Path(aligner), ALIGNMENT)) is not None:
            found[f"{ALIGNER}={aligner}"] = {"content": artifact["digest"]}
        return found

    def parts(self) -> dict[str, nn.Module]:
        """The model's parts, for counting; without memory for their weights."""
        encoders = {
            f"{modality} encoder": spec.without_weights()
            for modality, spec in encoder_specs(self.settings).items()
            if any(job.modality == modality for job in self.jobs)
        }
        return encoders | self.without_weights(torch.bfloat16).parts()

    def tokens_per_step(self) -> int:
        """Expected number, from the mean length of the training records."""
        return round(self.settings.training.global_batch_size * float(self.tokens[TRAIN].lengths.mean()))

    def pass_of(self, precision: str, longest: bool = True) -> Pass:
        settings, tokens = self.settings, self.tokens[TRAIN]
        micro_batch = settings.training.micro_batch(settings.launch.min_workers)
        records = np.argsort(tokens.lengths)[-micro_batch:] if longest else self.usual_records(micro_batch)
        padded, dtype = right_padded(tokens, records), torch.bfloat16 if precision == "bf16" else torch.float32
        assistant = self.without_weights(dtype)
        features = {}
        for modality, places in padded["soft"].items():
            items, positions = len(places) // settings.model.tokens_of(modality), settings.model.soft_tokens_of(modality)
            features[modality] = (torch.zeros(items, positions, assistant.branch(modality).width, dtype=torch.float16), None)
        batch = AssistantBatch(features=features, **padded)

        def loss() -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                return assistant.train()(batch)

        return traced(assistant, loss, sharded=settings.launch.sharing > 1)

    def usual_records(self, count: int) -> np.ndarray:
        """A worker's of a pass, of which the longest is as long as it is on average."""
        lengths, settings = self.tokens[TRAIN].lengths, self.settings
        tasks, workers = [record.task for record in self.splits[TRAIN]], settings.launch.min_workers
        size, seed, shares = settings.training.global_batch_size, settings.seed, weighted(self.shares)
        sampler = StepSampler(lengths, np.ones_like(lengths), size, count, 0, workers, seed, sources=shares, tasks=tasks)
        batches = [batch.records for batch in sampler]
        padded = np.array([lengths[records].max() for records in batches])
        return batches[abs(padded - padded.mean()).argmin()]

    def flops_per_token(self) -> float | None:
        return self.without_weights(torch.bfloat16).flops_per_token(float(self.tokens[TRAIN].lengths.mean()))

    def without_weights(self, dtype: torch.dtype) -> Assistant:
        """The assistant on the meta device, as workers train it; for flash attention stands sdpa, which takes as much and needs no GPU."""
        model, training = self.settings.model, self.settings.training
        attention = "eager" if attention_of(self.settings) == "eager" else "sdpa"
        with torch.device("meta"):
            assistant = build_assistant(assistant_shape(self.settings), attention, dtype, empty=True)
        assistant.freeze(model.tuning, model.train_aligner)
        assistant.convert(dtype, torch.device("meta"))
        if training.gradient_checkpointing:
            assistant.checkpoint_layers()
        return assistant


def read_inputs(settings: InstructionSettings) -> InstructionInputs:
    """Read and check the inputs of phase 2. `model.aligner` and `model.init` must be paths by now, if they are set.

    Raises:
        InputError: every problem with models, aligner, records and media.
    """
    findings = Findings()
    model = settings.model
    specs: dict[str, EncoderSpec] = {}
    chat, limit, begins = None, 0, list[str]()
    with findings:
        specs = encoder_specs(settings)
        check_aligner(settings)
        check_encoders(settings)
        check_soft_tokens(settings, specs)
    with findings:
        begins = check_init(settings)
    with findings:
        directory = model_directory(model.language_model, "model.language_model")
        chat = checked_language_model(settings, directory, specs)
        limit = longest_record(directory, model.max_length)
        check_base_model(settings, directory)
    read = read_splits(settings, 2, findings)
    splits = read.splits
    used = {ref.modality for records in splits.values() for record in records for ref in record.media()}
    stores: dict[str, FeatureStore] = {}
    if specs:
        fix = "train an aligner with model.encoders.{modality}, or leave these records out"
        check_modalities((record for records in splits.values() for record in records), specs, fix, findings)
        for modality in specs:
            if modality in used:
                with findings:
                    check_encoder(settings, specs[modality])
                    stores[modality] = FeatureStore(str(settings.data.feature_store), specs[modality].fingerprint())
    media_keys = read_media_keys(splits.values(), specs, stores, findings)
    tokens, shares, notes = dict[str, TokenRecords](), read.shares, read.notes
    if chat is not None and used <= specs.keys():  # else it is reported: what the aligner lacks, or the aligner itself
        for name, records in splits.items():
            with findings:
                setting = f"data.{name}" if name in (TRAIN, VAL) else f"data.test.{name}"
                fitting = tokenize(records, chat, limit, settings.data.too_long, setting)
                tokens[name], splits[name], notes = fitting.tokens, fitting.records, (*notes, *fitting.notes)
                if name == TRAIN:
                    shares = kept_shares(shares, fitting.kept)
    check_global_batch(settings, len(splits.get(TRAIN, [])), findings)
    check_shares(settings, shares, findings)
    notes = (*notes, *begins, *evaluation_notes(settings, splits))
    findings.raise_any()
    if found_aligner(settings) is None:
        raise ReportedError(Problem(ALIGNER, "there is no such file"))  # where it, or `model.init`, was resolved to a path
    items: dict[str, dict[bytes, MediaRef | str]] = {modality: {} for modality in stores}
    if settings.data.features == "stored":
        for ref in (ref for records in splits.values() for record in records for ref in record.media()):
            items[ref.modality][media_keys[ref]] = ref
    jobs = tuple(EncoderJob(modality, store, items[modality], specs[modality]) for modality, store in stores.items())
    return InstructionInputs(splits, shares, media_keys, jobs, notes, settings, tokens)


def evaluation_notes(settings: InstructionSettings, splits: Mapping[str, list[Record]]) -> list[str]:
    """A line about test records that are not evaluated, if there are any."""
    most, parts = settings.evaluation.max_records, []
    if most is None:
        return []
    for name in settings.data.test:
        records = splits.get(name, [])
        chosen = sum(min(count, most) for count in Counter(record.task for record in records).values())
        parts += [f"{chosen:,} of {len(records):,} of {name}"] if chosen < len(records) else []
    return [f"evaluation.max_records={most:,} of each task: {', '.join(parts)} are evaluated"] if parts else []


def assistant_shape(settings: InstructionSettings) -> AssistantShape:
    """What the model is built from; also written into model.pt."""
    model = settings.model
    aligner = required_aligner(settings)
    return AssistantShape(
        language_model=model.language_model,
        soft_tokens={modality: model.tokens_of(modality) for modality in aligner.encoders if modality != TEXT},
        tuning=model.tuning,
        lora=model.lora.model_dump(),
        aligner=dict(aligner.shape),
        projector=model.projector,
        recall=(aligner.texts, model.recall_tokens, model.recall_texts) if model.recall_tokens else None,
        quantization=model.quantization,
    )


def attention_of(settings: InstructionSettings) -> str:
    """The attention kernel, as transformers names it."""
    chosen = settings.model.attention
    return ("sdpa" if settings.launch.gpus else "eager") if chosen == "auto" else chosen
