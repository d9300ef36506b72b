"""LoRA layers: what peft computes, in fewer passes."""

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners import lora
from transformers import AutoModelForCausalLM

from raytrain2p.models.lora import AdaptedLinear, with_adapters, without_adapters
from tests.operations import Operations

SETTINGS = {"rank": 4, "alpha": 8, "dropout": 0.0, "target_modules": "all-linear"}


def adapted(directory: Path, dtype: torch.dtype, peft: bool = False, **changed: Any) -> Any:
    """The small Llama with adapters that change something; `peft` leaves peft's own layers."""
    torch.manual_seed(0)
    model = with_adapters(AutoModelForCausalLM.from_pretrained(directory, dtype=dtype), SETTINGS | changed).train()
    model.requires_grad_(False)
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.requires_grad_(True)
            torch.nn.init.normal_(weight, std=0.1)
    for module in model.modules() if peft else ():
        if type(module) is AdaptedLinear:
            module.__class__ = lora.Linear
    return model


def gradients(model: Any, autocast: bool = False) -> dict[str, torch.Tensor]:
    ids = torch.arange(24).view(2, 12) + 30
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model(input_ids=ids, labels=ids).loss.backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def far(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    """The distance of two gradients relative to the first's size."""
    assert left.keys() == right.keys()
    assert all(left[name].dtype == right[name].dtype == torch.float32 for name in left)
    return float((sum(((left[name] - right[name]) ** 2).sum() for name in left) / sum((left[name] ** 2).sum() for name in left)) ** 0.5)


def test_the_gradients_are_those_of_peft(tiny_llama: Path) -> None:
    assert far(gradients(adapted(tiny_llama, torch.float32, peft=True)), gradients(adapted(tiny_llama, torch.float32))) < 1e-5


def test_in_bf16_the_gradients_are_as_near_to_those_of_float32_as_peft_s(tiny_llama: Path) -> None:
    exact = gradients(adapted(tiny_llama, torch.float32))
    theirs = far(exact, gradients(adapted(tiny_llama, torch.bfloat16, peft=True), autocast=True))
    assert far(exact, gradients(adapted(tiny_llama, torch.bfloat16), autocast=True)) < 1.3 * theirs


def test_in_bf16_adapters_that_have_just_begun_to_learn_count_in_full(tiny_llama: Path) -> None:
    """What they give is less than a thousandth of the output here. peft's own layer adds it to a product that is rounded already."""
    torch.manual_seed(2)
    x, counted = torch.randn(4000, 32, dtype=torch.bfloat16), dict[str, float]()
    for kind in ("ours", "with bias", "to be compiled", "peft"):
        model = adapted(tiny_llama, torch.bfloat16, peft=kind == "peft")
        layer = next(module for name, module in model.named_modules() if name.endswith("o_proj"))
        base, down, up = layer.base_layer, layer.lora_A["default"].weight, layer.lora_B["default"].weight
        up.data.mul_(3e-4)
        if kind == "with bias":
            base.bias = torch.nn.Parameter(0.1 * torch.randn(32, dtype=torch.bfloat16), requires_grad=False)
        without = torch.nn.functional.linear(x.double(), base.weight.double(), None if base.bias is None else base.bias.double())
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            exact = layer.scaling["default"] * x.double() @ down.T.double() @ up.T.double()
            found = (layer.plain if kind == "to be compiled" else layer)(x).double() - without
        counted[kind] = float((found * exact).sum() / (exact * exact).sum())
    assert counted.pop("peft") < 0.7
    assert counted == pytest.approx(dict.fromkeys(counted, 1), abs=0.1)


def test_a_layer_casts_its_adapters_alone_and_scales_no_activation(tiny_llama: Path) -> None:
    """Forward and backward; peft's own layers need over twice as many operations."""

    def counted(peft: bool) -> Counter[str]:
        layer = next(module for name, module in adapted(tiny_llama, torch.bfloat16, peft).named_modules() if name.endswith("o_proj"))
        x = torch.randn(3, 5, layer.in_features, dtype=torch.bfloat16, requires_grad=True)
        with Operations() as operations, torch.autocast("cpu", torch.bfloat16):
            layer(x).sum().backward()
        return operations.counts

    ours, theirs = counted(peft=False), counted(peft=True)
    assert ours["_to_copy"] == 4, "the two adapters and their two gradients"
    assert ours["mm"] + ours["addmm_"] + ours["addmm"] == 8, "six of the adapters, two of the frozen weight"
    assert ours["mul"] + ours["mul_"] + ours["add"] + ours["add_"] == 0, "scales and sums are within the products"
    assert theirs.total() > 1.5 * ours.total()


def projections(model: Any) -> list[AdaptedLinear]:
    """Of queries, keys and values, in the first layer."""
    return [model.get_submodule(f"base_model.model.model.layers.0.self_attn.{name}_proj") for name in "qkv"]


def test_layers_that_read_one_input_are_computed_together(tiny_llama: Path) -> None:
    """Five products of each, three of the input; on their own, eight each."""
    layers = projections(adapted(tiny_llama, torch.float32))
    x = torch.randn(3, 5, layers[0].in_features, requires_grad=True)
    with Operations() as operations:
        sum(layer(x).sum() for layer in layers).backward()
    assert sum(operations.counts[name] for name in ("mm", "addmm", "addmm_")) == 3 * 5 + 3
    assert operations.counts["add"] + operations.counts["add_"] == 3, "of this test's sums; none of the input's gradient"


def test_each_is_right_in_whatever_order_and_with_whatever_input_they_are_called(tiny_llama: Path) -> None:
    """A call asks for what waits, for what was asked for before, or for what was never computed."""
    model, theirs = (adapted(tiny_llama, torch.float32, peft) for peft in (False, True))
    layers, expected = projections(model), projections(theirs)
    one, other = torch.randn(2, 3, 5, layers[0].in_features).unbind()
    calls = [(0, one), (1, other), (2, one), (0, other), (0, other), (2, other), (1, other), (1, one), (0, one)]
    for number, x in calls:
        torch.testing.assert_close(layers[number](x), expected[number](x))
    model.base_model.model.model.layers[0].self_attn.k_proj.merge()
    torch.testing.assert_close(layers[0](one), expected[0](one))
    torch.testing.assert_close(layers[1](one), expected[1](one))


def test_outputs_may_be_changed_in_place(tiny_llama: Path) -> None:
    """As OLMo does with `clip_qkv`."""
    grads = []
    for in_place in (False, True):
        layers = projections(adapted(tiny_llama, torch.float32))
        x = torch.ones(3, 5, layers[0].in_features, requires_grad=True)
        outputs = [layer(x) for layer in layers]
        sum((y.clamp_(-0.1, 0.1) if in_place else y.clamp(-0.1, 0.1)).sum() for y in outputs).backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads)


