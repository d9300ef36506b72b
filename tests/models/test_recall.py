"""Soft tokens that are words of the texts that phase 1 knows."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer

from raytrain2p.models.recall import Recall

TEXTS = ("red", "blue", "the colour, please?", "green")
END = 2
NEAR_RED = F.normalize(torch.tensor([[1.0, 0.9, 0.3, 0.0, 1.0]]), dim=-1)  # then to the second and third text


@pytest.fixture
def recall(tiny_llama: Path) -> Recall:
    """Four texts at right angles, of which two are read."""
    made = Recall(dimension=5, known=4, tokens=3, texts=2)
    made.fill(torch.eye(4, 5), TEXTS, AutoTokenizer.from_pretrained(tiny_llama), END)
    return made


def words(recall: Recall, embedding: torch.nn.Module, *numbers: int) -> torch.Tensor:
    """The embeddings of texts, one after the other."""
    return torch.cat([embedding(recall.token_ids[number]) for number in numbers])


def test_texts_are_known_by_their_first_tokens(recall: Recall, tiny_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    for text, found in zip(TEXTS, recall.token_ids.tolist(), strict=True):
        ids = tokenizer(f" {text}", add_special_tokens=False)["input_ids"]
        assert found == (ids + [END] * 3)[:3]


def test_a_vector_becomes_the_words_of_its_nearest_texts_the_nearest_first(recall: Recall) -> None:
    embedding = torch.nn.Embedding(1000, 7)
    soft = recall(torch.cat([NEAR_RED, NEAR_RED[:, [1, 2, 0, 3, 4]]]), embedding)
    assert soft.shape == (2, 6, 7)
    assert torch.equal(soft[0], words(recall, embedding, 0, 1))
    assert torch.equal(soft[1], words(recall, embedding, 2, 0))


def test_autocast_does_not_round_which_texts_are_near(recall: Recall) -> None:
    embedding, vectors = torch.nn.Embedding(1000, 7), F.normalize(torch.tensor([[1.0, 1.001, 1.002, 0.1, 0.5]]), dim=-1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(recall(vectors, embedding)[0], words(recall, embedding, 2, 1))
    whole = recall.to(torch.bfloat16)(vectors.bfloat16(), embedding.bfloat16())
    assert whole.isfinite().all()


def test_a_special_token_in_a_text_is_text(tiny_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    made = Recall(dimension=5, known=1, tokens=4, texts=1)
    made.fill(torch.eye(1, 5), [tokenizer.eos_token], tokenizer, END)
    assert made.token_ids[0, 0] not in tokenizer.all_special_ids


def test_nothing_of_it_is_learnt(recall: Recall) -> None:
    embedding = torch.nn.Embedding(1000, 7)
    assert not recall(NEAR_RED, embedding).requires_grad
    assert not list(recall.parameters())


def test_in_training_the_nearest_text_may_be_left_out(recall: Recall) -> None:
    embedding, vectors = torch.nn.Embedding(1000, 7), NEAR_RED.repeat(200, 1)
    recall.dropout = 0.3
    left_out = (recall.train()(vectors, embedding) == words(recall, embedding, 1, 2)).all(dim=2).all(dim=1)
    assert 0.15 < left_out.float().mean() < 0.45
    assert (recall.eval()(vectors, embedding) == words(recall, embedding, 0, 1)).all()
