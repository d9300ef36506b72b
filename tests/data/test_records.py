"""Records of both phases from JSON Lines, Parquet and the embedded set, and the problems of bad ones."""

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from raytrain2p.config import InputError, Problem
from raytrain2p.data.checks import image_problems, read_media_keys
from raytrain2p.data.emoji import SPLITS
from raytrain2p.data.media import ImageRef, content_key, decode_image, decoding_error
from raytrain2p.data.records import ALL_TASKS, Record, read_records, scan_records


def encoded(colour: str, kind: str = "PNG", size: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), colour).save(buffer, kind)
    return buffer.getvalue()


def write_lines(path: Path, *lines: Any) -> Path:
    """A JSON Lines file; a `str` is written as it stands, everything else as JSON."""
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]], group: int = 2) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=group)
    return path


def problems_of(path: Path, phase: int) -> list[Problem]:
    with pytest.raises(InputError) as caught:
        read_records(str(path), phase)
    return caught.value.problems


@pytest.fixture
def image(tmp_path: Path) -> str:
    (tmp_path / "red.png").write_bytes(encoded("red"))
    return "red.png"


def test_phase_1_records_are_text_and_image(tmp_path: Path, image: str) -> None:
    path = write_lines(tmp_path / "pairs.jsonl", {"text": "a red square", "image": image})
    (record,) = read_records(str(path), 1)
    assert record == Record(where=f"{path}:1", image=ImageRef(str(tmp_path / image)), text="a red square")


def test_phase_2_records_may_go_without_image_and_task(tmp_path: Path, image: str) -> None:
    rows = [{"instruction": "Colour?", "response": "red", "image": image, "task": "colour"}, {"instruction": "Hi", "response": "Hello"}]
    seen, plain = read_records(str(write_lines(tmp_path / "chat.jsonl", *rows)), 2)
    assert (seen.instruction, seen.response, seen.task) == ("Colour?", "red", "colour")
    assert seen.image == ImageRef(str(tmp_path / image))
    assert (plain.image, plain.task) == (None, ALL_TASKS)


def test_image_paths_are_relative_to_the_file_and_may_be_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "with: colon" / "images"
    folder.mkdir(parents=True)
    (folder / "blue.png").write_bytes(encoded("blue"))
    rows = [{"text": "a", "image": "images/blue.png"}, {"text": "b", "image": str(folder / "blue.png")}]
    path = write_lines(folder.parent / "pairs.jsonl", *rows)
    monkeypatch.chdir("/")
    for record in read_records(str(path), 1):
        assert record.image is not None
        assert record.image.read() == encoded("blue")


def test_blank_lines_are_skipped_but_counted(tmp_path: Path, image: str) -> None:
    path = write_lines(tmp_path / "pairs.jsonl", "", {"text": "a", "image": image}, "   ", {"text": "b", "image": image})
    assert [record.where for record in read_records(str(path), 1)] == [f"{path}:2", f"{path}:4"]


def test_every_bad_record_is_told_at_once_with_its_line_and_cause(tmp_path: Path, image: str) -> None:
    path = write_lines(
        tmp_path / "pairs.jsonl",
        {"text": "good", "image": image},
        '{"text": "torn',
        [1, 2],
        {"image": image},
        {"text": 7, "image": image},
        {"text": "  ", "image": image},
        {"text": "lost", "image": "absent.png"},
        {"text": "two faults", "image": ["a"]} | {"text": None},
    )
    problems = problems_of(path, 1)
    lines = [int(problem.where.removeprefix(f"{path}:")) for problem in problems]
    assert lines == [2, 3, 4, 5, 6, 7, 8, 8]
    causes = dict(zip(lines[:6], (problem.what for problem in problems), strict=False))
    assert causes[2].startswith("is not JSON: ")
    assert causes[3] == "is a list, required is a JSON object"
    assert causes[4] == "has no `text`"
    assert causes[5] == "`text` is a int, required is text"
    assert causes[6] == "`text` is empty"
    assert causes[7] == "no such image: absent.png"
    assert {problem.what for problem in problems[6:]} == {"has no `text`", "`image` is a list, required is text"}


