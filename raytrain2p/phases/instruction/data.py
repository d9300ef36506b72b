"""The inputs of phase 2: instruction records, checked and tokenized, with their images."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from raytrain2p.config import Findings, InputError, InstructionSettings, Problem
from raytrain2p.config.phases import ALIGNMENT
from raytrain2p.config.settings import InstructionModelSettings
from raytrain2p.data.batches import MicroBatch, Ragged
from raytrain2p.data.chat import ChatFormat, load_chat_format
from raytrain2p.data.features import FeatureStore, FeatureTable
from raytrain2p.data.media import ImageRef, decode_image
from raytrain2p.data.records import Record
from raytrain2p.data.tokens import TokenRecords, left_padded, right_padded
from raytrain2p.models.artifacts import check_fingerprint, load_artifact
from raytrain2p.models.assistant import AssistantShape, build_assistant
from raytrain2p.models.encoders import EncoderSpec
from raytrain2p.models.pretrained import fingerprint, model_directory
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
class InstructionSplit:
    """One split: tokens, and for each record the number of its image among `images` (-1: none)."""

    tokens: TokenRecords
    image: np.ndarray
    images: FeatureTable | list[ImageRef]
    tasks: tuple[str, ...]
    records: tuple[Record, ...]
    preprocess: Callable[[Any], torch.Tensor] | None = None

    def __len__(self) -> int:
        return len(self.image)

    @property
    def lengths(self) -> np.ndarray:
        return self.tokens.lengths

    @property
    def supervised(self) -> np.ndarray:
        return self.tokens.responses.lengths

    def __getitem__(self, micro_batch: MicroBatch) -> Batch:
        """Prompts and responses, padded on the right, with labels."""
        return self.batch(micro_batch, right_padded(self.tokens, micro_batch.records))

    def prompts(self, micro_batch: MicroBatch) -> Batch:
        """Prompts alone, padded on the left, for generation."""
        return self.batch(micro_batch, left_padded(self.tokens, micro_batch.records))

    def batch(self, micro_batch: MicroBatch, padded: dict[str, torch.Tensor]) -> Batch:
        """Adds the images to the tokens: features (P, T, D), or pixels (P, 3, height, width) if encoded online."""
        shown = self.image[micro_batch.records]
        shown = shown[shown >= 0]
        batch: Batch = {"tokens": padded, "step_tokens": micro_batch.step_tokens}
        if isinstance(self.images, FeatureTable):
            return batch | {"features": self.images.gather(shown) if len(shown) else torch.empty(0, 1, 1)}
        assert self.preprocess is not None
        images = [decode_image(self.images[item].read()) for item in shown]
        return batch | {"pixels": self.preprocess(images) if images else torch.empty(0)}


@dataclass(frozen=True)
class InstructionInputs(CheckedRecords):
    """Everything that phase 2 trains on, checked."""

    settings: InstructionSettings
    tokens: dict[str, TokenRecords]

    def prepare(self) -> dict[str, InstructionSplit]:
        """Splits as arrays, once everything is encoded."""
        (job,) = self.jobs
        prepared = {}
        for name, records in self.splits.items():
            images = list(dict.fromkeys(record.image for record in records if record.image is not None))
            number = {image: position for position, image in enumerate(images)}
            image = np.array([number[record.image] if record.image is not None else -1 for record in records], np.int64)
            online = self.settings.data.features == "online"
            prepared[name] = InstructionSplit(
                self.tokens[name],
                image,
                images if online else job.store.table([self.image_keys[image] for image in images]),
                tuple(record.task for record in records),
                tuple(records),
            )
        return prepared

    def parts(self) -> dict[str, nn.Module]:
        """The model's parts, for counting; without memory for their weights."""
        model = self.settings.model
        with torch.device("meta"):
            encoder = AutoModel.from_config(AutoConfig.from_pretrained(encoder_spec(model).directory()))
            assistant = build_assistant(assistant_shape(self.settings), "eager", torch.bfloat16, empty=True)
        assistant.freeze(model.tuning, model.train_aligner)
        return {"image encoder": encoder.requires_grad_(False)} | assistant.parts()

    def tokens_per_step(self) -> int:
        """Expected number, from the mean length of the training records."""
        return round(self.settings.training.global_batch_size * float(self.tokens[TRAIN].lengths.mean()))

    def widest(self) -> tuple[int, int]:
        """(positions, width of a position's activations over all layers), for the memory estimate."""
        config = AutoConfig.from_pretrained(model_directory(self.settings.model.language_model))
        per_layer = 10 * config.hidden_size + 4 * getattr(config, "intermediate_size", 4 * config.hidden_size)
        layers = 1 if self.settings.training.gradient_checkpointing else config.num_hidden_layers
        return int(self.tokens[TRAIN].lengths.max()), per_layer * layers


