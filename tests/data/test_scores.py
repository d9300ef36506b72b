"""Answers are compared with the expected ones as the field does it."""

import pytest

from raytrain2p.data.scores import is_exact, token_f1


@pytest.mark.parametrize(
    ("answer", "expected", "f1"),
    [
        ("Animals & Nature", "Animals & Nature", 1.0),
        ("The  animals, nature!", "animals nature", 1.0),  # articles, punctuation, case and white space do not count
        ("face with tears of joy", "face with tears", 6 / 8),
        ("cat cat cat", "cat", 2 / 4),  # a word counts as often as both have it
        ("dog", "cat", 0.0),
        ("", "cat", 0.0),
        ("the", "a", 1.0),  # neither has a word
        ("theatre", "atre", 0.0),  # no article within a word
    ],
)
def test_token_f1_is_that_of_squad(answer: str, expected: str, f1: float) -> None:
    assert token_f1(answer, expected) == pytest.approx(f1)
    assert token_f1(expected, answer) == pytest.approx(f1)


def test_exact_is_the_same_text_but_for_white_space_around_it() -> None:
    assert is_exact(" A cat.\n", "A cat.")
    assert not is_exact("a cat.", "A cat.")
