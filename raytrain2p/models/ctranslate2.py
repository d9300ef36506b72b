"""Whisper weights as CTranslate2 stores them (`model.bin`): read, and renamed to those of transformers.

The format (version 6), little endian, as `ModelSpec._serialize` of CTranslate2 writes it (python/ctranslate2/specs/model_spec.py):
a version; a string with the model's kind; its revision; the number of variables; then for each its name, rank, dimensions, type,
number of bytes and content. A string has its length before it and a zero byte at its end.
"""

import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

VERSION = 6
TYPES = (np.float32, np.int8, np.int16, np.int32, np.float16)

NAMES: dict[str, str | Callable[[re.Match[str]], str]] = {
    r"layer_(\d+)/": r"layers.\1.",
    r"ffn/layer_norm/": "final_layer_norm.",
    r"ffn/linear_0/": "fc1.",
    r"ffn/linear_1/": "fc2.",
    r"(self_)?attention/layer_norm/": lambda found: f"{found[1] or 'encoder_'}attn_layer_norm.",
    r"(self_)?attention/linear_(\d)/": lambda found: f"{found[1] or 'encoder_'}attn.linear_{found[2]}.",
    r"position_encodings/encodings": "embed_positions.weight",
    r"embeddings/": "embed_tokens.",
    r"gamma$": "weight",
    r"beta$": "bias",
    r"/": ".",
}
# What a linear layer of CTranslate2 holds: it joins those that have the same input.
JOINED = {
    "self_attn.linear_0": ("q_proj", "k_proj", "v_proj"),
    "self_attn.linear_1": ("out_proj",),
    "encoder_attn.linear_0": ("q_proj",),
    "encoder_attn.linear_1": ("k_proj", "v_proj"),
    "encoder_attn.linear_2": ("out_proj",),
}


def read_variables(path: Path) -> dict[str, np.ndarray]:
    """The variables of a model file by name.

    Raises:
        ValueError: another version of the format.
    """
    with path.open("rb") as stream:
        version = _numbers(stream, "I")[0]
        if version != VERSION:
            raise ValueError(f"{path} has version {version} of the CTranslate2 format, required is {VERSION}")
        _string(stream)
        _revision, count = _numbers(stream, "II")
        return dict(_variable(stream) for _ in range(count))


def _variable(stream: BinaryIO) -> tuple[str, np.ndarray]:
    name = _string(stream)
    shape = _numbers(stream, f"{_numbers(stream, 'B')[0]}I")
    kind, size = _numbers(stream, "BI")
    return name, np.frombuffer(bytearray(stream.read(size)), TYPES[kind]).reshape(shape)


def _string(stream: BinaryIO) -> str:
    return stream.read(_numbers(stream, "H")[0]).rstrip(b"\0").decode()


def _numbers(stream: BinaryIO, layout: str) -> tuple[Any, ...]:
    return struct.unpack(f"<{layout}", stream.read(struct.calcsize(f"<{layout}")))


def whisper_state(variables: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """The state dict of a WhisperModel. Variables without dimensions are settings, and left out."""
    state = {}
    for name, value in variables.items():
        if not value.ndim:
            continue
        for pattern, replacement in NAMES.items():
            name = re.sub(pattern, replacement, name)
        owner, _, kind = name.rpartition(".")
        parts = next((parts for joined, parts in JOINED.items() if owner.endswith(joined)), None)
        if parts is None:
            state[name] = torch.from_numpy(value)
            continue
        for part, piece in zip(parts, torch.from_numpy(value).chunk(len(parts)), strict=True):
            if (part, kind) != ("k_proj", "bias"):  # zeros: Whisper has none
                state[f"{owner.rpartition('.')[0]}.{part}.{kind}"] = piece
    return state
