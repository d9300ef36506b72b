"""Frozen encoders of images: grids of vectors."""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoImageProcessor

import raytrain2p.models.efficientnet_lite  # noqa: F401 - registers it with AutoModel
from raytrain2p.models.frozen_encoder import FrozenEncoder


class ImageEncoder(FrozenEncoder):
    """Images to grids of vectors, row by row, without class or register tokens.

    Option `size`: side in pixels; the model's own if not given.
    """

    modality = "image"
    output_form = 3
    square = True
    sample = Image.new("RGB", (64, 64))
    config_part = "vision_config"

    @staticmethod
    def encoder_of(model: Any) -> Any:
        return getattr(model, "vision_model", model)  # of a CLIP or SigLIP, which also has a text encoder

    def load_preprocessing(self, directory: Path) -> None:
        self.processor = AutoImageProcessor.from_pretrained(directory, backend="pil", trust_remote_code=False)
        if size := self.options.get("size"):
            square = {"height": size, "width": size}
            by_edge = getattr(self.processor.size, "height", None) is None and not getattr(self.processor, "do_center_crop", False)
            self.processor.size = {"shortest_edge": size} if by_edge else square
            if getattr(self.processor, "do_center_crop", False):
                self.processor.crop_size = square

    @property
    def arguments(self) -> dict[str, Any]:
        """Of the model, for images of another size than it was trained on."""
        argument = "interpolate_pos_encoding"
        return {argument: True} if self.options.get("size") and argument in inspect.signature(self.model.forward).parameters else {}

    def preprocess(self, items: Sequence[Image.Image]) -> list[torch.Tensor]:
        """Pixel values, (3, height, width) each, float32."""
        return [self.processor(images=image, return_tensors="pt")["pixel_values"][0] for image in items]

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        hidden = self.model(pixel_values=batch.to(memory_format=torch.channels_last), **self.arguments).last_hidden_state
        if hidden.ndim == 4:  # a convolutional network's (B, D, height, width)
            hidden = hidden.flatten(2).transpose(1, 2)
        patch = getattr(self.model.config, "patch_size", None)
        if isinstance(patch, int):
            hidden = hidden[:, -(batch.shape[-2] // patch) * (batch.shape[-1] // patch) :]
        return hidden
