"""Problems as text: those of one cause together, a few of each shown, all counted."""

import pickle

from raytrain2p.config import InputError, Problem
from raytrain2p.config.problems import MOST_ALIKE, MOST_CAUSES, grouped


def test_problems_of_one_cause_are_shown_together_up_to_a_few() -> None:
    problems = [
        Problem(f"line <{number}>", f"has {number} apples" if number % 2 else "is bad", cause="apples" * (number % 2))
        for number in range(2 * MOST_ALIKE + 4)
    ]
    texts = grouped(problems)
    assert texts[0] == "line <0>\n    is bad"
    assert texts[MOST_ALIKE] == "... and 2 more like it"
    assert texts[MOST_ALIKE + 1] == "line <1>\n    has 1 apples"
    assert texts[-1] == "... and 2 more like it"
    assert len(texts) == 2 * (MOST_ALIKE + 1)


def test_as_many_as_are_shown_are_not_followed_by_a_count() -> None:
    assert grouped([Problem(str(number), "is bad") for number in range(MOST_ALIKE)])[-1] == f"{MOST_ALIKE - 1}\n    is bad"


def test_causes_are_cut_but_counted() -> None:
    text = str(InputError([Problem("here", f"is bad in way {number % (MOST_CAUSES + 7)}") for number in range(2 * (MOST_CAUSES + 7))]))
    assert text.startswith(f"{2 * (MOST_CAUSES + 7)} problems")
    assert f"is bad in way {MOST_CAUSES - 1}\n" in text
    assert f"is bad in way {MOST_CAUSES}\n" not in text
    assert text.endswith("... and 14 more, of 7 other causes")


def test_a_cause_is_not_shown_nor_compared_but_crosses_a_process_boundary() -> None:
    problem = Problem("here", "has 3 apples", cause="apples")
    assert problem == Problem("here", "has 3 apples")
    assert "cause" not in str(problem) + repr(problem)
    assert pickle.loads(pickle.dumps(InputError(problem))).problems[0].cause == "apples"
