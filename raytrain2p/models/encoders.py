"""Frozen encoders: a name, a preprocessing, a fingerprint and a grid of vectors for each item.

Shape letters: B items in a batch, T positions of the grid (1 for pooled text), D width of the encoder.
"""

import hashlib
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer

import raytrain2p.models.efficientnet_lite  # noqa: F401 - so that AutoModel knows it
from raytrain2p.config import InputError, Problem
from raytrain2p.models.pretrained import fingerprint, model_directory

FEATURE_DTYPE = torch.float16  # stored and online features alike, so that both give equal results
OUTPUT_FORM = 1  # part of the fingerprint: raise it when the same encoder gives other vectors


class ImageEncoder:
    """Images to grids of vectors (B, T, D), without class or register tokens.

    Args:
        name: model setting (hub ID, directory or packaged name).
        image_size: side in pixels; None takes the model's own.
        device: where the model runs (default: a GPU if this process has one); pixels on another device take it along.

    Raises:
        InputError: transformers cannot load it as a vision encoder.
    """

    def __init__(self, name: str, image_size: int | None = None, device: str | None = None) -> None:
        directory = model_directory(name, "model.image_encoder")
        self.fingerprint = image_fingerprint(directory, image_size)
        self.device = torch.device(device or default_device())
        model = _load(directory, name, "model.image_encoder")
        model = getattr(model, "vision_model", model)  # the image half of a CLIP or SigLIP
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

    def preprocess(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Pixel values (B, 3, height, width), float32."""
        return self.processor(images=list(images), return_tensors="pt")["pixel_values"]

    @torch.inference_mode()
    def encode_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """Features (B, T, D), float16, on the device of the pixels."""
        if pixels.device != self.device:
            self.device = pixels.device
            self.model.to(self.device)
        with torch.autocast(self.device.type, enabled=False):  # the step's precision is not the encoder's
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

    def __init__(self, name: str, device: str | None = None) -> None:
        directory = model_directory(name, "model.text_encoder")
        self.fingerprint = text_fingerprint(directory)
        self.device = torch.device(device or default_device())
        model = _load(directory, name, "model.text_encoder")
        model = getattr(model, "text_model", model)
        self.model = model.eval().requires_grad_(False).to(self.device)
        self.tokenizer = AutoTokenizer.from_pretrained(directory)

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        limit = min(self.tokenizer.model_max_length, self.model.config.max_position_embeddings)
        tokens = self.tokenizer(list(texts), padding=True, truncation=True, max_length=limit, return_tensors="pt").to(self.device)
        hidden = self.model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1)
        return ((hidden * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)).to(FEATURE_DTYPE)


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def probe_image_encoder(name: str, image_size: int | None) -> int:
    """T of an image encoder, by encoding one blank image: what is wrong with an encoder shows then.

    Raises:
        InputError: transformers cannot load it, or it does not encode images.
    """
    with _told(f"model.image_encoder={name}", "does not encode images"):
        return int(ImageEncoder(name, image_size)([Image.new("RGB", (64, 64))]).shape[1])


def probe_text_encoder(name: str) -> None:
    """Encode one word.

    Raises:
        InputError: transformers cannot load it, or it does not encode texts.
    """
    with _told(f"model.text_encoder={name}", "does not encode texts"):
        TextEncoder(name)(["word"])


@contextmanager
def _told(where: str, what: str) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # a foreign model's own code: anything may come out of it
        raise InputError(Problem(where, f"{what}: {type(error).__name__}: {_first_line(error)}", "take another encoder")) from None


def image_fingerprint(directory: Path, image_size: int | None) -> str:
    """The encoder, its preprocessing and the form of its output: what stored features depend on."""
    return hashlib.sha256(f"image:{fingerprint(directory)}:{image_size}:{OUTPUT_FORM}".encode()).hexdigest()


def text_fingerprint(directory: Path) -> str:
    return hashlib.sha256(f"text:{fingerprint(directory)}:mean:{OUTPUT_FORM}".encode()).hexdigest()


def encoder_width(name: str, setting: str) -> int:
    """D of an encoder, read from its configuration alone.

    Raises:
        InputError: no such model, or its configuration is not one that transformers knows.
    """
    directory = model_directory(name, setting)
    try:
        config = AutoConfig.from_pretrained(directory)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(Problem(f"{setting}={name}", f"transformers cannot read its configuration: {_first_line(error)}")) from None
    part = getattr(config, "vision_config" if "image" in setting else "text_config", None) or config
    sizes = getattr(part, "hidden_sizes", None)  # convolutional networks list one width per stage
    width = sizes[-1] if sizes else getattr(part, "hidden_size", None) or getattr(part, "hidden_dim", None)
    if width is None:
        raise InputError(Problem(f"{setting}={name}", "its configuration has no hidden_size", "take another encoder"))
    return int(width)


def _load(directory: Path, name: str, setting: str) -> Any:
    try:
        return AutoModel.from_pretrained(directory, dtype=torch.float32)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(Problem(f"{setting}={name}", f"transformers cannot load it: {_first_line(error)}")) from None


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
