"""`python -m raytrain2p.data check`: what it prints about bad data, and its exit codes."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from raytrain2p.data.__main__ import main


def jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).convert("RGB").save(buffer, "JPEG")
    return buffer.getvalue()


def pairs(folder: Path, *images: str) -> str:
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps({"text": f"text {number}", "image": image}) + "\n" for number, image in enumerate(images)))
    return str(path)


def test_good_data_passes_with_exit_code_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "good.jpg").write_bytes(jpeg())
    file = pairs(tmp_path, "good.jpg", "good.jpg")
    assert main(["check", file, "--phase", "1"]) == 0
    assert capsys.readouterr().out == (
        f"{file}: pair format, 2 good records\n{file}: 2 good records with 1 distinct image items, 0 problems\n"
    )


def test_a_truncated_jpeg_is_found_with_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "good.jpg").write_bytes(jpeg())
    (tmp_path / "torn.jpg").write_bytes(jpeg()[:-100])
    file = pairs(tmp_path, "good.jpg", "torn.jpg")
    assert main(["check", file, "--phase", "1"]) == 2
    out = capsys.readouterr().out
    assert f"{file}:2\n    image {tmp_path / 'torn.jpg'} does not decode: image file is truncated" in out
    assert f"{file}:1" not in out
    assert "1 problem\n" in out


def test_bad_records_and_bad_images_are_reported_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "torn.jpg").write_bytes(jpeg()[:-100])
    file = pairs(tmp_path, "torn.jpg", "absent.jpg")
    assert main(["check", file, "--phase", "1"]) == 2
    out = capsys.readouterr().out
    assert "does not decode" in out
    assert "no such image: absent.jpg" in out
    assert "2 problems" in out


def test_records_of_the_other_phase_do_not_pass(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "good.jpg").write_bytes(jpeg())
    assert main(["check", pairs(tmp_path, "good.jpg"), "--phase", "2"]) == 2
    out = capsys.readouterr().out
    assert "is in the format pair (of phase 1), which phase 2 does not take" in out
    assert "1 problem\n" in out


def test_the_embedded_set_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "emoji:test_concept", "--phase", "2"]) == 0
    assert "1,104 good records with 552 distinct image items" in capsys.readouterr().out


def test_marks_of_other_programs_without_media_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    marks = ("Picture 1: <img>cat.png</img>\nWhat is it?", "<video>\nWhat happens?", "<|image_1|>What?", "Compare <image 1>.", "1 < 2")
    file = tmp_path / "asked.jsonl"
    file.write_text("".join(json.dumps({"instruction": text, "response": "A cat."}) + "\n" for text in marks))
    assert main(["check", str(file), "--phase", "2"]) == 0
    assert f"{file}: 4 records without media have marks like `<img`, which stand for no media here" in capsys.readouterr().out


def test_a_file_without_a_record_does_not_pass_since_training_refuses_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", pairs(tmp_path), "--phase", "1"]) == 2
    assert "no record" in capsys.readouterr().out


def test_thousands_of_problems_alike_are_a_few_lines_and_all_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", pairs(tmp_path, *(f"absent{number}.jpg" for number in range(13_202))), "--phase", "1"]) == 2
    out = capsys.readouterr().out
    assert len(out.splitlines()) < 30
    assert "... and 13,197 more like it" in out
    assert "13,202 problems\n" in out


def test_text_of_the_data_does_not_reach_the_terminal_raw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "pairs.jsonl"
    bad = {"text": "a", "image": "\x1b[31m.jpg", "\x1b]0;title\x07\ud83d": 1}
    path.write_text(json.dumps({"text": "a", "image": "b"}) + "\n" + json.dumps(bad) + "\n")
    assert main(["check", str(path), "--phase", "1"]) == 2
    out = capsys.readouterr().out
    assert "\\x1b[31m" in out
    assert "\x1b" not in out
    out.encode()


def test_several_files_are_listed_with_their_formats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "good.jpg").write_bytes(jpeg())
    pairs(tmp_path, "good.jpg")
    turns = [{"from": "human", "value": "<image>What is it?"}, {"from": "gpt", "value": "Noise."}]
    (tmp_path / "chat.json").write_text(json.dumps([{"image": "good.jpg", "conversations": turns}]))
    assert main(["check", f"{tmp_path}/*.json*", "--phase", "1"]) == 0
    out = capsys.readouterr().out
    assert f"{tmp_path}/chat.json: llava format, 1 good records" in out
    assert f"{tmp_path}/pairs.jsonl: pair format, 1 good records" in out


@pytest.mark.parametrize("arguments", [["check", "emoji:val"], ["check", "emoji:val", "--phase", "3"], []])
def test_a_mistyped_command_has_exit_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_a_missing_file_is_told_without_a_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "raytrain2p.data", "check", str(tmp_path / "absent.jsonl"), "--phase", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    assert "no such file" in done.stderr
    assert "Traceback" not in done.stderr


def test_output_whose_reader_went_away_or_whose_encoding_lacks_characters_ends_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "ö.jpg").write_bytes(jpeg())
    command = [sys.executable, "-m", "raytrain2p.data", "check", pairs(tmp_path, "ö.jpg"), "--phase", "1"]
    command[4] = str(Path(command[4]).rename(tmp_path / "ö.jsonl"))
    done = subprocess.run(command, capture_output=True, check=False, timeout=120, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"\\xf6.jsonl: pair format, 1 good records" in done.stdout
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(120) == 141


def test_a_plot_that_cannot_be_written_is_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "good.jpg").write_bytes(jpeg())
    assert main(["stats", pairs(tmp_path, "good.jpg"), "--phase", "1", "--png", "/proc/plot.png"]) == 2
    assert "--png /proc/plot.png\n    cannot be written" in capsys.readouterr().err
