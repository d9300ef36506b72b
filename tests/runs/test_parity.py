"""`runs parity` asks each way the same questions and compares. The ways themselves take minutes: tests/use/test_parity.py."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from raytrain2p.runs import __main__ as runs
from raytrain2p.runs import parity
from raytrain2p.runs.parity import Asked
from raytrain2p.tracking.run import Run
from tests.data.files import write_lines
from tests.runs.made import printed, trained
from tests.serving.serving import png
from tests.tracking.stores import begin, settings_in

Ways = dict[str, Callable[[Asked], list[str]]]


@pytest.fixture
def run(tmp_path: Path, made_store: Path) -> Run:
    """A run of phase 2 whose test split has two files, one with a conversation that is no single question."""
    (tmp_path / "red.png").write_bytes(png())
    turns = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))]
    one = write_lines(tmp_path / "one.jsonl", {"instruction": "<image>Which?", "response": "red", "image": "red.png"})
    two = write_lines(tmp_path / "two.jsonl", {"messages": [{"role": "user", "content": "And what?"}, turns[1]]}, {"messages": turns})
    shutil.copy(made_store / "mlflow.db", tmp_path)
    run = trained(begin(settings_in(tmp_path, f"data.test={json.dumps({'both': [str(one), str(two)]})}")), "a", [1.0])
    (run.path / "model.pt").write_bytes(b"weights")
    return run


def compare(run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], ways: Ways, code: int) -> list[Any]:
    monkeypatch.setattr(parity, "WAYS", ways)
    found: list[Any] = printed(run.path.parent.parent, capsys, "parity", "a", code=code)
    return found


def texts(rows: Sequence[Any]) -> list[str]:
    return [row["instruction"] for row in rows]


def test_each_way_is_asked_the_single_questions_of_all_files_of_the_split(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Asked] = []

    def way(given: Asked) -> list[str]:
        asked.append(given)
        assert Path(given.rows[0]["image"]).read_bytes() == png()
        assert given.chats[0][0]["content"][0] == {"type": "image", "image": given.rows[0]["image"]}
        return texts(given.rows)

    found = compare(run, monkeypatch, capsys, {"one": way, "two": way}, code=0)
    assert [(one["way"], one["answers"], one["differ"]) for one in found] == [("one", 2, 0), ("two", 2, 0)]
    assert texts(asked[0].rows) == ["<image>Which?", "And what?"]
    assert not asked[0].folder.exists()


def test_answers_that_differ_are_counted_and_shown_and_a_way_that_fails_does_not_stop_the_others(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(asked: Asked) -> list[str]:
        raise ValueError("exit code 1: no space left")

    ways: Ways = {
        "one": lambda asked: ["red", "blue"],
        "broken": broken,
        "two": lambda asked: ["red", "green"],
        "three": lambda asked: ["red"],
    }
    found = compare(run, monkeypatch, capsys, ways, code=1)
    assert [(one["way"], one["differ"], one["problem"]) for one in found] == [
        ("one", 0, ""),
        ("broken", 2, "exit code 1: no space left"),
        ("two", 1, ""),
        ("three", 1, ""),
    ]
    assert found[2]["examples"] == ["'green', one has 'blue'"]


def test_a_run_without_a_test_split_needs_the_questions(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads(run.files.config.read_text())
    config["data"]["test"] = {}
    run.files.config.write_text(json.dumps(config))
    assert runs.main(["parity", "a", f"output.root={run.path.parent.parent}"]) == 2
    assert "the run has no test split" in capsys.readouterr().err
