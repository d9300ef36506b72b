"""A trained assistant for inference, from model.pt and the base models: without Ray, MLflow store or training data."""

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raytrain2p.config import Findings, InputError, Problem
from raytrain2p.config.phases import INSTRUCTION
from raytrain2p.data.chat import Encoded, load_chat_format, soft_codes
from raytrain2p.data.checks import check_media
from raytrain2p.data.features import padded
from raytrain2p.data.media import decode
from raytrain2p.data.records import Record
from raytrain2p.data.tokens import TokenRecords, left_padded
from raytrain2p.models.artifacts import check_fingerprint, check_weights, load_artifact
from raytrain2p.models.assistant import AssistantBatch, AssistantShape, build_assistant
from raytrain2p.models.encoders import EncoderSpec
from raytrain2p.models.frozen_encoder import FrozenEncoder
from raytrain2p.models.precision import resolve_precision
from raytrain2p.models.pretrained import context_length, model_directory

LANGUAGE_MODEL = "model.language_model"


class Predictor:
    """A trained assistant with its encoders, from the path of a model.pt.

    Raises:
        InputError: the artifact is not readable, damaged or incomplete, or the language model differs from the one in training.
    """

    def __init__(self, path: Path) -> None:
        artifact = load_artifact(path, INSTRUCTION)
        try:
            needed, shape = artifact["language_model"], AssistantShape(**artifact["shape"])
            precision = artifact["config"]["training"]["precision"]
            needed = {key: needed[key] for key in ("name", "fingerprint")}
        except (KeyError, TypeError) as error:
            raise InputError(Problem(str(path), f"lacks parts of a {INSTRUCTION.artifact}: {error}", "train it anew")) from None
        directory = model_directory(needed["name"], LANGUAGE_MODEL)
        check_fingerprint(path, needed, needed["name"], directory, LANGUAGE_MODEL)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.bf16 = resolve_precision(precision, self.device) == "bf16"
        attention = "sdpa" if self.device.type == "cuda" else "eager"
        assistant = build_assistant(shape, attention, torch.bfloat16 if self.bf16 else torch.float32)
        assistant.freeze(shape.tuning, train_aligner=False)
        check_weights(path, artifact["state_dict"], assistant.own_weights())
        assistant.load_state_dict(artifact["state_dict"], strict=False)  # the rest is the language model's own
        self.path, self.shape, self.trained = path, shape, artifact["encoders"]
        self.assistant = assistant.to(self.device).eval()
        self.context = context_length(directory)
        self.chat = load_chat_format(directory, shape.soft_tokens, artifact["system_prompt"])

    def check(self, records: Sequence[Record], max_new_tokens: int = 32) -> None:
        """Look at all records and media before the first answer.

        Raises:
            InputError: media do not decode, or their encoder does not take them; the language model's template or context does not
                take a record; and as of `spec`.
        """
        findings = Findings()
        for record in records:
            try:
                length = len(self.chat.prompt(record.messages)) + max_new_tokens
            except ValueError as error:
                findings.add(Problem(record.where, str(error), "change the record"))
                continue
            if length > self.context:
                what = f"is {length} tokens long with an answer of {max_new_tokens}, the language model's context has {self.context}"
                findings.add(Problem(record.where, what, "shorten it", cause="is longer than the language model's context"))
        specs = {modality: self.spec(modality) for modality in {ref.modality for record in records for ref in record.media()}}
        findings.extend(check_media(records, {modality: spec.item_check() for modality, spec in specs.items()}).problems)
        findings.raise_any()

    def spec(self, modality: str) -> EncoderSpec:
        """The encoder of a modality.

        Raises:
            InputError: the model has not learnt it, or the encoder differs from the one in training.
        """
        if modality not in self.trained:
            raise InputError(Problem(str(self.path), f"was trained with {', '.join(self.trained)}, not with {modality}"))
        needed, setting = self.trained[modality], f"model.encoders.{modality}"
        spec = EncoderSpec(modality, needed["name"], needed["options"])
        check_fingerprint(self.path, needed, spec.name, spec.directory(), setting)
        return spec

    @functools.cache  # noqa: B019 - as long as the predictor
    def encoder(self, modality: str) -> FrozenEncoder:
        """Of a modality, loaded when it is first needed; raises as `spec`."""
        return self.spec(modality).build(self.device.type)

    def answers(self, records: Sequence[Record], batch_size: int = 32, max_new_tokens: int = 32) -> Iterator[str]:
        """Greedy answers to the last question of each record, in the order of the records.

        Raises:
            InputError: records have media that the model has not learnt, or an encoder differs from the one in training.
        """
        for modality in {ref.modality for record in records for ref in record.media()}:
            self.encoder(modality)
        for start in range(0, len(records), batch_size):
            yield from self._answer(records[start : start + batch_size], max_new_tokens)

    @torch.inference_mode()
    def _answer(self, records: Sequence[Record], max_new_tokens: int) -> list[str]:
        prompts = [self.chat.prompt(record.messages) for record in records]
        tokens = TokenRecords.of(
            [Encoded(prompt, [False] * len(prompt), len(prompt)) for prompt in prompts], soft_codes(self.chat.soft_tokens)
        )
        batch = left_padded(tokens, np.arange(len(records)))
        media = [ref for record in records for ref in record.media()]
        grids = {
            modality: padded(self.encoder(modality)([decode(ref) for ref in media if ref.modality == modality]))
            for modality in {ref.modality for ref in media}
        }
        soft = {modality: mask.to(self.device) for modality, mask in batch["soft"].items()}
        assembled = AssistantBatch(batch["input_ids"].to(self.device), batch["attention"].to(self.device), soft, grids)
        stop = list(self.chat.stop_ids)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            ids: Any = self.assistant.generate(assembled, max_new_tokens, stop, stop[0])
        return [self.chat.tokenizer.decode(row, skip_special_tokens=True).strip() for row in ids]
