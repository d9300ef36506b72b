"""Frozen encoders of sound, with random weights: the features are those of the clip alone, and as long as it is."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperModel,
)

from raytrain2p.config import InputError
from raytrain2p.data.media import Clip
from raytrain2p.models.audio_encoder import AudioEncoder, pad_with_silence, resample
from raytrain2p.models.encoders import EncoderSpec

WIDTH = 24
KINDS = ("whisper", "wav2vec2")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a small model of a kind."""
    torch.manual_seed(3)
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    layers = {"encoder_layers": 2, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    tokens = {"vocab_size": 50} | dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 0)
    whisper = WhisperModel(WhisperConfig(d_model=WIDTH, **layers, **heads, **tokens))
    for convolution in (whisper.encoder.conv1, whisper.encoder.conv2):
        convolution.weight.data *= 20  # beside the positions, random weights of the usual size let little of the sound through
    whisper.save_pretrained(folders["whisper"])
    WhisperFeatureExtractor().save_pretrained(folders["whisper"])
    shape = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    convolutions = {"conv_dim": (8,) * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}
    Wav2Vec2Model(Wav2Vec2Config(**shape, **convolutions)).save_pretrained(folders["wav2vec2"])
    Wav2Vec2FeatureExtractor().save_pretrained(folders["wav2vec2"])
    return folders.__getitem__


def encoder(directory: Path, **options: Any) -> AudioEncoder:
    return AudioEncoder(directory, f"model.encoders.audio.name={directory}", options)


def clip(seconds: float, rate: int = 16000, seed: int = 0) -> Clip:
    """A tone in noise."""
    times = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(seed).normal(0, 0.05, len(times))
    return Clip((0.3 * np.sin(2 * np.pi * (200 + 100 * seed) * times) + noise).astype(np.float32), rate)


@pytest.mark.parametrize("kind", KINDS)
def test_in_bf16_features_are_those_of_float32_but_for_rounding(kind: str, saved: Callable[[str], Path]) -> None:
    found, exact = (encoder(saved(kind), **options)([clip(0.5)])[0].float() for options in ({"precision": "bf16"}, {}))
    assert 0 < (found - exact).norm() / exact.norm() < 0.03


@pytest.mark.parametrize("kind", KINDS)
def test_features_have_the_models_width_and_twenty_milliseconds_a_position(kind: str, saved: Callable[[str], Path]) -> None:
    (features,) = encoder(saved(kind))([clip(1.3)])
    assert features.shape == ({"whisper": 65, "wav2vec2": 64}[kind], WIDTH)
    assert features.dtype == torch.float16
    assert features.isfinite().all()
    spec = EncoderSpec("audio", str(saved(kind)))
    assert spec.width() == WIDTH
    assert spec.probe() == {"whisper": 25, "wav2vec2": 24}[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_a_clips_features_do_not_depend_on_the_other_clips(kind: str, saved: Callable[[str], Path]) -> None:
    model = encoder(saved(kind))
    clips = [clip(0.7), clip(2.0, seed=1), clip(0.7, seed=2), clip(0.65, seed=3)]
    together = model(clips)
    for one, features in zip(clips, together, strict=True):
        torch.testing.assert_close(features, model([one])[0], atol=2e-3, rtol=2e-3)
    assert not torch.allclose(together[0], together[2], atol=1e-1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rate", [8000, 16000, 44100, 48000])
@pytest.mark.parametrize("seconds", [0.001, 0.05, 0.21])
def test_clips_of_any_rate_may_be_very_short(kind: str, rate: int, seconds: float, saved: Callable[[str], Path]) -> None:
    (features,) = encoder(saved(kind))([clip(seconds, rate)])
    assert features.isfinite().all()
    assert 4 <= len(features) <= 11  # at least those of 0.1 s


def test_whisper_pads_no_longer_than_needed_and_gives_what_it_gives_for_thirty_seconds(saved: Callable[[str], Path]) -> None:
    """A clip of 30 seconds has all positions: nothing may differ from transformers' own call."""
    model = encoder(saved("whisper"))
    long = clip(30.0)
    inputs = model.processor(long.samples, sampling_rate=16000, return_tensors="pt")
    with torch.inference_mode():
        expected = WhisperModel.from_pretrained(saved("whisper")).eval().encoder(**inputs).last_hidden_state[0]
    (features,) = model([long])
    assert features.shape == (1500, WIDTH)
    torch.testing.assert_close(features.float(), expected, atol=2e-3, rtol=2e-3)
    assert model.model.config.max_source_positions == 1500
    assert model.model.embed_positions.num_embeddings == 1500


@pytest.mark.parametrize("samples", [clip(0.65).samples, np.zeros(10400, np.float32)], ids=["sound", "silence"])
def test_two_seconds_of_silence_follow_a_clip(samples: np.ndarray, saved: Callable[[str], Path]) -> None:
    """Whisper's frames are those of the same clip followed by zeros, but for the two at its end, which overlap both."""
    model = encoder(saved("whisper"))
    (frames,) = model.preprocess([Clip(samples, 16000)])
    padded = pad_with_silence(frames, 3000)
    (followed,) = model.preprocess([Clip(np.pad(samples, (0, 34400)), 16000)])
    assert padded.shape == followed.shape == (80, 280)  # 2.65 s, and up to a multiple of 0.2 s
    torch.testing.assert_close(padded[:, 67:], followed[:, 67:])
    assert pad_with_silence(frames, 100).shape == (80, 100)
    assert len(model([Clip(samples, 16000)])[0]) == 33  # without positions of padding alone


@pytest.mark.parametrize("rate", [8000, 48000])
def test_a_tone_keeps_its_pitch_and_length_when_resampled(rate: int) -> None:
    times = np.arange(rate) / rate
    samples = resample(np.sin(2 * np.pi * 440 * times).astype(np.float32), rate, 16000)
    assert samples.dtype == np.float32
    assert len(samples) == 16000
    spectrum = np.abs(np.fft.rfft(samples))
    assert spectrum.argmax() == 440
    assert math.isclose(float(np.abs(samples[1000:-1000]).max()), 1.0, abs_tol=0.02)


def test_a_clip_longer_than_the_model_takes_is_refused_with_both_numbers(saved: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match=r"lasts 30\.50 s, the longest that the encoder takes is 30 s"):
        encoder(saved("whisper")).preprocess([clip(30.5, 8000)])
    encoder(saved("wav2vec2")).check(clip(30.5))
    with pytest.raises(ValueError, match=r"lasts 30\.50 s"):
        AudioEncoder.item_check(saved("whisper"))(clip(30.5))


@pytest.mark.parametrize("kind", KINDS)
def test_neighbouring_positions_are_averaged_if_so_set(kind: str, saved: Callable[[str], Path]) -> None:
    (every,) = encoder(saved(kind))([clip(0.37)])
    (pooled,) = encoder(saved(kind), pool=4)([clip(0.37)])
    whole = len(every) // 4 * 4
    assert len(pooled) == -(-len(every) // 4)
    torch.testing.assert_close(pooled[: whole // 4], every[:whole].float().view(-1, 4, every.shape[1]).mean(1).half())
    torch.testing.assert_close(pooled[-1], every[(len(every) - 1) // 4 * 4 :].float().mean(0).half())


def test_a_model_without_a_feature_extractor_is_refused_by_its_setting(tiny_bert: Path) -> None:
    with pytest.raises(InputError, match=r"model\.encoders\.audio\.name=.*\s.*has no preprocessing for audio"):
        EncoderSpec("audio", str(tiny_bert)).build()
