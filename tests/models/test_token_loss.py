"""The loss over many logits is PyTorch's, in a fifth of the memory."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM

from raytrain2p.models import token_loss as module
from raytrain2p.models.token_loss import token_loss
from raytrain2p.models.tracing import traced
from tests.models.test_assistant import batch_of, built

ROWS, VOCABULARY = 23, 40


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five rows at a time: the last chunk has three."""
    monkeypatch.setattr(module, "CHUNK", 5 * VOCABULARY + 7)


def case(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return (4 * torch.randn(ROWS, VOCABULARY)).to(dtype).requires_grad_(), torch.randint(VOCABULARY, (ROWS,))


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradient_are_those_of_pytorch(dtype: torch.dtype) -> None:
    logits, targets = case(dtype)
    exact = F.cross_entropy(logits.float(), targets, reduction="sum")
    (wanted,) = torch.autograd.grad(exact / 100, logits)
    loss = token_loss(logits * 1, targets)  # a leaf is not to be written to
    (found,) = torch.autograd.grad(loss / 100, logits)
    torch.testing.assert_close(loss, exact, rtol=1e-6, atol=0)
    assert found.dtype == dtype
    # In bfloat16 it is rounded twice, once more than PyTorch's.
    torch.testing.assert_close(found, wanted, rtol=1e-6 if dtype == torch.float32 else 2**-7, atol=1e-9)


@pytest.mark.usefixtures("small_chunks")
def test_where_nothing_learns_the_logits_stay() -> None:
    logits, targets = case(torch.bfloat16)
    before, exact = logits.detach().clone(), F.cross_entropy(logits.float(), targets, reduction="sum")
    with torch.inference_mode():
        torch.testing.assert_close(token_loss(logits, targets), exact.detach(), rtol=1e-6, atol=0)
    assert torch.equal(logits, before)


@pytest.mark.usefixtures("small_chunks")
def test_a_second_backward_pass_is_an_error_and_no_other_gradient() -> None:
    logits, targets = case(torch.float32)
    loss = token_loss(logits * 1, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def bytes_of_a_logit(monkeypatch: pytest.MonkeyPatch, chunk: int) -> float:
    """That a pass takes at once, with an output layer that is frozen as LoRA's is."""
    rows, vocabulary = 512, 10_000
    monkeypatch.setattr(module, "CHUNK", chunk)
    with torch.device("meta"):
        head = nn.Linear(8, vocabulary, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    hidden, targets = torch.randn(rows, 8, dtype=torch.bfloat16, requires_grad=True), torch.randint(vocabulary, (rows,))
    return traced(head, lambda: token_loss(head(hidden), targets)).most_bytes / (rows * vocabulary)


def test_logits_take_a_fifth_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bytes_of_a_logit(monkeypatch, 1 << 30) > 11.9
    assert bytes_of_a_logit(monkeypatch, 1 << 16) < 2.3


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_a_model_that_caps_its_logits_learns_the_same(
    tuning: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gemma's last operations come after the output layer, and save what they need for their backward pass."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    torch.manual_seed(6)
    Gemma2ForCausalLM(Gemma2Config(vocab_size=len(tokenizer), head_dim=16, final_logit_softcapping=3.0, **shape)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    passes = []
    for chunk in (1 << 30, 2 * len(tokenizer)):
        monkeypatch.setattr(module, "CHUNK", chunk)
        assistant = built(tmp_path, tuning)
        loss = assistant.loss_sum(batch_of(0, 1, 2))
        loss.backward()
        passes.append({name: weight.grad for name, weight in assistant.named_parameters() if weight.grad is not None} | {"loss": loss})
    torch.testing.assert_close(passes[1], passes[0], rtol=1e-5, atol=1e-6)
