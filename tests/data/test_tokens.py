"""How token records become padded batches: what is learnt from, what is looked at, and where soft tokens go."""

import numpy as np
import pytest
import torch

from raytrain2p.data.chat import Encoded, soft_codes
from raytrain2p.data.tokens import TokenRecords, left_padded, right_padded, truncated
from tests.conftest import byte_tokenizer

END = byte_tokenizer().eos_token_id
SOFT_TOKENS = {"image": 2, "audio": 3}
CODES = soft_codes(SOFT_TOKENS)
SOFT, SOUND = CODES["image"], CODES["audio"]
PROMPTS = [[SOFT, SOFT, 11, 12], [21], [31, SOFT, SOFT, 32, 33]]
RESPONSES = [[13, END], [22, 23, 24, END], [END]]
TOKENS = TokenRecords.of(
    (
        Encoded(prompt + response, [False] * len(prompt) + [True] * len(response), len(prompt))
        for prompt, response in zip(PROMPTS, RESPONSES, strict=True)
    ),
    CODES,
)
ALL = np.arange(3)
# two turns and three media: [image 11 | 12 END | image image sound 13 | 14 END]
LONG = [SOFT, SOFT, 11, 12, END, SOFT, SOFT, SOFT, SOFT, SOUND, SOUND, SOUND, 13, 14, END]
TWO_TURNS = Encoded(LONG, [place in (3, 4, 13, 14) for place in range(15)], 13)


def test_lengths_count_soft_tokens_and_the_response() -> None:
    assert TOKENS.lengths.tolist() == [6, 5, 6]
    assert TOKENS.prompts.tolist() == [4, 1, 5]


def test_supervised_tokens_are_counted() -> None:
    assert TOKENS.supervised_counts.tolist() == [2, 4, 1]
    assert TokenRecords.of([TWO_TURNS, Encoded([], [], 0), TWO_TURNS], CODES).supervised_counts.tolist() == [4, 0, 4]
    assert TokenRecords.of([], CODES).supervised_counts.tolist() == []


def test_tokens_take_five_bytes() -> None:
    assert (TOKENS.ids.flat.dtype, TOKENS.supervised.flat.dtype) == (np.int32, np.bool_)


def learnt(tokens: TokenRecords, *records: int) -> dict[int, list[tuple[int, int]]]:
    """By row: the column before each token that is to be learnt, and that token."""
    batch, rows = right_padded(tokens, np.array(records)), {row: list[tuple[int, int]]() for row in range(len(records))}
    for place, target in zip(batch["supervised"].tolist(), batch["targets"].tolist(), strict=True):
        row, column = divmod(place, batch["input_ids"].shape[1])
        rows[row].append((column, target))
    return rows


def test_the_response_alone_is_learnt_each_token_from_the_one_before_it() -> None:
    assert learnt(TOKENS, 0, 1, 2) == {0: [(3, 13), (4, END)], 1: [(0, 22), (1, 23), (2, 24), (3, END)], 2: [(4, END)]}


def test_the_answers_of_every_turn_are_learnt() -> None:
    assert learnt(TokenRecords.of([TWO_TURNS], CODES), 0) == {0: [(2, 12), (3, END), (12, 14), (13, END)]}


def test_the_end_token_is_learnt_though_it_is_the_pad_token() -> None:
    assert byte_tokenizer().pad_token_id == END
    assert (right_padded(TOKENS, ALL)["targets"] == END).sum() == 3


def test_nothing_is_learnt_across_rows_even_if_the_very_first_token_is_supervised() -> None:
    tokens = TokenRecords.of([Encoded([11], [True], 0), Encoded([21, 22], [False, True], 1)], CODES)
    assert learnt(tokens, 1, 0) == {0: [(0, 22)], 1: []}


def test_soft_places_are_given_by_modality_and_hold_a_valid_id() -> None:
    batch = right_padded(TOKENS, ALL)
    assert batch["soft"].keys() == {"image", "audio"}
    assert batch["soft"]["image"].tolist() == [0, 1, 13, 14]
    assert batch["soft"]["audio"].tolist() == []
    assert batch["input_ids"].dtype == torch.int64
    assert (batch["input_ids"] >= 0).all()
    both = right_padded(TokenRecords.of([TWO_TURNS], CODES), np.array([0]))["soft"]
    assert both["image"].tolist() == [0, 1, 5, 6, 7, 8]
    assert both["audio"].tolist() == [9, 10, 11]


def test_all_other_ids_are_prompt_and_response_in_order() -> None:
    batch = right_padded(TOKENS, ALL)
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        record = prompt + response
        assert batch["input_ids"][row][: len(record)].tolist() == [max(token, 0) for token in record]


def test_a_batch_is_as_wide_as_its_own_longest_record_and_in_the_given_order() -> None:
    batch = right_padded(TOKENS, np.array([1]))
    assert batch["input_ids"].tolist() == [[21, 22, 23, 24, END]]
    assert right_padded(TOKENS, np.array([2, 1]))["input_ids"][1].tolist() == [21, 22, 23, 24, END, 0]


def test_left_padded_prompts_end_together_and_hold_no_response() -> None:
    batch = left_padded(TOKENS, ALL)
    assert set(batch) == {"input_ids", "attention", "soft"}
    assert batch["input_ids"].tolist() == [[0, 0, 0, 11, 12], [0, 0, 0, 0, 21], [31, 0, 0, 32, 33]]
    assert batch["attention"].tolist() == [[0, 1, 1, 1, 1], [0, 0, 0, 0, 1], [1, 1, 1, 1, 1]]
    assert batch["soft"]["image"].tolist() == [1, 2, 11, 12]


def test_a_record_within_the_limit_is_not_truncated() -> None:
    assert truncated(TWO_TURNS, 15) == TWO_TURNS
    assert truncated(TWO_TURNS, 99) == TWO_TURNS


@pytest.mark.parametrize(("limit", "length"), [(14, 14), (13, 5), (6, 5), (5, 5), (4, 4)])
def test_a_truncated_record_ends_with_an_answer_and_so_has_whole_items(limit: int, length: int) -> None:
    assert truncated(TWO_TURNS, limit) == Encoded(LONG[:length], TWO_TURNS.supervised[:length], 13 if length > 13 else 3)


@pytest.mark.parametrize("limit", [0, 1, 2, 3])
def test_a_record_without_a_supervised_token_within_the_limit_is_none(limit: int) -> None:
    assert truncated(TWO_TURNS, limit) is None
