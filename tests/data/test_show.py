"""`data show` and `data stats`: what they print of records whose tokens and media are known."""

from pathlib import Path

import pytest
from PIL import Image

from raytrain2p.data.__main__ import main
from tests.data.files import write_lines


@pytest.fixture
def file(tmp_path: Path) -> Path:
    for name, colour in (("red", "red"), ("blue", "blue"), ("copy", "red")):
        Image.new("RGB", (8, 6), colour).save(tmp_path / f"{name}.png")
    turns = [("human", "<image>Then <image>?"), ("gpt", "blue"), ("human", "Sure?"), ("gpt", "yes")]
    rows = [
        {"image": ["red.png", "blue.png"], "conversations": [{"from": who, "value": text} for who, text in turns]},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello\x1b[31m"}]},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello\x1b[31m"}]},
    ]
    return write_lines(tmp_path / "turns.jsonl", *rows)


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 0
    return capsys.readouterr().out


def test_a_record_is_shown_as_the_model_sees_it(file: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(capsys, "show", str(file), "--records", "1", "--language-model", str(tiny_llama), "--soft-tokens", "4")
    folder = file.parent
    assert f"⟨image {folder}/red.png: 4 tokens⟩Then ⟨image {folder}/blue.png: 4 tokens⟩?<|im_end|>" in out
    assert "assistant\n⟦blue<|im_end|>⟧\n<|im_start|>user\nSure?<|im_end|>" in out
    assert "⟦yes<|im_end|>⟧" in out
    assert "of them 8 soft and 9 learnt" in out
    last = printed(capsys, "show", str(file), "--records", "1", "--language-model", str(tiny_llama), "--loss-on", "last")
    assert "blue<|im_end|>\n" in last
    assert last.count("⟦") == 2, "the last answer, and the legend"


def test_text_of_a_record_cannot_control_the_terminal(file: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(capsys, "show", str(file), "--language-model", str(tiny_llama))
    assert "\x1b" not in out
    assert r"Hello\x1b[31m" in out


def test_statistics_count_turns_media_duplicates_and_what_a_test_file_shares(
    file: Path, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    test = write_lines(tmp_path / "test.jsonl", {"instruction": "Colour?", "response": "red", "image": "copy.png"})
    chart = tmp_path / "lengths.png"
    arguments = ["--language-model", str(tiny_llama), "--soft-tokens", "4", "--test", str(test), "--png", str(chart)]
    out = printed(capsys, "stats", str(file), *arguments)
    assert "records     3\n" in out
    assert "turns       1: 2, 2: 1\n" in out
    assert "image       2 distinct; per record 0: 2, 2: 1; sizes 8 x 6: 2\n" in out
    assert "duplicates  1 records are equal to an earlier one\n" in out
    assert f"in both     1 media items are in {test} too\n" in out, "by content: the file has another name"
    assert sum(line.count("█") > 0 for line in out.splitlines()) == 2, "two lengths"
    with Image.open(chart) as image:
        assert image.format == "PNG"


def test_a_pair_is_shown_by_modality(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    file = write_lines(tmp_path / "pairs.jsonl", {"text": "a cat", "image": "a.png", "concept": "cat"})
    out = printed(capsys, "show", str(file), "--phase", "1")
    assert out.split() == [f"{file}:1", "image", f"{tmp_path}/a.png", "text", "a", "cat", "concept", "cat"]
    assert "characters  5 in all" in printed(capsys, "stats", str(file), "--phase", "1")


def test_bad_records_are_refused_as_in_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_lines(tmp_path / "bad.jsonl", {"instruction": "Hi", "response": ""})
    for verb in ("show", "stats"):
        assert main([verb, str(file)]) == 2
        assert "`response` is empty" in capsys.readouterr().err
