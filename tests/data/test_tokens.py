"""How token records become padded batches: what is learnt from, what is looked at, and where soft tokens go."""

import numpy as np
import torch

from raytrain2p.data.batches import Ragged
from raytrain2p.data.chat import SOFT
from raytrain2p.data.tokens import IGNORED, TokenRecords, left_padded, right_padded
from tests.conftest import byte_tokenizer

END = byte_tokenizer().eos_token_id
PROMPTS = [[SOFT, SOFT, 11, 12], [21], [31, SOFT, SOFT, 32, 33]]
RESPONSES = [[13, END], [22, 23, 24, END], [END]]
TOKENS = TokenRecords(Ragged(PROMPTS), Ragged(RESPONSES))
ALL = np.arange(3)


def test_lengths_count_soft_tokens_and_the_response() -> None:
    assert TOKENS.lengths.tolist() == [6, 5, 6]


def test_labels_are_the_response_only() -> None:
    labels = right_padded(TOKENS, ALL)["labels"]
    assert labels.shape == (3, 6)
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        rest = [IGNORED] * (6 - len(prompt) - len(response))
        assert labels[row].tolist() == [IGNORED] * len(prompt) + response + rest


def test_the_end_token_is_supervised_though_it_is_the_pad_token() -> None:
    assert byte_tokenizer().pad_token_id == END
    batch = right_padded(TOKENS, ALL)
    assert (batch["labels"] == END).sum() == 3
    assert batch["attention"][batch["labels"] == END].tolist() == [1, 1, 1]


def test_padding_is_neither_attended_to_nor_learnt_from() -> None:
    batch = right_padded(TOKENS, ALL)
    assert batch["attention"].sum(1).tolist() == TOKENS.lengths.tolist()
    assert batch["attention"][1].tolist() == [1, 1, 1, 1, 1, 0]
    assert (batch["labels"][batch["attention"] == 0] == IGNORED).all()


def test_soft_places_are_marked_and_hold_a_valid_id() -> None:
    batch = right_padded(TOKENS, ALL)
    assert batch["soft"].dtype == torch.bool
    assert batch["soft"].nonzero().tolist() == [[0, 0], [0, 1], [2, 1], [2, 2]]
    assert (batch["input_ids"] >= 0).all()


def test_all_other_ids_are_prompt_and_response_in_order() -> None:
    batch = right_padded(TOKENS, ALL)
    kept = (batch["attention"] == 1) & ~batch["soft"]
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        assert batch["input_ids"][row][kept[row]].tolist() == [token for token in prompt + response if token != SOFT]


def test_a_batch_is_as_wide_as_its_own_longest_record_and_in_the_given_order() -> None:
    batch = right_padded(TOKENS, np.array([1]))
    assert batch["input_ids"].tolist() == [[21, 22, 23, 24, END]]
    assert right_padded(TOKENS, np.array([2, 1]))["input_ids"][1].tolist() == [21, 22, 23, 24, END, 0]


def test_left_padded_prompts_end_together_and_hold_no_response() -> None:
    batch = left_padded(TOKENS, ALL)
    assert set(batch) == {"input_ids", "attention", "soft"}
    assert batch["input_ids"][:, -1].tolist() == [12, 21, 33]
    assert batch["attention"].tolist() == [[0, 1, 1, 1, 1], [0, 0, 0, 0, 1], [1, 1, 1, 1, 1]]
    assert batch["soft"].nonzero().tolist() == [[0, 1], [0, 2], [2, 1], [2, 2]]
    assert (batch["input_ids"] >= 0).all()