def test_nothing_of_a_step_is_kept_after_it(tiny_llama: Path) -> None:
    model = adapted(tiny_llama, torch.float32)
    gradients(model)
    layers = [module for module in model.modules() if isinstance(module, AdaptedLinear)]
    assert len({id(layer.siblings) for layer in layers}) < len(layers)
    assert all(layer.siblings.computed == (None, {}) for layer in layers)


def test_activations_that_are_computed_again_give_the_same_gradients(tiny_llama: Path) -> None:
    model = adapted(tiny_llama, torch.float32)
    expected = gradients(model)
    model.zero_grad()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    assert far(expected, gradients(model)) < 1e-6


def test_threads_that_share_a_model_get_their_own_answers(tiny_llama: Path) -> None:
    model = adapted(tiny_llama, torch.float32).eval()
    questions = [torch.arange(12)[None] + number for number in range(30, 50)]

    @torch.inference_mode()
    def logits(ids: torch.Tensor) -> torch.Tensor:
        return model(input_ids=ids).logits

    expected = list(map(logits, questions))
    with ThreadPoolExecutor(4) as threads:
        for answer, right in zip(threads.map(logits, questions * 5), expected * 5, strict=True):
            torch.testing.assert_close(answer, right)


def test_names_and_weights_are_those_of_peft(tiny_llama: Path) -> None:
    ours, theirs = adapted(tiny_llama, torch.float32), adapted(tiny_llama, torch.float32, peft=True)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert any(name.endswith("q_proj.lora_A.default.weight") for name in ours.state_dict())


@pytest.mark.parametrize("state", ["eval", "disabled", "merged", "dropout"])
def test_what_is_not_the_usual_case_is_left_to_peft(tiny_llama: Path, state: str) -> None:
    changes: dict[str, Callable[[Any], Any]] = {
        "eval": lambda model: model.eval(),
        "disabled": lambda model: model.base_model.disable_adapter_layers(),
        "merged": lambda model: model.merge_adapter(),
        "dropout": lambda model: model.eval(),
    }
    logits = []
    for peft in (False, True):
        model = adapted(tiny_llama, torch.float32, peft, dropout=0.5 if state == "dropout" else 0.0)
        changes[state](model)
        logits.append(model(input_ids=torch.arange(12)[None] + 30).logits)
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)


def test_dropout_blanks_what_the_adapters_read(tiny_llama: Path) -> None:
    model = adapted(tiny_llama, torch.float32, dropout=0.5)
    ids = torch.arange(12)[None] + 30
    assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


def test_merged_the_model_answers_as_with_adapters(tiny_llama: Path) -> None:
    model, ids = adapted(tiny_llama, torch.float32).eval(), torch.arange(12)[None] + 30
    before = model(input_ids=ids).logits
    torch.testing.assert_close(without_adapters(model)(input_ids=ids).logits, before, rtol=1e-4, atol=1e-5)
