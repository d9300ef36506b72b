"""The question that a summary offers: from the user's own records, and safe to paste."""

import pytest

from raytrain2p.data.media import MediaRef
from raytrain2p.data.records import ASSISTANT, SYSTEM, USER, Message, Record
from raytrain2p.phases.instruction.question import LONGEST, question_arguments

IMAGE, SOUND, ROW = MediaRef("image", "/data/1 .png"), MediaRef("audio", "/data/1.ogg"), MediaRef("image", "/data/a.parquet", 3, "image")


def record(*parts: str | MediaRef) -> Record:
    turns = [Message(SYSTEM, ("be brief",)), Message(USER, parts), Message(ASSISTANT, ("yes",)), Message(USER, ("And that?",))]
    return Record("a.jsonl:1", (*turns, Message(ASSISTANT, ("no",))))


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (("What is two and two?",), ["What is two and two?"]),
        ((IMAGE, "\nWhat is it?"), ["--image", "/data/1 .png", "What is it?"]),
        ((ROW, SOUND, "Is this it?"), ["--image", "FILE", "--audio", "/data/1.ogg", "Is this it?"]),
        ((SOUND, IMAGE, "Is this it?"), ["--audio", "/data/1.ogg", "--image", "/data/1 .png", "<audio><image>Is this it?"]),
        (("Is ", IMAGE, " one?"), ["--image", "/data/1 .png", "Is <image> one?"]),
    ],
)
def test_it_has_the_flag_of_each_modality_and_the_first_question(parts: tuple[str | MediaRef, ...], words: list[str]) -> None:
    assert question_arguments({"train": [record(*parts)]}) == words


def test_a_test_record_comes_first_and_one_with_media_before_all() -> None:
    splits = {"train": [record(IMAGE, "of train")], "val": [record(IMAGE, "of val")], "test": [record("text"), record(SOUND, "of test")]}
    assert question_arguments(splits)[-1] == "of test"
    assert question_arguments({"train": [record(IMAGE, "of train")], "test": [record("text")]})[-1] == "of train"


@pytest.mark.parametrize(
    "bad", ["x" * (LONGEST + 1), "two\nlines", "\x1b[31mred", "\u202eback", "--help", "is password=hunter22 safe?", " "]
)
def test_another_is_taken_in_place_of_one_that_cannot_be_pasted(bad: str) -> None:
    assert question_arguments({"train": [record(IMAGE, bad), record(IMAGE, "good")]})[-1] == "good"


@pytest.mark.parametrize(
    ("only", "shown"),
    [("word " * 100, ("word " * 15) + "wo..."), ("--two\n\x1b[31mlines", "two \\x1b[31mlines"), ("\n", "QUESTION"), ("--", "QUESTION")],
)
def test_the_only_one_is_shortened_and_escaped(only: str, shown: str) -> None:
    assert question_arguments({"train": [record(IMAGE, only)]}) == ["--image", "/data/1 .png", shown]
