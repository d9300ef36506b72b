"""Encoders within the step, beside a module on another device. The meta device stands for a GPU: only a batch that is on it fits it."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from raytrain2p.data.batches import Ragged
from raytrain2p.data.media import MediaRef
from raytrain2p.models.encoders import EncoderSpec
from raytrain2p.models.frozen_encoder import FrozenEncoder
from raytrain2p.phases.inputs import MediaTable
from raytrain2p.phases.online import OnlineEncoders

DEVICE = torch.device("meta")


def encoders_of(tiny_vit: Path) -> OnlineEncoders:
    return OnlineEncoders({"image": EncoderSpec("image", str(tiny_vit))})


def test_features_are_on_the_device_of_the_module_though_the_encoder_was_built_before_the_module_moved(
    tiny_vit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # as it is, without autocast, which the meta device does not have
    monkeypatch.setattr(FrozenEncoder, "encode", lambda self, inputs: list(self.forward(torch.stack(inputs).to(self.device))))
    online = encoders_of(tiny_vit)
    table = MediaTable(Ragged([[0]]), (MediaRef("image", "a.png", None, ""),))
    preprocess = online.preprocess({"image": table})["image"]
    loaded = [one.to(DEVICE) for one in preprocess([Image.new("RGB", (32, 32)), Image.new("RGB", (9, 9))])]
    values, positions = online.features({"image": loaded}, DEVICE)["image"]
    assert (values.device, values.shape, positions) == (DEVICE, (2, 16, 32), None)


def test_a_batch_without_items_has_empty_features_on_the_device_of_the_module(tiny_vit: Path) -> None:
    values, _ = encoders_of(tiny_vit).features({"image": []}, DEVICE)["image"]
    assert values.device == DEVICE
    assert not len(values)


def test_under_autocast_features_are_those_of_the_store(tiny_vit: Path) -> None:
    """On a CPU autocast to bf16 takes no float16, which features are."""
    online, cpu = encoders_of(tiny_vit), torch.device("cpu")
    pixels = list(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        values, _ = online.features({"image": pixels}, cpu)["image"]
    assert torch.equal(values, torch.stack(online.of("image").encode(pixels)))
