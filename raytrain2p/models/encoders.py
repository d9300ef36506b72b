"""Frozen encoders by modality: ENCODERS maps a modality to its class; a spec is the choice of one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModel

from raytrain2p.config import InputError, Problem
from raytrain2p.models.audio_encoder import AudioEncoder
from raytrain2p.models.frozen_encoder import FrozenEncoder, to_precision
from raytrain2p.models.image_encoder import ImageEncoder
from raytrain2p.models.pretrained import first_line, model_directory
from raytrain2p.models.text_encoder import TextEncoder

ENCODERS: dict[str, type[FrozenEncoder]] = {encoder.modality: encoder for encoder in (ImageEncoder, AudioEncoder, TextEncoder)}


@dataclass(frozen=True)
class EncoderSpec:
    """The choice of a frozen encoder for one modality: model setting (hub ID, directory or packaged name) and options."""

    modality: str
    name: str
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def setting(self) -> str:
        return f"model.encoders.{self.modality}.name"

    @property
    def where(self) -> str:
        return f"{self.setting}={self.name}"

    def directory(self) -> Path:
        return model_directory(self.name, self.setting)

    def fingerprint(self) -> str:
        """Of the features that the encoder gives."""
        return ENCODERS[self.modality].fingerprint_of(self.directory(), self.options)

    def build(self, device: str = "cpu") -> FrozenEncoder:
        return ENCODERS[self.modality](self.directory(), self.where, self.options, device)

    def item_check(self) -> Callable[[Any], None]:
        """Raises ValueError for a decoded item that the encoder does not take."""
        return ENCODERS[self.modality].item_check(self.directory())

    def without_weights(self) -> nn.Module:
        """The encoder without memory for its weights, to count them."""
        with torch.device("meta"):
            model = AutoModel.from_config(AutoConfig.from_pretrained(self.directory(), trust_remote_code=False), trust_remote_code=False)
        return cast(nn.Module, to_precision(ENCODERS[self.modality].encoder_of(model), self.options).requires_grad_(False))

    def probe(self) -> int:
        """T of the encoder's sample, from encoding it: this shows what is wrong with an encoder.

        Raises:
            InputError: transformers cannot load it, or it does not encode this modality.
        """
        try:
            encoder = self.build()
            features = encoder([encoder.sample])[0]
        except InputError:
            raise
        except Exception as error:  # a foreign model's own code: it may raise anything
            what = f"does not encode {self.modality}: {type(error).__name__}: {first_line(error)}"
            raise InputError(Problem(self.where, what, "take another encoder")) from None
        if encoder.missing and not features.isfinite().all():
            what = f"its output depends on weights that are not in its files, among these {len(encoder.missing):,}: "
            what += ", ".join(encoder.missing[:5])
            raise InputError(Problem(self.where, what, "download it again, or take another encoder"))
        return len(features)

    def width(self) -> int:
        """D, from the model's configuration alone.

        Raises:
            InputError: no such model, or transformers does not support its configuration.
        """
        directory = self.directory()
        try:
            config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        except (OSError, ValueError, KeyError, RecursionError) as error:
            raise InputError(Problem(self.where, f"transformers cannot read its configuration: {first_line(error)}")) from None
        part = getattr(config, ENCODERS[self.modality].config_part, None) or config
        sizes = getattr(part, "hidden_sizes", None)  # convolutional networks list one width per stage
        width = sizes[-1] if sizes else getattr(part, "hidden_size", None) or getattr(part, "hidden_dim", None)
        if width is None:
            raise InputError(Problem(self.where, "its configuration has no hidden_size", "take another encoder"))
        return int(width)
