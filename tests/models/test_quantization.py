"""A frozen language model in 4 bits: the same products, with weights that are numbers only while a product needs them."""

import shutil
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from raytrain2p.models.assistant import Assistant
from raytrain2p.models.lora import without_adapters
from raytrain2p.models.parameters import count_parameters
from raytrain2p.models.quantization import BYTES, QuantizedLinear, dequantize, quantizable, quantize
from raytrain2p.models.tracing import traced
from tests.models.test_assistant import batch_of, built
from tests.models.test_lora import far
from tests.packages import needs_bitsandbytes

pytestmark = needs_bitsandbytes

CPU = torch.device("cpu")


def quantized(directory: Path, tuning: str = "lora", dtype: torch.dtype = torch.float32, **more: Any) -> Assistant:
    """The assistant over a small language model, as a worker builds it; what trains changes something."""
    assistant = built(directory, tuning, dtype, quantization="nf4", **more)
    assistant.convert(dtype, torch.device("meta") if more.get("empty") else CPU)
    torch.manual_seed(1)
    for name, weight in assistant.named_parameters():
        if "lora_" in name:
            nn.init.normal_(weight, std=0.1)
    return assistant.train()


def gradients(assistant: Assistant) -> dict[str, torch.Tensor]:
    torch.manual_seed(2)  # dropout
    assistant(batch_of(0, 1)).backward()
    return {name: weight.grad for name, weight in assistant.named_parameters() if weight.grad is not None}


def test_a_layer_computes_with_weights_that_are_near_to_those_it_had() -> None:
    layer = nn.Linear(96, 40)
    small = QuantizedLinear(layer, CPU, torch.float32)
    assert small.weight.nbytes == 96 * 40 // 2
    difference = small.numbers() - layer.weight
    assert 0.05 < (difference.norm() / layer.weight.norm()).item() < 0.15  # NF4 of normal numbers: 9 %
    x = torch.randn(3, 5, 96, requires_grad=True)
    torch.testing.assert_close(small(x), nn.functional.linear(x, small.numbers(), layer.bias))
    small(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, small.numbers().sum(0).expand_as(x))


