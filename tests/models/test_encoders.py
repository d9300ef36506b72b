"""Frozen encoders of several kinds, with random weights, as they come from disk."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoTokenizer,
    BertModel,
    BitImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    ConvNextConfig,
    ConvNextImageProcessorPil,
    ConvNextModel,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    ResNetConfig,
    ResNetModel,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTModel,
)

from raytrain2p.config import InputError
from raytrain2p.models.encoders import ENCODERS, EncoderSpec
from raytrain2p.models.image_encoder import ImageEncoder
from raytrain2p.models.text_encoder import TextEncoder

LAYERS = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
VISION = LAYERS | {"image_size": 32, "patch_size": 8}
TEXT = LAYERS | {"vocab_size": 300, "hidden_size": 16, "max_position_embeddings": 20}
CROP = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
SQUARE = {"size": {"height": 32, "width": 32}}


def save_clip_vision(folder: Path) -> None:
    CLIPVisionModel(CLIPVisionConfig(**VISION)).save_pretrained(folder)
    CLIPImageProcessorPil(**CROP).save_pretrained(folder)


def save_clip(folder: Path) -> None:
    CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=12)).save_pretrained(folder)
    CLIPImageProcessorPil(**CROP).save_pretrained(folder)


def save_siglip_vision(folder: Path) -> None:
    SiglipVisionModel(SiglipVisionConfig(**VISION)).save_pretrained(folder)
    SiglipImageProcessorPil(**SQUARE).save_pretrained(folder)


def save_siglip(folder: Path) -> None:
    SiglipModel(SiglipConfig(text_config=TEXT | {"hidden_size": 24}, vision_config=VISION)).save_pretrained(folder)
    SiglipImageProcessorPil(**SQUARE).save_pretrained(folder)


def save_dinov2_with_registers(folder: Path) -> None:
    Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**VISION, num_register_tokens=3)).save_pretrained(folder)
    BitImageProcessorPil(**CROP).save_pretrained(folder)


def save_convnext(folder: Path) -> None:
    ConvNextModel(ConvNextConfig(hidden_sizes=[8, 12, 16, 24], depths=[1, 1, 1, 1])).save_pretrained(folder)
    ConvNextImageProcessorPil(size={"shortest_edge": 128}, crop_pct=1.0).save_pretrained(folder)


def save_resnet(folder: Path) -> None:
    shape = {"embedding_size": 8, "hidden_sizes": [8, 12, 16, 24], "depths": [1, 1, 1, 1], "layer_type": "basic"}
    ResNetModel(ResNetConfig(**shape)).save_pretrained(folder)
    ConvNextImageProcessorPil(size={"shortest_edge": 128}, crop_pct=1.0).save_pretrained(folder)


KINDS = {
    "clip_vision": save_clip_vision,
    "clip": save_clip,
    "siglip_vision": save_siglip_vision,
    "siglip": save_siglip,
    "dinov2_with_registers": save_dinov2_with_registers,
    "convnext": save_convnext,
    "resnet": save_resnet,
}


def image_encoder(directory: str | Path, size: int | None = None) -> ImageEncoder:
    return ImageEncoder(Path(directory), f"model.encoders.image.name={directory}", {"size": size})


def text_encoder(directory: str | Path, **options: Any) -> TextEncoder:
    return TextEncoder(Path(directory), f"model.encoders.text.name={directory}", options)


def shapes(tensors: Sequence[torch.Tensor]) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape) for tensor in tensors]


def images(count: int = 2) -> list[Image.Image]:
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (40, 50, 3), np.uint8)) for _ in range(count)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """The directory of a small model of a kind."""
    made: dict[str, Path] = {}

    def directory(kind: str) -> str:
        if kind not in made:
            torch.manual_seed(5)
            made[kind] = tmp_path_factory.mktemp(kind)
            KINDS[kind](made[kind])
        return str(made[kind])

    return directory


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_vision_model_gives_a_grid_of_its_width(kind: str, saved: Callable[[str], str]) -> None:
    features = image_encoder(saved(kind))(images())
    assert shapes(features) == [(16, 24)] * 2
    assert all(grid.dtype == torch.float16 and grid.isfinite().all() for grid in features)
    assert EncoderSpec("image", saved(kind)).width() == 24


@pytest.mark.parametrize("kind", ["clip_vision", "clip", "siglip_vision", "siglip", "dinov2_with_registers"])
def test_a_grid_twice_as_fine_comes_of_an_image_twice_as_large(kind: str, saved: Callable[[str], str]) -> None:
    assert shapes(image_encoder(saved(kind), 64)(images())) == [(64, 24)] * 2


@pytest.mark.parametrize("kind", ["convnext", "resnet"])
def test_a_convolutional_network_takes_another_image_size(kind: str, saved: Callable[[str], str]) -> None:
    encoder = image_encoder(saved(kind), 64)
    assert shapes(encoder.preprocess(images())) == [(3, 64, 64)] * 2
    assert shapes(encoder(images())) == [(4, 24)] * 2


def test_a_vit_gives_its_patches_without_the_class_token(tiny_vit: Path) -> None:
    encoder = image_encoder(tiny_vit)
    features = encoder(images())
    assert shapes(features) == [(16, 32)] * 2
    with torch.inference_mode():
        whole = ViTModel.from_pretrained(tiny_vit).eval()(torch.stack(encoder.preprocess(images()))).last_hidden_state
    torch.testing.assert_close(torch.stack(features).float(), whole[:, 1:], atol=2e-3, rtol=2e-3)


def test_a_vit_takes_another_image_size(tiny_vit: Path) -> None:
    encoder = image_encoder(tiny_vit, 48)
    assert shapes(encoder.preprocess(images())) == [(3, 48, 48)] * 2
    assert shapes(encoder(images())) == [(36, 32)] * 2


def test_the_vits_own_image_size_given_by_hand_changes_nothing(tiny_vit: Path) -> None:
    own, given = image_encoder(tiny_vit)(images()), image_encoder(tiny_vit, 32)(images())
    torch.testing.assert_close(own, given, atol=2e-3, rtol=2e-3)


def test_the_halves_of_a_clip_are_encoders_of_their_own(saved: Callable[[str], str], tmp_path: Path) -> None:
    """The image half of a whole CLIP gives what the same half saved alone gives."""
    whole = CLIPModel.from_pretrained(saved("clip"))
    alone = CLIPVisionModel(CLIPVisionConfig(**VISION))
    states = {key.removeprefix("vision_model."): value for key, value in whole.state_dict().items() if key.startswith("vision_model.")}
    prefix = "vision_model." if any(key.startswith("vision_model.") for key in alone.state_dict()) else ""
    alone.load_state_dict({prefix + key: value for key, value in states.items()})
    alone.save_pretrained(tmp_path)
    CLIPImageProcessorPil(**CROP).save_pretrained(tmp_path)
    torch.testing.assert_close(image_encoder(saved("clip"))(images()), image_encoder(tmp_path)(images()))


def test_encoding_does_not_depend_on_the_precision_of_the_step(tiny_vit: Path) -> None:
    """Stored and online features are the same, though online encoding happens under autocast."""
    encoder = image_encoder(tiny_vit)
    with torch.autocast("cpu", torch.bfloat16):
        inside = encoder(images())
    assert all(map(torch.equal, inside, encoder(images())))


@pytest.mark.parametrize("kind", ["clip_vision", "siglip", "dinov2_with_registers", "convnext", "resnet"])
def test_an_image_encoder_in_bf16_gives_what_it_gives_in_float32_but_for_rounding(kind: str, saved: Callable[[str], str]) -> None:
    spec = EncoderSpec("image", saved(kind), {"precision": "bf16"})
    encoder = spec.build()
    assert {parameter.dtype for parameter in encoder.model.parameters()} == {torch.bfloat16}
    found, exact = (torch.stack(one(images())).float() for one in (encoder, image_encoder(saved(kind))))
    assert 0 < (found - exact).norm() / exact.norm() < 0.03
    assert spec.fingerprint() != EncoderSpec("image", saved(kind)).fingerprint()  # stored features of one are never taken for the other's
    size, full = (sum(one.nbytes for one in spec.without_weights().parameters()) for spec in (spec, EncoderSpec("image", saved(kind))))
    assert 2 * size == full


def test_in_bf16_what_an_encoder_computes_of_its_configuration_stays_in_float32(tmp_path: Path) -> None:
    """The same when it is loaded, and when a model that was loaded in float32 becomes a part of an exported one."""
    torch.manual_seed(0)
    DINOv3ViTModel(DINOv3ViTConfig(**VISION)).save_pretrained(tmp_path)
    BitImageProcessorPil(**CROP).save_pretrained(tmp_path)
    options = {"precision": "bf16"}
    loaded = EncoderSpec("image", str(tmp_path), options).build()
    part = ENCODERS["image"].part(options, EncoderSpec("image", str(tmp_path)).build().model)
    for encoder in (loaded, part):
        assert {weight.dtype for weight in encoder.model.parameters()} == {torch.bfloat16}
        assert dict(encoder.model.named_buffers())["rope_embeddings.inv_freq"].dtype == torch.float32
    inputs = loaded.preprocess(images())
    assert all(map(torch.equal, loaded.encode(inputs), part.encode(inputs)))


def test_a_text_encoder_in_bf16_gives_what_it_gives_in_float32_but_for_rounding(tiny_bert: Path) -> None:
    texts = ["a red circle", "blue"]
    found, exact = (torch.cat(text_encoder(tiny_bert, **options)(texts)).float() for options in ({"precision": "bf16"}, {}))
    assert 0 < (found - exact).norm() / exact.norm() < 0.03


def test_an_encoder_takes_no_gpu_that_it_was_not_given(tiny_vit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray hides GPUs from no process: with launch.use_gpu=false, encoders would take the first one of the machine."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert EncoderSpec("image", str(tiny_vit)).build().device.type == "cpu"


def test_an_encoder_has_nothing_that_trains(tiny_vit: Path, tiny_bert: Path) -> None:
    for model in (image_encoder(tiny_vit).model, text_encoder(tiny_bert).model):
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert not model.training


def test_the_fingerprint_is_of_weights_and_image_size_but_not_of_the_place(tiny_vit: Path, tmp_path: Path) -> None:
    moved, changed = tmp_path / "moved", tmp_path / "changed"
    shutil.copytree(tiny_vit, moved)
    shutil.copytree(tiny_vit, changed)
    model = ViTModel.from_pretrained(changed, add_pooling_layer=False)
    next(model.parameters()).data += 1
    model.save_pretrained(changed)
    own = EncoderSpec("image", str(tiny_vit)).fingerprint()
    assert own == EncoderSpec("image", str(moved)).fingerprint() == EncoderSpec("image", str(tiny_vit), {"size": None}).fingerprint()
    sizes = {EncoderSpec("image", str(tiny_vit), {"size": size}).fingerprint() for size in (32, 48)}
    others = {EncoderSpec("image", str(changed)).fingerprint(), *sizes}
    assert len(others | {own}) == 4


def test_one_directory_has_different_fingerprints_as_an_image_and_as_a_text_encoder(saved: Callable[[str], str]) -> None:
    image, text = (EncoderSpec(modality, saved("clip")).fingerprint() for modality in ("image", "text"))
    assert image != text


def test_texts_become_one_vector_each(tiny_bert: Path) -> None:
    features = text_encoder(tiny_bert)(["a cat", "a dog on a very long leash"])
    assert shapes(features) == [(1, 32)] * 2
    assert all(vector.dtype == torch.float16 for vector in features)
    assert EncoderSpec("text", str(tiny_bert)).width() == 32


def test_a_texts_vector_does_not_depend_on_its_padding(tiny_bert: Path) -> None:
    encoder = text_encoder(tiny_bert)
    together = encoder(["a cat", "a dog on a very long leash"])
    torch.testing.assert_close(together[0], encoder(["a cat"])[0], atol=1e-3, rtol=1e-3)
    assert not torch.allclose(together[0], together[1], atol=1e-2)


def test_a_texts_vector_is_the_mean_over_its_tokens(tiny_bert: Path) -> None:
    encoder = text_encoder(tiny_bert)
    ids = AutoTokenizer.from_pretrained(tiny_bert)("a cat", return_tensors="pt", add_special_tokens=False)["input_ids"]
    with torch.inference_mode():
        hidden = BertModel.from_pretrained(tiny_bert).eval()(input_ids=ids).last_hidden_state
    torch.testing.assert_close(encoder(["a cat"])[0][0].float(), hidden[0].mean(dim=0), atol=2e-3, rtol=2e-3)


def test_a_text_may_be_a_vector_for_each_token_of_any_layer(tiny_bert: Path) -> None:
    texts = ["a cat", "a much longer text about a dog"]
    pooled, by_token = text_encoder(tiny_bert)(texts), text_encoder(tiny_bert, pooled=False)(texts)
    assert [len(one) for one in by_token] == [len(tokens) for tokens in text_encoder(tiny_bert).preprocess(texts)]
    for mean, tokens in zip(pooled, by_token, strict=True):
        torch.testing.assert_close(tokens.float().mean(0, keepdim=True), mean.float(), atol=2e-3, rtol=0)
    layers = text_encoder(tiny_bert).model.config.num_hidden_layers
    torch.testing.assert_close(text_encoder(tiny_bert, layer=layers)(texts), pooled)
    assert not torch.allclose(text_encoder(tiny_bert, layer=0)(texts)[0], pooled[0], atol=2e-3)
    with pytest.raises(InputError, match=f"has {layers} layers, `layer` is {layers + 1}"):
        text_encoder(tiny_bert, layer=layers + 1)


def test_a_text_beyond_the_models_positions_is_cut(tiny_bert: Path) -> None:
    encoder = text_encoder(tiny_bert)
    torch.testing.assert_close(encoder(["x" * 1000]), encoder(["x" * 64]))


def test_the_text_half_of_a_clip_encodes_texts(saved: Callable[[str], str], tiny_bert: Path, tmp_path: Path) -> None:
    shutil.copytree(saved("clip"), tmp_path / "clip")
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(tmp_path / "clip")
    name = str(tmp_path / "clip")
    assert shapes(text_encoder(name)(["a cat", "x" * 100])) == [(1, 16)] * 2
    assert EncoderSpec("text", name).width() == 16


@pytest.mark.parametrize("modality", ENCODERS)
def test_a_model_that_transformers_does_not_know_is_refused_by_its_setting(tmp_path: Path, modality: str) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no-such-architecture"}')
    with pytest.raises(InputError) as caught:
        EncoderSpec(modality, str(tmp_path)).width()
    assert f"model.encoders.{modality}.name={tmp_path}" in str(caught.value)
    with pytest.raises(InputError) as caught:
        EncoderSpec(modality, str(tmp_path)).build()
    assert f"model.encoders.{modality}.name={tmp_path}" in str(caught.value)


def test_a_text_model_in_the_place_of_the_image_encoder_is_refused(tiny_bert: Path) -> None:
    """The driver sees no more of it than this: without an InputError here, a worker fails with a traceback."""
    with pytest.raises(InputError):
        image_encoder(tiny_bert)


def test_images_of_several_shapes_come_back_in_their_order(saved: Callable[[str], str]) -> None:
    encoder = image_encoder(saved("convnext"))
    inputs = [torch.rand(3, side, 64) for side in (64, 96, 64)]
    features = encoder.encode(inputs)
    assert shapes(features) == [(4, 24), (6, 24), (4, 24)]
    torch.testing.assert_close(features[2], encoder.encode(inputs[2:])[0], atol=1e-3, rtol=1e-3)
