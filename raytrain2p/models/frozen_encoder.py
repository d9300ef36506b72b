"""What frozen encoders have in common: decoded items to one (T, D) tensor each.

Shape letters: B items in a batch, T positions (1 for pooled text; for sound it depends on the clip), D width of the encoder.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from transformers import AutoModel

from raytrain2p.config import InputError, Problem
from raytrain2p.models.pretrained import fingerprint, first_line, load_pretrained

FEATURE_DTYPE = torch.float16  # of stored and online features, so that both give equal results


class FrozenEncoder:
    """A pretrained model that turns items of one modality into features. A subclass is a modality.

    Args:
        directory: of a transformers model and its preprocessing.
        where: the setting and its value, for messages.
        options: the settings beside the name, such as `size` of images; None is the model's own.
        device: of the model and of the features. A GPU only where the caller was given one: Ray hides them from nobody.

    Raises:
        InputError: transformers cannot load it as an encoder of this modality.
    """

    modality: ClassVar[str]
    sample: ClassVar[Any]  # a decoded item
    square: ClassVar[bool] = False  # whether the positions are those of a square; else they are a sequence
    processor: Any  # transformers' preprocessing
    output_form: ClassVar[int] = 2  # part of the fingerprint: raise it when the same encoder gives different vectors
    config_part: ClassVar[str]  # of a model with several encoders, as CLIP is

    def __init__(self, directory: Path, where: str, options: Mapping[str, Any], device: str = "cpu") -> None:
        self.where = where
        self.options = {key: value for key, value in options.items() if value is not None}
        self.device = torch.device(device)
        model, self.missing = load_pretrained(AutoModel, directory, where, dtype=torch.float32)
        spoil(model, self.missing)
        self.model = to_precision(self.encoder_of(model), options).eval().requires_grad_(False).to(self.device)
        try:
            self.load_preprocessing(directory)
        except (OSError, ValueError, KeyError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(Problem(where, f"has no preprocessing for {self.modality}: {first_line(error)}")) from None

    @classmethod
    def part(cls, options: Mapping[str, Any], model: torch.nn.Module | None = None, directory: Path | None = None) -> Self:
        """What only encodes, with the model that `encoder_of` gave, or only preprocesses, as a directory says: an exported model and its
        processor are two things.
        """
        encoder = cls.__new__(cls)
        encoder.options = {key: value for key, value in options.items() if value is not None}
        if model is not None:
            encoder.model, encoder.device = to_precision(model, options), next(model.parameters()).device
        if directory is not None:
            encoder.load_preprocessing(directory)
        return encoder

    @classmethod
    def fingerprint_of(cls, directory: Path, options: Mapping[str, Any]) -> str:
        """Of the encoder, its preprocessing and the form of its output: what stored features depend on."""
        given = {key: value for key, value in options.items() if value is not None}
        content = json.dumps([cls.modality, fingerprint(directory), given, cls.output_form], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    @staticmethod
    def encoder_of(model: Any) -> Any:
        """The part that encodes this modality."""
        return model

    @classmethod
    def item_check(cls, directory: Path) -> Callable[[Any], None]:
        """A function that raises ValueError for a decoded item that `preprocess` would refuse; it needs no weights."""
        return lambda item: None

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, and of what is computed."""
        return next(self.model.parameters()).dtype

    def to(self, device: torch.device) -> "FrozenEncoder":
        """Itself, moved to this device."""
        self.device = device
        self.model = self.model.to(device)
        return self

    def load_preprocessing(self, directory: Path) -> None:
        """Set `processor`; it needs no model."""
        raise NotImplementedError

    def preprocess(self, items: Sequence[Any]) -> list[torch.Tensor]:
        """What `encode` takes, on the CPU, one tensor per item; shapes may differ.

        Raises:
            ValueError: the encoder does not take such an item.
        """
        raise NotImplementedError

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        """Preprocessed items of one shape, on the device and in the precision of the weights, to (B, T, D)."""
        raise NotImplementedError

    @torch.inference_mode()
    def encode(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Features of each item, (T, D), float16, on the device.

        They do not depend on the other items: only those of equal shapes are run together.
        """
        places: dict[torch.Size, list[int]] = {}
        for place, tensor in enumerate(inputs):
            places.setdefault(tensor.shape, []).append(place)
        features: dict[int, torch.Tensor] = {}
        with torch.autocast(self.device.type, enabled=False):  # whatever the precision of the step
            for group in places.values():
                batch = torch.stack([inputs[place] for place in group]).to(self.device, self.dtype)
                features.update(zip(group, self.forward(batch).to(FEATURE_DTYPE), strict=True))
        return [features[place] for place in range(len(inputs))]

    def __call__(self, items: Sequence[Any]) -> list[torch.Tensor]:
        return self.encode(self.preprocess(items))


def to_precision(model: Any, options: Mapping[str, Any]) -> Any:
    """The model, its weights in bfloat16 if the options say so. What it computes of its configuration, such as the frequencies of
    positions, stays in float32.
    """
    for module in model.modules() if options.get("precision") == "bf16" else ():
        for weight in module.parameters(recurse=False):
            weight.data = weight.data.bfloat16()
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point() and name not in module._non_persistent_buffers_set:
                setattr(module, name, buffer.bfloat16())
    return model


@torch.no_grad()
def spoil(model: torch.nn.Module, names: Sequence[str]) -> None:
    """Weights that were not in the files become NaN in place of random numbers: what depends on them shows in the output.

    Many encoders lack a part that is not used here, such as the pooler of a ViT.
    """
    weights = dict(model.named_parameters()) | dict(model.named_buffers())
    for name in names:
        if name in weights and weights[name].is_floating_point():
            weights[name].fill_(torch.nan)