@pytest.mark.parametrize("tuning", ["lora", "frozen"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_gradients_are_those_of_a_model_with_the_same_numbers(tiny_llama: Path, tuning: str, dropout: float) -> None:
    """With dropout, peft's own layers compute."""
    small, whole = (quantized(tiny_llama, tuning, dropout=dropout) for _ in range(2))
    dequantize(whole.language_model)
    assert not any(isinstance(module, QuantizedLinear) for module in whole.modules())
    assert sum(isinstance(module, QuantizedLinear) for module in small.modules()) == 14  # two layers of seven
    assert far(gradients(whole), gradients(small)) < 1e-5


@pytest.mark.parametrize("tuning", ["lora", "frozen"])
def test_no_weights_are_kept_as_numbers_for_the_backward_pass(tiny_llama: Path, tuning: str) -> None:
    small, kept = quantized(tiny_llama, tuning), set[tuple[int, ...]]()
    weights = {weight.data_ptr() for weight in small.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in weights:
            kept.add(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        small(batch_of(0, 1))
    shapes = {(module.out_features, module.in_features) for module in small.modules() if isinstance(module, QuantizedLinear)}
    assert kept
    assert not shapes & kept


def test_in_bf16_the_products_are_in_bf16_and_what_trains_is_in_float32(tiny_llama: Path) -> None:
    small = quantized(tiny_llama, dtype=torch.bfloat16, as_stored=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(small)
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    layers = [module for module in small.modules() if isinstance(module, QuantizedLinear)]
    assert {layer.numbers().dtype for layer in layers} == {torch.bfloat16}
    assert {name: weight.dtype for name, weight in small.language_model.named_parameters() if weight.dtype == torch.float32}.keys() == {
        name for name, weight in small.language_model.named_parameters() if weight.requires_grad
    }


def test_they_count_as_the_weights_that_they_stand_for(tiny_llama: Path) -> None:
    small, whole = quantized(tiny_llama), built(tiny_llama)
    linear = sum(layer.weight.numel() for _, _, layer in quantizable(whole.language_model))
    expected = count_parameters(whole.parts())
    expected["language model"] = replace(expected["language model"], quantized=linear)
    assert count_parameters(small.parts()) == expected
    assert small.flops_per_token(20.0) == whole.flops_per_token(20.0)
    assert small.own_weights().keys() == whole.own_weights().keys()


def test_the_bytes_of_a_weight_are_those_that_bitsandbytes_takes() -> None:
    small = QuantizedLinear(nn.Linear(512, 512, bias=False), CPU, torch.bfloat16)
    scales = small.scales
    held = small.weight.nbytes + scales.absmax.nbytes + scales.state2.absmax.nbytes
    assert held == BYTES * 512 * 512


def test_a_layer_without_numbers_changes_nothing_for_those_with_numbers() -> None:
    layer = nn.Linear(64, 64)
    before = QuantizedLinear(layer, CPU, torch.float32).numbers()
    assert QuantizedLinear(layer, torch.device("meta"), torch.float32).numbers().is_meta
    assert torch.equal(QuantizedLinear(layer, CPU, torch.float32).numbers(), before)


def test_what_it_gives_may_be_changed_in_place() -> None:
    """As a model that clamps its queries does."""
    small = QuantizedLinear(nn.Linear(64, 64), CPU, torch.float32)
    x = torch.randn(2, 3, 64, requires_grad=True)
    small(x).clamp_(-1, 1).sum().backward()
    assert x.grad is not None


def test_a_layer_is_let_go_of_as_soon_as_it_is_quantized(tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, trust_remote_code=False).requires_grad_(False)
    layers, alive = [weakref.ref(layer) for _, _, layer in quantizable(model)], list[int]()
    made = QuantizedLinear.__init__

    def noted(self: QuantizedLinear, *arguments: Any) -> None:
        made(self, *arguments)
        alive.append(sum(one() is not None for one in layers))

    with patch.object(QuantizedLinear, "__init__", noted):
        quantize(model, CPU, torch.float32)
    assert alive == list(range(14, 0, -1))


def test_its_scales_go_where_its_weights_go() -> None:
    layer = nn.Sequential(QuantizedLinear(nn.Linear(64, 64), CPU, torch.float32)).to("meta")[0]
    assert isinstance(layer, QuantizedLinear)
    assert layer.weight.is_meta
    assert layer.scales.absmax.is_meta
    assert layer.numbers().is_meta


def test_a_pass_without_numbers_has_the_same_products_and_makes_numbers_twice(tiny_llama: Path) -> None:
    passes = {}
    for quantization in (None, "nf4"):
        with torch.device("meta"):
            assistant = built(tiny_llama, dtype=torch.bfloat16, empty=True, quantization=quantization)
        assistant.convert(torch.bfloat16, torch.device("meta"))
        passes[quantization] = traced(assistant, lambda assistant=assistant: assistant.train()(batch_of(0, 1)))  # type: ignore[misc]
    flops = [sum(one.flops * count for one, count in each.operations.items()) for each in passes.values()]
    assert flops[0] == flops[1] > 0
    made = [sum(count for one, count in each.operations.items() if "dequantize_4bit" in str(one.kernel)) for each in passes.values()]
    assert made == [0, 2 * 14]


def test_without_adapters_it_has_the_numbers_that_were_computed_with_and_what_lora_adds(tiny_llama: Path) -> None:
    assistant = quantized(tiny_llama).eval()
    ids = torch.arange(24).view(2, 12) + 30
    with torch.no_grad():
        before = assistant.language_model(input_ids=ids).logits
        merged = without_adapters(assistant.language_model)
        torch.testing.assert_close(merged(input_ids=ids).logits, before, rtol=1e-4, atol=1e-4)
    assert {type(module) for module in merged.modules() if isinstance(module, nn.Linear)} == {nn.Linear}


def test_the_output_layer_stays_as_it_is(tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, trust_remote_code=False).requires_grad_(False)
    quantize(model, CPU, torch.float32)
    assert type(model.get_output_embeddings()) is nn.Linear
    assert not list(quantizable(model))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of what is mapped into memory")
def test_what_it_was_made_from_is_not_kept_in_memory(tiny_llama: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(tiny_llama, tmp_path / "llama")
    small = quantized(directory, as_stored=True)
    assert small.language_model is not None
    assert str(directory / "model.safetensors") not in Path("/proc/self/maps").read_text()
