"""How an answer compares with the expected one."""

import re
import string
from collections import Counter

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def is_exact(answer: str, expected: str) -> bool:
    """Whether both are the same text, apart from white space around them."""
    return answer.strip() == expected.strip()


def token_f1(answer: str, expected: str) -> float:
    """F1 of the words that both have, as SQuAD scores free-form answers (Rajpurkar et al. 2016, arXiv:1606.05250, section 6.1).

    Words are what white space divides, without case, ASCII punctuation and English articles. If one of the two has no words, the F1
    is 1 if neither has any, else 0.
    """
    ours, theirs = words(answer), words(expected)
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs))


def words(text: str) -> list[str]:
    return ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split()
