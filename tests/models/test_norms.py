"""Norms: what the models compute, in fewer passes."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from raytrain2p.models.norms import RMSNorm, replace_norms


def norm(dtype: torch.dtype = torch.float32, width: int = 32) -> LlamaRMSNorm:
    torch.manual_seed(0)
    made = LlamaRMSNorm(width, eps=1e-5).to(dtype).requires_grad_(False)
    made.weight.copy_(torch.rand(width) + 0.5)
    return made


def results(module: torch.nn.Module, dtype: torch.dtype = torch.float32, size: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """The output, and the gradient of the input."""
    torch.manual_seed(1)
    x = (size * torch.randn(3, 5, 32)).to(dtype).requires_grad_()
    y = module(x)
    y.backward(torch.randn(y.shape).to(dtype))
    assert x.grad is not None
    return y.detach(), x.grad


@pytest.mark.parametrize("size", [1.0, 100.0, 0.01])
def test_output_and_gradient_are_the_models_own(size: float) -> None:
    replaced = torch.nn.Sequential(norm())
    assert replace_norms(replaced) == 1
    torch.testing.assert_close(results(replaced, size=size), results(norm(), size=size), rtol=1e-4, atol=1e-5)


def test_in_bf16_they_are_as_near_to_those_of_float32() -> None:
    replaced = torch.nn.Sequential(norm(torch.bfloat16))
    assert replace_norms(replaced) == 1
    exact = results(norm())
    for ours, theirs, right in zip(results(replaced, torch.bfloat16), results(norm(torch.bfloat16), torch.bfloat16), exact, strict=True):
        assert (ours.float() - right).norm() < 1.5 * (theirs.float() - right).norm()


def test_a_norm_that_computes_something_else_stays_as_it_is() -> None:
    other = GemmaRMSNorm(32)
    other.variance_epsilon = 1e-5
    assert replace_norms(torch.nn.Sequential(other)) == 0
    assert type(other) is GemmaRMSNorm


def test_the_norms_of_a_language_model_are_replaced_and_its_logits_stay(tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    ids = torch.arange(12)[None] + 30
    before, names = model(input_ids=ids).logits, list(model.state_dict())
    assert replace_norms(model) == 2 * model.config.num_hidden_layers + 1 == sum(isinstance(m, RMSNorm) for m in model.modules())
    assert list(model.state_dict()) == names
    torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=1e-4, atol=1e-5)
