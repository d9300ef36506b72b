"""Soft tokens that are words of the texts that phase 1 knows."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer

from raytrain2p.models.recall import Recall

TEXTS = ("red", "blue", "the colour, please?")
END = 2


@pytest.fixture
def recall(tiny_llama: Path) -> Recall:
    """Three texts at right angles."""
    made = Recall(texts=3, tokens=4, dimension=5)
    made.fill(torch.eye(3, 5), 50.0, TEXTS, AutoTokenizer.from_pretrained(tiny_llama), END)
    return made


def test_a_vector_becomes_the_embeddings_of_the_first_tokens_of_its_text(recall: Recall, tiny_llama: Path) -> None:
    tokenizer, embedding = AutoTokenizer.from_pretrained(tiny_llama), torch.nn.Embedding(1000, 7)
    soft = recall(torch.eye(3, 5), embedding)
    assert soft.shape == (3, 4, 7)
    for text, found in zip(TEXTS, soft, strict=True):
        ids = tokenizer(f" {text}", add_special_tokens=False)["input_ids"]
        torch.testing.assert_close(found, embedding(torch.tensor((ids + [END] * 4)[:4])), atol=1e-4, rtol=1e-4)


def test_between_texts_it_becomes_their_mean_by_how_likely_each_is(recall: Recall) -> None:
    embedding, vector = torch.nn.Embedding(1000, 7), F.normalize(torch.tensor([[1.0, 0.9, 0.0, 0.0, 1.0]]), dim=-1)
    likely = (50.0 * vector @ torch.eye(3, 5).T).softmax(-1)
    assert 0.5 < likely.max() < 0.99
    expected = sum(share * embedding(ids) for share, ids in zip(likely[0], recall.token_ids, strict=True))
    torch.testing.assert_close(recall(vector, embedding)[0], expected)


def test_autocast_does_not_round_how_likely_texts_are(recall: Recall) -> None:
    embedding, vectors = torch.nn.Embedding(1000, 7), F.normalize(torch.tensor([[1.0, 0.97, 0.3, 0.1, 0.5]]), dim=-1)
    with torch.no_grad():
        recall.log_scale.fill_(4.6)
        expected = recall(vectors, embedding)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(recall(vectors, embedding).float(), expected, atol=2e-2, rtol=1e-2)
    whole = recall.to(torch.bfloat16)(vectors.bfloat16(), embedding.bfloat16())
    assert whole.isfinite().all()


def test_a_special_token_in_a_text_is_text(tiny_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    made = Recall(texts=1, tokens=4, dimension=5)
    made.fill(torch.eye(1, 5), 1.0, [tokenizer.eos_token], tokenizer, END)
    assert made.token_ids[0, 0] not in tokenizer.all_special_ids


def test_the_scale_learns_and_the_embeddings_do_not(recall: Recall) -> None:
    embedding = torch.nn.Embedding(1000, 7)
    recall(F.normalize(torch.ones(1, 5), dim=-1), embedding).square().sum().backward()
    assert [name for name, parameter in recall.named_parameters()] == ["log_scale"]
    assert recall.log_scale.grad is not None
    assert embedding.weight.grad is None


def test_in_training_the_likeliest_text_may_be_hidden(recall: Recall) -> None:
    embedding, vectors = torch.nn.Embedding(1000, 7), F.normalize(torch.tensor([[1.0, 0.9, 0.0, 0.0, 0.0]]), dim=-1).repeat(200, 1)
    recall.dropout = 0.3
    second = embedding(recall.token_ids[1])
    nearest = (recall.train()(vectors, embedding) - second).abs().amax(dim=(1, 2)) < 1e-3
    assert 0.15 < nearest.float().mean() < 0.45
    assert not ((recall.eval()(vectors, embedding) - second).abs().amax(dim=(1, 2)) < 1e-3).any()