@pytest.mark.parametrize("line", ['"just words"', "17", "null", "true"])
def test_json_that_is_no_object_is_called_that(tmp_path: Path, line: str) -> None:
    (problem,) = problems_of(write_lines(tmp_path / "pairs.jsonl", line), 1)
    assert problem.what.endswith("required is a JSON object")


def test_bytes_that_are_no_text_are_a_bad_line_and_not_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b'{"text": "\xff\xfe\xfa"}\n')
    (problem,) = problems_of(path, 1)
    assert problem.where == f"{path}:1"
    assert problem.what.startswith("is not JSON")


@pytest.mark.parametrize(("name", "value"), [("instruction", None), ("response", None), ("response", ""), ("task", 3), ("image", "no.png")])
def test_phase_2_fields_are_checked_too(tmp_path: Path, name: str, value: Any) -> None:
    path = write_lines(tmp_path / "chat.jsonl", {"instruction": "Colour?", "response": "red", name: value})
    (problem,) = problems_of(path, 2)
    assert name in problem.what
    assert problem.where == f"{path}:1"


def test_the_response_may_be_left_out_where_nothing_is_learnt(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "ask.jsonl", {"instruction": "Colour?"})
    (record,) = read_records(str(path), 2, answered=False)
    assert (record.instruction, record.response) == ("Colour?", "")
    assert "response" in problems_of(path, 2)[0].what


def test_a_scan_gives_the_good_records_beside_the_problems(tmp_path: Path, image: str) -> None:
    path = write_lines(tmp_path / "pairs.jsonl", {"text": "a", "image": image}, "{", {"text": "b", "image": image})
    records, problems = scan_records(str(path), 1)
    assert [record.text for record in records] == ["a", "b"]
    assert [problem.where for problem in problems] == [f"{path}:2"]


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "none.jsonl")
    (problem,) = problems_of(path, 1)
    assert problem.what == "holds no record"
    assert str(path) in problem.where


def test_an_unknown_suffix_names_those_that_are_read(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "pairs.csv", "text,image")
    with pytest.raises(InputError) as caught:
        read_records(str(path), 1, "data.val")
    (problem,) = caught.value.problems
    assert problem.where == f"data.val={path}"
    assert "`.csv`" in problem.what
    assert ".jsonl or .parquet" in problem.fix


