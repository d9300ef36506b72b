"""A trained assistant answers a program: whatever its run is called, from several threads, at once or piece by piece."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from raytrain2p.config import InputError
from raytrain2p.inference.model_file import find_model
from raytrain2p.inference.predictor import Predictor, in_order, pieces
from raytrain2p.inference.questions import as_records
from raytrain2p.tracking.run import Run
from raytrain2p.tracking.run_directory import RunDirectory
from tests.inference.models import RUN_ID

QUESTION = "What does the picture show?"


@pytest.fixture(scope="module")
def predictor(tiny_model: Path) -> Predictor:
    return Predictor(tiny_model)


def test_a_run_has_many_names(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, root = tiny_model.parent, tiny_model.parents[2]
    run = Run(RUN_ID, str(directory), "experiment", "20261126_120000", "launch", "phase2", "sqlite:///mlflow.db")
    names: list[Any] = [tiny_model, str(tiny_model), directory, str(directory), RUN_ID, RUN_ID[:6], "latest", run, RunDirectory(directory)]
    assert [find_model(name, root) for name in names] == [tiny_model] * len(names)
    monkeypatch.setenv("RAYTRAIN2P_HOME", str(root.parent))
    assert find_model("latest", root.name) == tiny_model, "a relative root is relative to the base directory, as in training"
    with pytest.raises(InputError, match="run=cd"):
        find_model("cd", root)


def test_what_is_called_answers_a_list_with_a_list_and_one_item_with_a_text(predictor: Predictor, drawings: Path) -> None:
    items: list[Any] = [drawings / "0.png", {"image": str(drawings / "1.png")}, "Say hello.", Image.open(drawings / "2.png")]
    answers = predictor(items, QUESTION, max_new_tokens=6)
    assert len(set(answers)) > 1, "the questions differ, and so do the answers"
    assert answers == list(predictor.answers(as_records(items, QUESTION), max_new_tokens=6))
    assert predictor(items, QUESTION, max_new_tokens=6, batch_size=1) == answers
    assert predictor(drawings / "0.png", QUESTION, max_new_tokens=6) == answers[0]
    assert predictor("Say hello.", max_new_tokens=6) == answers[2]
    assert predictor([]) == []


def test_what_cannot_be_asked_is_refused_before_the_first_answer(predictor: Predictor, drawings: Path) -> None:
    with pytest.raises(InputError, match="at least 1"):
        predictor("Who?", batch_size=0)
    with pytest.raises(InputError, match=r"(?s)item 1.*has no `instruction`"):
        predictor(drawings / "0.png")
    with pytest.raises(InputError, match="was trained with image, not with audio"):
        predictor({"instruction": "What was said?", "audio": str(drawings / "0.png")})


def test_a_streamed_answer_is_the_whole_answer(predictor: Predictor, drawings: Path) -> None:
    records = as_records([*sorted(drawings.glob("*.png")), "Say hello.", "Say it again, please."], QUESTION)
    answers = list(predictor.answers(records, 1, 40))
    streamed = [list(predictor.stream(record, 40)) for record in records]
    assert ["".join(one) for one in streamed] == answers
    assert sum(map(len, streamed)) > 3 * len(records), "in pieces, not at once"


def test_a_stream_that_is_closed_stops_the_model(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    hook = predictor.assistant.language_model.register_forward_hook(lambda *arguments: passes.append(1))
    stream = predictor.stream(as_records(["Say hello."])[0], 200)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    hook.remove()
    assert 0 < len(passes) < 150
    assert predictor("Say hello."), "it answers others now"


def test_an_error_while_streaming_reaches_the_reader(predictor: Predictor, drawings: Path, tmp_path: Path) -> None:
    path = tmp_path / "gone.png"
    path.write_bytes((drawings / "0.png").read_bytes())
    (record,) = as_records([path], QUESTION)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        list(predictor.stream(record))


def test_threads_get_the_answers_that_one_gets(predictor: Predictor, drawings: Path) -> None:
    paths = sorted(drawings.glob("*.png"))
    alone = [predictor(path, QUESTION, max_new_tokens=8) for path in paths]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda path: predictor(path, QUESTION, max_new_tokens=8), paths * 3))
        streamed = list(pool.map(lambda path: "".join(predictor.stream(as_records([path], QUESTION)[0], 8)), paths))
    assert together == alone * 3
    assert streamed == alone


def test_pieces_keep_characters_whole_and_white_space_for_what_follows(predictor: Predictor) -> None:
    def streamed(text: str) -> list[str]:
        ids = predictor.chat.tokenizer(text, add_special_tokens=False)["input_ids"]
        return list(pieces(([token] for token in ids), predictor.chat))

    assert streamed(" a é\n b  ") == ["a", " é", "\n b"]
    assert streamed("") == []
    half = predictor.chat.tokenizer("é", add_special_tokens=False)["input_ids"][:1]
    assert "".join(pieces(iter([half]), predictor.chat)) == predictor.chat.text(half), "a torn character at the very end"


def test_batches_in_any_order_become_answers_in_order() -> None:
    assert list(in_order([(2, ["c"]), (0, ["a", "b"]), (3, ["d", "e"])])) == list("abcde")


def test_it_needs_none_of_what_trains_and_prints_nothing(tiny_model: Path, drawings: Path) -> None:
    script = f"""
import sys
from raytrain2p.inference.predictor import Predictor
print(Predictor({str(tiny_model)!r})({{"instruction": "Who?", "image": {str(drawings / "0.png")!r}}}, max_new_tokens=4))
loaded = [name for name in ("ray", "mlflow", "pytorch_lightning", "lightning") if name in sys.modules]
assert not loaded, loaded
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