def read_inputs(settings: InstructionSettings) -> InstructionInputs:
    """Read and check the inputs of phase 2. `model.aligner` must be a path by now.

    Raises:
        InputError: every problem with models, aligner, records and images.
    """
    findings = Findings()
    model = settings.model
    store, chat, limit = None, None, 0
    with findings:
        store = FeatureStore(str(settings.data.feature_store), encoder_spec(model).fingerprint())
        with findings:
            check_aligner(settings)
        with findings:
            check_soft_tokens(settings)
    with findings:
        directory = model_directory(model.language_model, "model.language_model")
        chat = checked_language_model(settings, directory)
        limit = context_length(directory, model.max_length)
    splits = read_splits(settings, 2, findings)
    image_keys = check_images((record for split in splits.values() for record in split), store, findings)
    tokens: dict[str, TokenRecords] = {}
    if chat is not None:
        for name, records in splits.items():
            with findings:
                tokens[name] = tokenize(records, chat, limit)
    check_global_batch(settings, len(splits.get(TRAIN, [])), findings)
    findings.raise_any()
    assert store is not None
    images: dict[bytes, ImageRef | str] = {key: image for image, key in image_keys.items()}
    job = EncoderJob("images", store, {} if settings.data.features == "online" else images, encoder_spec(model).build)
    return InstructionInputs(splits, image_keys, (job,), settings, tokens)


def encoder_spec(model: InstructionModelSettings) -> EncoderSpec:
    return EncoderSpec("image", model.image_encoder, model.image_size)


def check_aligner(settings: InstructionSettings) -> None:
    """The aligner must exist, be readable, and belong to the image encoder and image size of the settings.

    Raises:
        InputError: it does not; both sides are named.
    """
    model, path = settings.model, Path(settings.model.aligner)
    if not path.is_file():
        return  # reported where the setting was resolved to a path
    artifact = load_artifact(path, ALIGNMENT)
    found = fingerprint(encoder_spec(model).directory())
    check_fingerprint(path, artifact, "image_encoder", model.image_encoder, found, "model.image_encoder")
    if artifact["image_size"] != model.image_size:
        raise InputError(
            Problem(
                f"model.image_size={model.image_size}",
                f"{path} was trained with {artifact['image_size']} (null is the encoder's own)",
                f"set model.image_size={'null' if artifact['image_size'] is None else artifact['image_size']}, or train an aligner "
                f"with phase 1 and model.image_size={'null' if model.image_size is None else model.image_size}",
            )
        )


def checked_language_model(settings: InstructionSettings, directory: Path) -> ChatFormat:
    """The chat format of a directory that holds a causal language model with a usable tokenizer and template.

    Raises:
        InputError: it does not.
    """
    model = settings.model
    try:
        config = AutoConfig.from_pretrained(directory)
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(config)
        chat = load_chat_format(directory, model.soft_tokens, model.system_prompt)
        chat.response("Is this a question?", True, "This is an answer.")
    except Exception as error:  # a foreign model's own code and template: it may raise anything
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            Problem(
                f"model.language_model={model.language_model}",
                f"is not a usable causal language model: {type(error).__name__}: {reason}",
                "take another model; if its template refuses system messages, set model.system_prompt=null",
            )
        ) from None
    if not chat.stop_ids:
        raise InputError(Problem(f"model.language_model={model.language_model}", "its tokenizer has no end token", "take another model"))
    return chat


def check_soft_tokens(settings: InstructionSettings) -> None:
    """An image gives at most as many soft tokens as its grid has positions.

    Raises:
        InputError: more are asked for.
    """
    model = settings.model
    positions = encoder_spec(model).probe()
    if model.soft_tokens > positions:
        raise InputError(
            Problem(
                f"model.soft_tokens={model.soft_tokens}",
                f"{model.image_encoder} gives a grid of {positions} positions",
                f"set model.soft_tokens to {positions} or less",
            )
        )


def context_length(directory: Path, wanted: int | None) -> int:
    """Longest record in tokens: the language model's context, or less if so set.

    Raises:
        InputError: more was set than the model has.
    """
    config = AutoConfig.from_pretrained(directory)
    context = int(getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", 0) or 1_000_000)
    if wanted is not None and wanted > context:
        raise InputError(
            Problem(f"model.max_length={wanted}", f"the language model's context has {context} tokens", f"set {context} or less")
        )
    return wanted or context


def tokenize(records: list[Record], chat: ChatFormat, limit: int) -> TokenRecords:
    """Tokens of all records.

    Raises:
        InputError: records whose response has no token, and records longer than `limit`.
    """
    findings = Findings()
    prompts, responses = [], []
    for record in records:
        prompt = chat.prompt(record.instruction, record.image is not None)
        response = chat.response(record.instruction, record.image is not None, record.response)
        if not [token for token in response if token not in chat.stop_ids]:
            findings.add(Problem(record.where, f"the response {record.response!r} is empty after tokenizing", "write an answer"))
        elif len(prompt) + len(response) > limit:
            findings.add(
                Problem(
                    record.where,
                    f"is {len(prompt) + len(response)} tokens long (soft tokens included), the limit is {limit}",
                    "shorten the record, or raise model.max_length if the language model's context allows it",
                )
            )
        prompts.append(prompt)
        responses.append(response)
    findings.raise_any()
    return TokenRecords(Ragged(prompts), Ragged(responses))


def assistant_shape(settings: InstructionSettings) -> AssistantShape:
    """What the model is built from; also written into model.pt."""
    model = settings.model
    return AssistantShape(
        language_model=model.language_model,
        soft_tokens=model.soft_tokens,
        tuning=model.tuning,
        lora=model.lora.model_dump(),
        aligner=load_artifact(Path(model.aligner), ALIGNMENT)["shape"],
    )
