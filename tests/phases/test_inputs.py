"""Digests of a run's inputs: content and order count, file names do not."""

from dataclasses import replace

import pytest

from raytrain2p.data.media import ImageRef, content_key
from raytrain2p.data.records import Record
from raytrain2p.phases.inputs import digest_records

A, B = ImageRef("a.png"), ImageRef("b.png")
KEYS = {A: content_key(b"one"), B: content_key(b"two"), ImageRef("elsewhere.png"): content_key(b"one")}
RECORDS = [
    Record("x:1", A, instruction="Which colour?", response="red", task="colour"),
    Record("x:2", None, instruction="Say yes.", response="yes"),
    Record("x:3", B, text="a blue circle"),
]


def test_moved_files_with_the_same_content_have_the_same_digest() -> None:
    moved = [replace(record, where=f"y:{number}") for number, record in enumerate(RECORDS)]
    moved[0] = replace(moved[0], image=ImageRef("elsewhere.png"))
    assert digest_records(moved, KEYS) == digest_records(RECORDS, KEYS)


@pytest.mark.parametrize(
    "other",
    [
        RECORDS[::-1],
        RECORDS[:2],
        [replace(RECORDS[0], response="blue"), *RECORDS[1:]],
        [replace(RECORDS[0], instruction="Which color?"), *RECORDS[1:]],
        [replace(RECORDS[0], task="all"), *RECORDS[1:]],
        [replace(RECORDS[0], image=B), *RECORDS[1:]],
        [replace(RECORDS[0], image=None), *RECORDS[1:]],
        [*RECORDS[:2], replace(RECORDS[2], text="a blue square")],
    ],
)
def test_other_content_or_order_has_another_digest(other: list[Record]) -> None:
    assert digest_records(other, KEYS) != digest_records(RECORDS, KEYS)