def test_a_missing_file_is_told_with_the_setting_it_came_from(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.train=.*absent\.jsonl\n    no such file"):
        read_records(str(tmp_path / "absent.jsonl"), 1, "data.train")


def test_parquet_images_are_read_from_bytes_or_from_a_path(tmp_path: Path, image: str) -> None:
    colours = ["green", "blue", "white", "black", "yellow"]
    rows: list[dict[str, Any]] = [{"text": colour, "image": {"bytes": encoded(colour), "path": f"{colour}.png"}} for colour in colours]
    rows.insert(2, {"text": "red", "image": {"bytes": None, "path": image}})
    records = read_records(str(write_parquet(tmp_path / "pairs.parquet", rows)), 1)
    assert [record.text for record in records] == [row["text"] for row in rows]
    for record in records:
        assert record.image is not None
        assert record.image.read() == encoded(record.text)
    assert records[2].image == ImageRef(str(tmp_path / image))


def test_bad_parquet_rows_are_told_by_number(tmp_path: Path) -> None:
    good = {"bytes": encoded("red"), "path": None}
    rows: list[dict[str, Any]] = [
        {"text": "a", "image": good},
        {"text": None, "image": good},
        {"text": "c", "image": {"bytes": None, "path": "absent.png"}},
        {"text": "d", "image": {"bytes": None, "path": None}},
    ]
    path = write_parquet(tmp_path / "pairs.parquet", rows)
    found = {problem.where.removeprefix(f"{path}:"): problem.what for problem in problems_of(path, 1)}
    assert found == {"row 1": "has no `text`", "row 2": "no such image: absent.png", "row 3": "has no `image`"}


def test_a_torn_parquet_file_is_refused(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "pairs.parquet", [{"text": "a", "image": {"bytes": encoded("red"), "path": None}}])
    path.write_bytes(path.read_bytes()[:-20])
    (problem,) = problems_of(path, 1)
    assert "is not a readable Parquet file" in problem.what


def test_the_embedded_set_has_its_published_sizes() -> None:
    counts = {split: len(read_records(f"emoji:{split}", 1)) for split in SPLITS}
    assert counts["train"] + counts["val"] == 2120
    assert counts["test_drawing"] == 1060
    assert counts["test_concept"] == 552
    assert 2120 / 30 < counts["val"] < 2120 / 12  # about one in 20


def test_phase_2_asks_two_questions_about_each_embedded_drawing() -> None:
    for split in SPLITS:
        drawings, questions = read_records(f"emoji:{split}", 1), read_records(f"emoji:{split}", 2)
        assert Counter(question.task for question in questions) == {"group": len(drawings), "name": len(drawings)}
        assert {question.image for question in questions} == {drawing.image for drawing in drawings}
        assert len({question.instruction for question in questions}) == 2


def test_no_embedded_drawing_is_in_two_splits() -> None:
    images = [record.image for split in SPLITS for record in read_records(f"emoji:{split}", 1)]
    assert len(images) == len(set(images)) == 3732


def test_unseen_concepts_are_never_trained_on() -> None:
    concepts = {split: {record.text for record in read_records(f"emoji:{split}", 1)} for split in SPLITS}
    assert not concepts["test_concept"] & (concepts["train"] | concepts["val"] | concepts["test_drawing"])


@pytest.mark.parametrize("split", ["val", "test_drawing"])
def test_concepts_of_held_out_drawings_are_known_from_training(split: str) -> None:
    trained = {record.text for record in read_records("emoji:train", 1)}
    assert not {record.text for record in read_records(f"emoji:{split}", 1)} - trained


def test_an_unknown_split_of_the_embedded_set_names_the_valid_ones() -> None:
    with pytest.raises(InputError) as caught:
        read_records("emoji:test", 1, "data.test")
    (problem,) = caught.value.problems
    assert problem.where == "data.test=emoji:test"
    assert all(split in problem.fix for split in SPLITS)


def test_transparent_parts_become_white() -> None:
    buffer = io.BytesIO()
    Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(buffer, "PNG")
    image = decode_image(buffer.getvalue())
    assert image.mode == "RGB"
    assert image.getpixel((0, 0)) == (255, 255, 255)


def test_torn_images_and_other_files_have_a_cause_and_whole_ones_none() -> None:
    whole = encoded("red", "JPEG", size=64)
    assert decoding_error(whole) is None
    assert "truncated" in (decoding_error(whole[:-40]) or "")
    assert decoding_error(b"no image at all")
    assert decoding_error(b"")


def test_an_image_that_does_not_decode_is_reported_for_every_record_that_has_it(tmp_path: Path, image: str) -> None:
    (tmp_path / "torn.jpg").write_bytes(encoded("red", "JPEG", size=64)[:-40])
    rows = [{"text": str(number), "image": name} for number, name in enumerate(["torn.jpg", image, "torn.jpg"])]
    path = write_lines(tmp_path / "pairs.jsonl", *rows)
    records = read_records(str(path), 1)
    problems = image_problems(records)
    assert [problem.where for problem in problems] == [f"{path}:1", f"{path}:3"]
    assert all("torn.jpg does not decode: image file is truncated" in problem.what for problem in problems)
    assert image_problems(records, known=lambda image: True) == []


def test_equal_images_have_one_key_wherever_they_are(tmp_path: Path, image: str) -> None:
    path = write_parquet(tmp_path / "pairs.parquet", [{"text": "a", "image": {"bytes": encoded("red"), "path": None}}])
    refs = [ImageRef(str(tmp_path / image)), ImageRef(str(path), 0)]
    assert read_media_keys([*refs, refs[0]]) == dict.fromkeys(refs, content_key(encoded("red")))
