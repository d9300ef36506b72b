"""What `predict --output` has written stays, whatever ends it."""

import json
from pathlib import Path
from typing import Any

import pytest

from raytrain2p.config import InputError
from raytrain2p.data.media import MediaRef
from raytrain2p.data.records import ASSISTANT, USER, Message, Record
from raytrain2p.inference.answer_file import AnswerFile, lines_of, opened, question_key


def row(key: str) -> dict[str, Any]:
    return {"record": f"a.jsonl:{key}", "answer": f"answer {key}\u2028\n", "key": key}


def keys(path: Path) -> list[str]:
    return [json.loads(line)["key"] for line in path.read_text().splitlines()]


def test_a_line_torn_anywhere_is_asked_again_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    whole = lines_of([row("1"), row("2")])
    first = len(lines_of([row("1")]))
    for end in range(first, len(whole)):
        path.write_bytes(whole[:end])
        with opened(path) as file:
            assert list(file.answers) == ["1"]
            file.append([row("2")])
        assert path.read_bytes() == whole
    path.write_bytes(whole + bytes(100))  # a power failure
    with opened(path) as file:
        assert list(file.answers) == ["1", "2"]
    assert path.read_bytes() == whole


@pytest.mark.parametrize("content", ['{"instruction": "Who?"}\n', "my notes, without an end of line", "{}\n", "[]\n", "null\n", "x\n\n"])
def test_a_file_of_something_else_is_refused_and_left_alone(content: str, tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match="is not an answer of this command"), opened(path):
        pass
    assert path.read_text() == content


def test_rows_end_in_the_order_of_the_records_after_those_of_others(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with opened(path) as file:
        file.append([row("other")])
        file.append([row("3"), row("1")])
        assert file.finish([row("1"), row("2"), row("3")]) == 1
    assert keys(path) == ["other", "1", "2", "3"]


def test_one_process_at_a_time_writes(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with opened(path), pytest.raises(InputError, match=r"pid .* writes to it"), opened(path):
        pass
    with opened(path) as file:
        assert isinstance(file, AnswerFile)


def test_the_key_is_what_is_asked_of_which_model() -> None:
    image, other = MediaRef("image", "a.png"), MediaRef("image", "b.png")
    media = {image: b"1" * 32, other: b"1" * 32}

    def key(digest: str = "d", ref: MediaRef = image, text: str = "Who?", tokens: int = 32, answer: str | None = None) -> str:
        said = (Message(USER, (ref, text)), *([] if answer is None else [Message(ASSISTANT, (answer,))]))
        return question_key(digest, Record("where", said), media, tokens)

    assert key() == key(ref=other) == key(answer="Me."), "the same content, and an answer that is expected, change nothing"
    media[other] = b"2" * 32
    assert len({key(), key(ref=other), key(text="Why?"), key(digest="e"), key(tokens=16)}) == 5
