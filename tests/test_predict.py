"""`predict` prints what a model says, which may be anything, scores it, and keeps what it has written."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from raytrain2p import predict
from raytrain2p.data.records import Record
from raytrain2p.inference.predictor import Batch, Predictor
from tests.data.files import write_lines

ANSWER = "line one\nline two\x1b[31m\x9b2J\u202e"


@pytest.fixture
def asked(tiny_model: Path, drawings: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The records of each batch that a model was asked."""
    monkeypatch.chdir(drawings)
    monkeypatch.setenv("RAYTRAIN2P_HOME", str(tiny_model.parents[2]))
    batches, answer = list[list[str]](), Predictor._generate

    def counted(self: Predictor, records: Sequence[Record], *arguments: Any) -> Any:
        batches.append([record.where for record in records])
        return answer(self, records, *arguments)

    monkeypatch.setattr(Predictor, "_generate", counted)
    return batches


def run(*words: object, code: int = 0) -> None:
    assert predict.main(["--root", ".", "--max-new-tokens", "6", *map(str, words)]) == code


@pytest.fixture
def records(drawings: Path, tmp_path: Path) -> Path:
    rows = [{"instruction": "Who?", "image": f"{drawings}/{number}.png", "response": "red", "task": "colour"} for number in range(5)]
    return write_lines(tmp_path / "records.jsonl", *rows, {"instruction": "Say hello.", "response": "Hello."}, {"instruction": "Why?"})


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model says what no small one can be taught to say."""

    def batches(self: Predictor, records: Sequence[Record], *limits: int) -> Iterator[Batch]:
        yield 0, [ANSWER] * len(records)

    monkeypatch.setattr(Predictor, "batches", batches)


@pytest.mark.usefixtures("asked", "says")
def test_an_answer_cannot_control_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    run("What?")
    assert capsys.readouterr().out == "line one\nline two\\x1b[31m\\x9b2J\\u202e\n"


@pytest.mark.usefixtures("asked", "says")
def test_as_json_it_cannot_either_and_is_the_same_text(capsys: pytest.CaptureFixture[str]) -> None:
    run("What?", "--json")
    (line,) = capsys.readouterr().out.splitlines()
    assert line.isprintable()
    assert json.loads(line)["answer"] == ANSWER


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--image", ".", "What?"], "--image=.\n    is a directory"),
        (["--image", "0.png", "1.png", "What?"], "is 2 words or files: 1.png, What?"),
        (["--image", "0.png", "1.png"], "is missing: 1.png is a file"),
        (["--image", "0.png"], "the question\n    is missing\n"),
        ([], "the question\n    is missing\n"),
        ([" "], "the question\n    is empty\n"),
        (["--image", "0.png", "What", "is", "it?"], "is 3 words or files: What, is, it?"),
        (["--image", "none.png", "What?"], "--image=none.png\n    no such file"),
        (["--image", "x*.png", "What?"], "--image=x*.png\n    no file matches the pattern"),
        (["--image", "*.png", "--image", "0.png", "What?"], "is a pattern beside other media"),
        (["--image", "0.png", "<image> or <image>?"], "has 2 placeholders `<image>` for 1 media"),
        (["--image", "0.png", "--image", "1.png", "Who?"], "has 2 items of image; the model has learnt questions with at most 1"),
        (["--audio", "0.png", "What?"], "was trained with image, not with audio"),
        (["--file", "r.jsonl", "--image", "0.png"], "--file\n    has questions and media of its own"),
        (["--file", "none.jsonl", "nor.jsonl"], "2 problems"),
        (["--batch-size", "0", "--workers", "0", "What?"], "2 problems"),
        (["--output", "none/out.jsonl", "What?"], "there is no directory"),
        (["--output", ".", "What?"], "is a directory"),
    ],
)
def test_a_wrong_use_is_one_problem_in_plain_words(
    words: list[str], message: str, asked: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run(*words, code=2)
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert (captured.out, asked) == ("", [])


def test_a_pattern_asks_about_each_of_its_files(asked: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    run("--image", "[0-2].png", "Who?", "--json")
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["record"] for row in rows] == ["0.png", "1.png", "2.png"]
    assert all(row["question"] == "Who?" and "exact" not in row for row in rows)
    assert len(asked) == 1


@pytest.mark.usefixtures("asked")
def test_records_with_answers_are_scored_by_task(records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("--file", records, "--json")
    captured = capsys.readouterr()
    rows = [json.loads(line) for line in captured.out.splitlines()]
    assert [row.get("response") for row in rows] == ["red"] * 5 + ["Hello.", None]
    assert all(row["exact"] is False and row["f1"] == 0 for row in rows[:6])
    right = [{"instruction": row["question"], "response": row["answer"]} for row in rows[5:]]
    run("--file", write_lines(tmp_path / "right.jsonl", *right), records)
    lines = capsys.readouterr().err.splitlines()
    assert lines[-2:] == [
        "raytrain2p: all: exact match 66.67 %, token F1 66.67 % of 3 records",
        "raytrain2p: colour: exact match 0.00 %, token F1 0.00 % of 5 records",
    ]


def test_an_output_is_continued_and_only_what_changed_is_asked(asked: list[Any], records: Path, tmp_path: Path) -> None:
    path, words = tmp_path / "out.jsonl", ["--file", records, "--batch-size", 2, "--output", tmp_path / "out.jsonl"]
    run(*words)
    whole, sizes = path.read_bytes(), [len(batch) for batch in asked]
    assert sizes == [2, 2, 2, 1]
    lines = whole.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[4:6]) + b"".join(lines[:2]) + lines[2][:30])  # batches in another order, killed in the third
    asked.clear()
    run(*words)
    assert path.read_bytes() == whole, "in the order of the records, none lost and none twice"
    assert [len(batch) for batch in asked] == [2, 1]
    asked.clear()
    run(*words)
    assert (path.read_bytes(), asked) == (whole, [])
    with records.open("a") as stream:
        stream.write('{"instruction": "Why?"}\n{"instruction": "Whence?"}\n')
    run(*words)
    assert [where.rpartition(":")[2] for batch in asked for where in batch] == ["9"], "a question that is there already is not asked again"
    assert len(path.read_bytes().splitlines()) == 9


@pytest.mark.usefixtures("asked")
def test_a_command_that_is_stopped_says_how_to_continue(
    records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def batches(self: Predictor, records: Sequence[Record], *limits: int) -> Iterator[Batch]:
        yield 0, ["red", "red"]
        raise KeyboardInterrupt

    monkeypatch.setattr(Predictor, "batches", batches)
    run("--file", records, "--output", tmp_path / "out.jsonl", code=130)
    assert f"raytrain2p: 2 answers are in {tmp_path}/out.jsonl; the same command continues\n" in capsys.readouterr().err
