"""Frozen encoders of text: one vector each, or one per token."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer

from raytrain2p.config import InputError, Problem
from raytrain2p.models.frozen_encoder import FEATURE_DTYPE, FrozenEncoder


class TextEncoder(FrozenEncoder):
    """Texts to the mean over their tokens, T = 1, as sentence-transformers pools them. What exceeds the model's positions is cut.

    Options:
        layer: whose vectors are taken, 0 is the embeddings; the last if not given. Early layers hold the words, late ones the meaning.
        pooled: if false, one vector per token.
    """

    modality = "text"
    sample = "word"
    config_part = "text_config"

    @staticmethod
    def encoder_of(model: Any) -> Any:
        return getattr(model, "text_model", model)

    def load_preprocessing(self, directory: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        self.limit = min(self.tokenizer.model_max_length, self.model.config.max_position_embeddings)
        self.layer, layers = self.options.get("layer"), self.model.config.num_hidden_layers
        if self.layer is not None and self.layer > layers:
            raise InputError(Problem(self.where, f"has {layers} layers, `layer` is {self.layer}", f"set `layer` to {layers} or less"))

    def preprocess(self, items: Sequence[str]) -> list[torch.Tensor]:
        """Token IDs."""
        return [torch.tensor(ids) for ids in self.tokenizer(list(items), truncation=True, max_length=self.limit)["input_ids"]]

    @torch.inference_mode()
    def encode(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """(T, D) each. All run together: attention masks padding, and few texts have equal lengths."""
        ids = pad_sequence(list(inputs), batch_first=True, padding_value=self.tokenizer.pad_token_id or 0).to(self.device)
        mask = pad_sequence([torch.ones_like(one) for one in inputs], batch_first=True).to(self.device)
        with torch.autocast(self.device.type, enabled=False):
            output = self.model(input_ids=ids, attention_mask=mask, output_hidden_states=self.layer is not None)
            hidden = output.last_hidden_state if self.layer is None else output.hidden_states[self.layer]
            if self.options.get("pooled", True):
                hidden = (hidden.float() * mask[:, :, None]).sum(1, keepdim=True) / mask[:, :, None].sum(1, keepdim=True)
        return [of_text[: len(tokens)].to(FEATURE_DTYPE) for of_text, tokens in zip(hidden, inputs, strict=True)]
