"""A trained assistant for inference, from model.pt and the base models: without Ray, MLflow store or training data."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raytrain2p.config.phases import INSTRUCTION
from raytrain2p.data.batches import Ragged
from raytrain2p.data.chat import load_chat_format
from raytrain2p.data.media import decode_image
from raytrain2p.data.records import Record
from raytrain2p.data.tokens import TokenRecords, left_padded
from raytrain2p.models.artifacts import check_fingerprint, load_artifact
from raytrain2p.models.assistant import AssistantBatch, AssistantShape, build_assistant
from raytrain2p.models.encoders import ImageEncoder
from raytrain2p.models.precision import resolve_precision
from raytrain2p.models.pretrained import fingerprint, model_directory


class Predictor:
    """A trained assistant with its image encoder, from the path of a model.pt.

    Raises:
        InputError: the artifact is not readable, or a base model differs from the one in training.
    """

    def __init__(self, path: Path) -> None:
        artifact = load_artifact(path, INSTRUCTION)
        for role, needed in artifact["models"].items():
            found = fingerprint(model_directory(needed["name"], role))
            check_fingerprint(path, artifact, role, needed["name"], found, f"model.{role}")
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.bf16 = resolve_precision(artifact["config"]["training"]["precision"], self.device) == "bf16"
        shape = AssistantShape(**artifact["shape"])
        attention = "sdpa" if self.device.type == "cuda" else "eager"
        assistant = build_assistant(shape, attention, torch.bfloat16 if self.bf16 else torch.float32)
        unexpected = assistant.load_state_dict(artifact["state_dict"], strict=False).unexpected_keys
        assert not unexpected, f"model.pt has weights that the assistant does not have: {unexpected[:3]}"
        self.assistant = assistant.to(self.device).eval()
        self.encoder = ImageEncoder(artifact["models"]["image_encoder"]["name"], artifact["image_size"], self.device.type)
        directory = model_directory(shape.language_model)
        self.chat = load_chat_format(directory, shape.soft_tokens, artifact["system_prompt"])

    def answers(self, records: Sequence[Record], batch_size: int = 32, max_new_tokens: int = 32) -> Iterator[str]:
        """Greedy answers, in the order of the records."""
        for start in range(0, len(records), batch_size):
            yield from self._answer(records[start : start + batch_size], max_new_tokens)

    @torch.inference_mode()
    def _answer(self, records: Sequence[Record], max_new_tokens: int) -> list[str]:
        prompts = Ragged([self.chat.prompt(record.instruction, record.image is not None) for record in records])
        padded = left_padded(TokenRecords(prompts, Ragged([[] for _ in records])), np.arange(len(records)))
        images = [decode_image(record.image.read()) for record in records if record.image is not None]
        features = self.encoder(images) if images else torch.empty(0, 1, 1)
        batch = AssistantBatch(features=features.to(self.device), **{name: value.to(self.device) for name, value in padded.items()})
        stop = list(self.chat.stop_ids)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            ids: Any = self.assistant.generate(batch, max_new_tokens, stop, stop[0])
        return [self.chat.tokenizer.decode(row, skip_special_tokens=True).strip() for row in ids]
