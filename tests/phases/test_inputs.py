"""Digests of a run's inputs: content and order count, file names do not."""

from dataclasses import replace

import pytest

from raytrain2p.data.media import MediaRef, content_key
from raytrain2p.data.records import ASSISTANT, USER, Message, Record
from raytrain2p.phases.inputs import digest_records

A, B, MOVED = MediaRef("image", "a.png"), MediaRef("image", "b.png"), MediaRef("image", "elsewhere.png")
KEYS = {A: content_key(b"one"), B: content_key(b"two"), MOVED: content_key(b"one")}


def asked(*parts: str | MediaRef, answer: str, task: str = "all") -> Record:
    return Record("x:1", (Message(USER, parts), Message(ASSISTANT, (answer,))), task)


RECORDS = [
    asked(A, "Which colour?", answer="red", task="colour"),
    asked("Say yes.", answer="yes"),
    replace(asked(B, answer="a blue circle"), concept="circle"),
]


def test_moved_files_with_the_same_content_have_the_same_digest() -> None:
    moved = [replace(record, where=f"y:{number}") for number, record in enumerate(RECORDS)]
    moved[0] = replace(asked(MOVED, "Which colour?", answer="red", task="colour"), where="y:0")
    assert digest_records(moved, KEYS) == digest_records(RECORDS, KEYS)


@pytest.mark.parametrize(
    "other",
    [
        RECORDS[::-1],
        RECORDS[:2],
        [asked(A, "Which colour?", answer="blue", task="colour"), *RECORDS[1:]],
        [asked(A, "Which color?", answer="red", task="colour"), *RECORDS[1:]],
        [replace(RECORDS[0], task="all"), *RECORDS[1:]],
        [asked(B, "Which colour?", answer="red", task="colour"), *RECORDS[1:]],
        [asked("Which colour?", answer="red", task="colour"), *RECORDS[1:]],
        [asked("Which colour?", A, answer="red", task="colour"), *RECORDS[1:]],
        [*RECORDS[:2], replace(RECORDS[2], concept="square")],
        [*RECORDS[:2], asked(B, answer="a blue square")],
    ],
)
def test_other_content_or_order_has_another_digest(other: list[Record]) -> None:
    assert digest_records(other, KEYS) != digest_records(RECORDS, KEYS)
