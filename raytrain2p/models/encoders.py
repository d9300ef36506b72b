"""Frozen encoders: items to grids of vectors. ENCODERS maps a modality to its class.

Shape letters: B items in a batch, T positions of the grid (1 for pooled text), D width of the encoder.
"""

import hashlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer

import raytrain2p.models.efficientnet_lite  # noqa: F401 - registers it with AutoModel
from raytrain2p.config import InputError, Problem
from raytrain2p.models.pretrained import fingerprint, model_directory

FEATURE_DTYPE = torch.float16  # of stored and online features, so that both give equal results
OUTPUT_FORM = 1  # part of the fingerprint: raise it when the same encoder gives different vectors


class ImageEncoder:
    """Images to grids of vectors (B, T, D), without class or register tokens.

    Args:
        name: model setting (hub ID, directory or packaged name).
        image_size: side in pixels; None takes the model's own.
        device: of the model (default: a GPU if this process has one); it moves to the device of the pixels.

    Raises:
        InputError: transformers cannot load it as a vision encoder.
    """

    config_part = "vision_config"  # of a model with several encoders, as CLIP is
    sample = Image.new("RGB", (64, 64))

    def __init__(self, name: str, image_size: int | None = None, device: str | None = None) -> None:
        directory = model_directory(name, "model.image_encoder")
        self.fingerprint = self.fingerprint_of(directory, image_size)
        self.device = torch.device(device or default_device())
        model = _load(directory, name, "model.image_encoder")
        model = getattr(model, "vision_model", model)  # of a CLIP or SigLIP, which also has a text encoder
        self.model = model.eval().requires_grad_(False).to(self.device)
        try:
            self.processor = AutoImageProcessor.from_pretrained(directory, backend="pil")
        except (OSError, ValueError, KeyError) as error:
            raise InputError(Problem(f"model.image_encoder={name}", f"has no image processor: {_first_line(error)}")) from None
        self.options: dict[str, Any] = {}
        if image_size is not None:
            square = {"height": image_size, "width": image_size}
            by_edge = getattr(self.processor.size, "height", None) is None and not getattr(self.processor, "do_center_crop", False)
            self.processor.size = {"shortest_edge": image_size} if by_edge else square
            if getattr(self.processor, "do_center_crop", False):
                self.processor.crop_size = square
            if "interpolate_pos_encoding" in inspect.signature(self.model.forward).parameters:
                self.options["interpolate_pos_encoding"] = True

    @staticmethod
    def fingerprint_of(directory: Path, image_size: int | None) -> str:
        """Of the encoder, its preprocessing and the form of its output: what stored features depend on."""
        return hashlib.sha256(f"image:{fingerprint(directory)}:{image_size}:{OUTPUT_FORM}".encode()).hexdigest()

    def preprocess(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Pixel values (B, 3, height, width), float32."""
        return self.processor(images=list(images), return_tensors="pt")["pixel_values"]

    @torch.inference_mode()
    def encode_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """Features (B, T, D), float16, on the device of the pixels."""
        if pixels.device != self.device:
            self.device = pixels.device
            self.model.to(self.device)
        with torch.autocast(self.device.type, enabled=False):  # whatever the precision of the step
            pixels = pixels.to(memory_format=torch.channels_last)
            hidden = self.model(pixel_values=pixels, **self.options).last_hidden_state
        if hidden.ndim == 4:  # a convolutional network's (B, D, height, width)
            hidden = hidden.flatten(2).transpose(1, 2)
        patch = getattr(self.model.config, "patch_size", None)
        if isinstance(patch, int):
            hidden = hidden[:, -(pixels.shape[-2] // patch) * (pixels.shape[-1] // patch) :]
        return hidden.to(FEATURE_DTYPE)

    def __call__(self, images: Sequence[Image.Image]) -> torch.Tensor:
        return self.encode_pixels(self.preprocess(images).to(self.device))


class TextEncoder:
    """Texts to one mean-pooled vector each, (B, 1, D), as sentence-transformers pools them.

    Raises:
        InputError: transformers cannot load it.
    """

    config_part = "text_config"
    sample = "word"

    def __init__(self, name: str, device: str | None = None) -> None:
        directory = model_directory(name, "model.text_encoder")
        self.fingerprint = self.fingerprint_of(directory, None)
        self.device = torch.device(device or default_device())
        model = _load(directory, name, "model.text_encoder")
        model = getattr(model, "text_model", model)
        self.model = model.eval().requires_grad_(False).to(self.device)
        self.tokenizer = AutoTokenizer.from_pretrained(directory)

    @staticmethod
    def fingerprint_of(directory: Path, image_size: int | None) -> str:
        return hashlib.sha256(f"text:{fingerprint(directory)}:mean:{OUTPUT_FORM}".encode()).hexdigest()

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        limit = min(self.tokenizer.model_max_length, self.model.config.max_position_embeddings)
        tokens = self.tokenizer(list(texts), padding=True, truncation=True, max_length=limit, return_tensors="pt").to(self.device)
        hidden = self.model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1)
        return ((hidden * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)).to(FEATURE_DTYPE)


ENCODERS: dict[str, type[ImageEncoder] | type[TextEncoder]] = {"image": ImageEncoder, "text": TextEncoder}


@dataclass(frozen=True)
class EncoderSpec:
    """The choice of a frozen encoder for one modality; `image_size` is for images alone."""

    modality: str
    name: str
    image_size: int | None = None

    @property
    def role(self) -> str:
        """As settings and artifacts name it."""
        return f"{self.modality}_encoder"

    @property
    def setting(self) -> str:
        return f"model.{self.role}"

    def directory(self) -> Path:
        return model_directory(self.name, self.setting)

    def fingerprint(self) -> str:
        """Of the features that the encoder gives."""
        return ENCODERS[self.modality].fingerprint_of(self.directory(), self.image_size)

    def build(self) -> ImageEncoder | TextEncoder:
        options: dict[str, Any] = {"image_size": self.image_size} if self.image_size is not None else {}
        return ENCODERS[self.modality](self.name, **options)

    def probe(self) -> int:
        """T, from encoding one sample: this shows what is wrong with an encoder.

        Raises:
            InputError: transformers cannot load it, or it does not encode this modality.
        """
        try:
            encoder: Any = self.build()
            return int(encoder([encoder.sample]).shape[1])
        except InputError:
            raise
        except Exception as error:  # a foreign model's own code: it may raise anything
            what = f"does not encode {self.modality}s: {type(error).__name__}: {_first_line(error)}"
            raise InputError(Problem(f"{self.setting}={self.name}", what, "take another encoder")) from None

    def width(self) -> int:
        """D, from the model's configuration alone.

        Raises:
            InputError: no such model, or transformers does not support its configuration.
        """
        where, directory = f"{self.setting}={self.name}", self.directory()
        try:
            config = AutoConfig.from_pretrained(directory)
        except (OSError, ValueError, KeyError) as error:
            raise InputError(Problem(where, f"transformers cannot read its configuration: {_first_line(error)}")) from None
        part = getattr(config, ENCODERS[self.modality].config_part, None) or config
        sizes = getattr(part, "hidden_sizes", None)  # convolutional networks list one width per stage
        width = sizes[-1] if sizes else getattr(part, "hidden_size", None) or getattr(part, "hidden_dim", None)
        if width is None:
            raise InputError(Problem(where, "its configuration has no hidden_size", "take another encoder"))
        return int(width)


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _load(directory: Path, name: str, setting: str) -> Any:
    try:
        return AutoModel.from_pretrained(directory, dtype=torch.float32)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(Problem(f"{setting}={name}", f"transformers cannot load it: {_first_line(error)}")) from None


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
