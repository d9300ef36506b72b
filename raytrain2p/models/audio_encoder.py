"""Frozen encoders of sound: a sequence of vectors, as long as the clip."""

import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoFeatureExtractor
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from raytrain2p.models.frozen_encoder import FrozenEncoder

SHORTEST = 0.1  # seconds; shorter clips are filled up with silence, because a convolution needs some samples
WHISPER_FRAMES = 20  # clips are padded to a multiple, 0.2 s, so that more of them have equal lengths and run together
WHISPER_SILENCE = 200  # frames after each clip, 2 s: in training, silence followed what was said; without it the end is encoded worse
WHISPER_STRIDE = 2  # frames per position
WHISPER_RANGE, WHISPER_LOWEST = 2.0, -1.5  # WhisperFeatureExtractor: a value is at most 2 below the clip's largest; that of zeros


class AudioEncoder(FrozenEncoder):
    """Clips (with `samples`, float32 in one channel, and `rate`) to sequences of vectors: Whisper's encoder, wav2vec 2.0, HuBERT, ….

    transformers pads each clip to 30 seconds for Whisper. Here the model hears the clip and two seconds of silence, and the sequence is
    as long as the clip: it has the first of the model's positions.

    Option `pool`: neighbouring positions that are averaged into one.
    """

    modality = "audio"
    output_form = 3
    sample = SimpleNamespace(samples=np.zeros(8000, np.float32), rate=16000)
    config_part = "audio_config"

    @staticmethod
    def encoder_of(model: Any) -> Any:
        return model.get_encoder() if model.config.is_encoder_decoder else model

    def load_preprocessing(self, directory: Path) -> None:
        self.processor = AutoFeatureExtractor.from_pretrained(directory, trust_remote_code=False)
        self.check = length_check(self.processor)

    @classmethod
    def item_check(cls, directory: Path) -> Callable[[Any], None]:
        return length_check(AutoFeatureExtractor.from_pretrained(directory, trust_remote_code=False))

    def preprocess(self, items: Sequence[Any]) -> list[torch.Tensor]:
        """What the feature extractor makes of each: (bands, frames), or (samples,).

        Raises:
            ValueError: a clip is too long.
        """
        for clip in items:
            self.check(clip)
        return [self._preprocess(clip.samples, clip.rate) for clip in items]

    def _preprocess(self, samples: np.ndarray, rate: int) -> torch.Tensor:
        samples = resample(samples, rate, self.processor.sampling_rate)
        missing = int(SHORTEST * self.processor.sampling_rate) - len(samples)
        samples = np.pad(samples, (0, max(missing, 0)))
        # One by one: a feature extractor would pad all to the longest, or mask them in a way that not every model follows.
        inputs = self.processor(samples, sampling_rate=self.processor.sampling_rate, padding="longest", return_tensors="pt")
        return inputs[self.processor.model_input_names[0]][0]

    def encode(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        if isinstance(self.model, WhisperEncoder):
            longest = self.model.config.max_source_positions * WHISPER_STRIDE
            features = super().encode([pad_with_silence(mel, longest) for mel in inputs])
            features = [of_clip[: -(-mel.shape[-1] // WHISPER_STRIDE)] for mel, of_clip in zip(inputs, features, strict=True)]
        else:
            features = super().encode(inputs)
        return [averaged(of_clip, pool) for of_clip in features] if (pool := self.options.get("pool")) else features

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        model = self.model
        if isinstance(model, WhisperEncoder):
            model = _with_first_positions(model, batch.shape[-1] // WHISPER_STRIDE)
        return model(batch).last_hidden_state


def length_check(extractor: Any) -> Callable[[Any], None]:
    """What refuses clips that are longer than the extractor's encoder takes: Whisper has absolute positions, wav2vec 2.0 has none."""
    longest = getattr(extractor, "chunk_length", None)  # seconds

    def check(clip: Any) -> None:
        if longest is not None and len(clip.samples) > longest * clip.rate:
            raise ValueError(f"lasts {len(clip.samples) / clip.rate:.2f} s, the longest that the encoder takes is {longest:g} s")

    return check


def resample(samples: np.ndarray, rate: int, target: int) -> np.ndarray:
    """The same sound at another number of samples per second (scipy's polyphase filter)."""
    if rate == target:
        return samples
    from scipy.signal import resample_poly  # takes half a second to import

    common = math.gcd(rate, target)
    return resample_poly(samples, target // common, rate // common).astype(np.float32, copy=False)


def averaged(features: torch.Tensor, size: int) -> torch.Tensor:
    """Means of each `size` positions, and of the rest: (T, D) to (ceil(T / size), D)."""
    return torch.stack([part.float().mean(0) for part in features.split(size)]).to(features.dtype)


def pad_with_silence(mel: torch.Tensor, longest: int) -> torch.Tensor:
    """Whisper's frames (bands, frames), as if the clip were followed by silence, `longest` at most."""
    value = max(float(mel.max()) - WHISPER_RANGE, WHISPER_LOWEST)
    frames = mel.shape[-1] + WHISPER_SILENCE
    return F.pad(mel, (0, min(frames + -frames % WHISPER_FRAMES, longest) - mel.shape[-1]), value=value)


def _with_first_positions(encoder: WhisperEncoder, positions: int) -> WhisperEncoder:
    """The same encoder with its first positions alone; the weights are shared. WhisperEncoder.forward refuses shorter inputs."""
    short = copy.copy(encoder)
    short.config = copy.copy(encoder.config)
    short.config.max_source_positions = positions
    first = nn.Embedding.from_pretrained(encoder.embed_positions.weight[:positions])
    short._modules = {**encoder._modules, "embed_positions": first}
    return short
