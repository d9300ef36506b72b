"""`predict` prints what a model says, and a model may say anything."""

import json
from pathlib import Path
from typing import Any

import pytest

from raytrain2p import predict

ANSWER = "line one\nline two\x1b[31m\x9b2J\u202e"


class Predictor:
    """Answers as no small model can be taught to."""

    def __init__(self, path: Path) -> None:
        pass

    def check(self, *arguments: Any) -> None:
        pass

    def answers(self, *arguments: Any) -> list[str]:
        return [ANSWER]


@pytest.fixture(autouse=True)
def model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predict, "Predictor", Predictor)
    monkeypatch.setattr(predict, "find_artifact", lambda *arguments: Path("model.pt"))


def test_an_answer_cannot_control_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert predict.main(["What?"]) == 0
    assert capsys.readouterr().out == "line one\nline two\\x1b[31m\\x9b2J\\u202e\n"


def test_as_json_it_cannot_either_and_is_the_same_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert predict.main(["What?", "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.isprintable()
    assert json.loads(line)["answer"] == ANSWER
