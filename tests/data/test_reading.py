"""Records from JSON Lines, JSON arrays, Parquet and the embedded set: files, their formats, and where a bad record is."""

import json
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raytrain2p.config import InputError, Problem
from raytrain2p.data import files
from raytrain2p.data.embedded import EMBEDDED
from raytrain2p.data.media import MediaRef
from raytrain2p.data.reading import read_records, scan_source
from raytrain2p.data.records import ALL_TASKS, Message, Record

from .files import encoded, write_array, write_lines, write_parquet, write_records


def problems_of(path: Path, phase: int) -> list[Problem]:
    with pytest.raises(InputError) as caught:
        read_records(str(path), phase)
    return caught.value.problems


def texts(records: list[Record]) -> list[str]:
    return [record.messages[-1].text for record in records]


def image_of(record: Record) -> MediaRef:
    (ref,) = record.media()
    return ref


@pytest.fixture
def image(tmp_path: Path) -> str:
    (tmp_path / "red.png").write_bytes(encoded("red"))
    return "red.png"


def test_phase_1_records_are_media_and_what_the_assistant_says(tmp_path: Path, image: str) -> None:
    path = write_lines(tmp_path / "pairs.jsonl", {"text": "a red square", "image": image})
    (record,) = read_records(str(path), 1)
    ref = MediaRef("image", str(tmp_path / image))
    assert record == Record(f"{path}:1", (Message("user", (ref,)), Message("assistant", ("a red square",))))
    assert record.by_modality() == {"text": "a red square", "image": ref}


def test_phase_2_records_may_go_without_image_and_task(tmp_path: Path, image: str) -> None:
    rows = [{"instruction": "Colour?", "response": "red", "image": image, "task": "colour"}, {"instruction": "Hi", "response": "Hello"}]
    seen, plain = read_records(str(write_lines(tmp_path / "chat.jsonl", *rows)), 2)
    assert ([message.text for message in seen.messages], seen.task) == (["Colour?", "red"], "colour")
    assert image_of(seen) == MediaRef("image", str(tmp_path / image))
    assert (list(plain.media()), plain.task) == ([], ALL_TASKS)


def test_image_paths_are_relative_to_the_file_and_may_be_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "with: colon" / "images"
    folder.mkdir(parents=True)
    (folder / "blue.png").write_bytes(encoded("blue"))
    rows = [{"text": "a", "image": "images/blue.png"}, {"text": "b", "image": str(folder / "blue.png")}]
    path = write_lines(folder.parent / "pairs.jsonl", *rows)
    monkeypatch.chdir("/")
    for record in read_records(str(path), 1):
        assert image_of(record).read() == encoded("blue")


def test_blank_lines_are_skipped_but_counted(tmp_path: Path, image: str) -> None:
    path = write_lines(tmp_path / "pairs.jsonl", "", {"text": "a", "image": image}, "   ", {"text": "b", "image": image})
    assert [record.where for record in read_records(str(path), 1)] == [f"{path}:2", f"{path}:4"]


@pytest.mark.parametrize("line", ['"just words"', "17", "null", "true"])
def test_json_that_is_no_object_is_called_that(tmp_path: Path, line: str) -> None:
    (problem,) = problems_of(write_lines(tmp_path / "pairs.jsonl", line), 1)
    assert problem.what.endswith("required is a JSON object")


@pytest.mark.parametrize(("name", "where"), [("pairs.jsonl", "1"), ("pairs.json", "byte 0")])
def test_bytes_that_are_no_text_are_a_bad_record_and_not_a_crash(tmp_path: Path, name: str, where: str) -> None:
    path = tmp_path / name
    path.write_bytes(b'[{"text": "\xff\xfe\xfa"}]\n')
    (problem,) = problems_of(path, 1)
    assert problem.where == f"{path}:{where}"
    assert problem.what.startswith("is not JSON")


@pytest.mark.parametrize("ending", ["jsonl", "json"])
def test_a_byte_order_mark_is_no_part_of_the_first_record(tmp_path: Path, ending: str) -> None:
    url = "data:image/png;base64,iVBORw0K"
    path = write_records(tmp_path / f"pairs.{ending}", {"text": "a", "image": url}, {"text": "b", "image": url})
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert [image_of(record).read() for record in read_records(str(path), 1)] == [b"\x89PNG\r\n"] * 2


def test_a_scan_gives_the_good_records_beside_the_problems(tmp_path: Path, image: str) -> None:
    path = write_lines(tmp_path / "pairs.jsonl", {"text": "a", "image": image}, "{", {"text": "b", "image": image})
    scan = scan_source(str(path), 1)
    assert texts(scan.records) == ["a", "b"]
    assert [problem.where for problem in scan.problems] == [f"{path}:2"]
    assert scan.files == [(str(path), "pair", 2)]


@pytest.mark.parametrize("content", ["", "[]", " [ ] \n"])
def test_an_empty_file_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / ("none.json" if content else "none.jsonl")
    path.write_text(content)
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
    assert ".jsonl or .json or .parquet" in problem.fix


def test_a_missing_file_is_named_with_the_setting_it_came_from(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.train=.*absent\.jsonl\n    no such file"):
        read_records(str(tmp_path / "absent.jsonl"), 1, "data.train")


def test_a_directory_is_refused_with_the_pattern_to_write(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is a directory\n.*\*\.parquet"):
        read_records(str(tmp_path), 1)


def test_a_pattern_takes_its_files_in_order_each_in_its_own_format(tmp_path: Path, image: str) -> None:
    write_lines(tmp_path / "b.jsonl", {"text": "b", "image": image})
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a"}]
    write_array(tmp_path / "a.json", {"image": image, "conversations": turns})
    write_parquet(tmp_path / "c.parquet", {"text": "c", "image": image})
    scan = scan_source(str(tmp_path / "*.*[tln]"), 1)
    assert texts(scan.records) == ["a", "b", "c"]
    assert [(Path(path).name, kind, count) for path, kind, count in scan.files] == [
        ("a.json", "llava", 1),
        ("b.jsonl", "pair", 1),
        ("c.parquet", "pair", 1),
    ]


def test_a_pattern_that_matches_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no file matches the pattern"):
        read_records(str(tmp_path / "*.jsonl"), 1)


def test_a_file_whose_name_looks_like_a_pattern_is_read(tmp_path: Path, image: str) -> None:
    assert len(read_records(str(write_lines(tmp_path / "part[1].jsonl", {"text": "a", "image": image})), 1)) == 1


@pytest.mark.parametrize("phase", [1, 2])
def test_a_file_in_the_format_of_the_other_phase_is_one_problem(tmp_path: Path, image: str, phase: int) -> None:
    row = {"text": "a", "image": image} if phase == 2 else {"instruction": "Hi", "response": "Hello"}
    (problem,) = problems_of(write_lines(tmp_path / "data.jsonl", *[row] * 1000), phase)
    assert f"which phase {phase} does not take" in problem.what
    assert "llava (id, image, conversations)" in problem.fix


def test_a_file_in_no_format_is_one_problem_that_names_its_keys(tmp_path: Path) -> None:
    (problem,) = problems_of(write_lines(tmp_path / "data.jsonl", *[{"prompt": "Hi", "output": "Hello"}] * 1000), 2)
    assert problem.what == "is in no known format: its records have `output`, `prompt`"


def test_the_format_follows_from_the_first_records_together(tmp_path: Path, image: str) -> None:
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    seen = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "red"}]
    rows = [{"conversations": turns}] * 20 + [{"conversations": seen, "images": [image]}]
    scan = scan_source(str(write_lines(tmp_path / "data.jsonl", "{", *rows)), 2)
    assert scan.files == [(str(tmp_path / "data.jsonl"), "sharegpt", 21)]
    assert len(scan.problems) == 1


@pytest.mark.parametrize("text_only", [20, 1000])
def test_the_format_is_that_of_the_whole_file_if_the_first_records_have_fewer_keys(tmp_path: Path, image: str, text_only: int) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    seen = [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "red"}]
    rows = [{"messages": turns}] * text_only + [{"messages": seen, "images": [image]}]
    scan = scan_source(str(write_lines(tmp_path / "data.jsonl", *rows)), 2)
    assert scan.files == [(str(tmp_path / "data.jsonl"), "sharegpt", text_only + 1)]
    assert not scan.problems


def test_a_json_array_is_read_in_pieces_of_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"n": 10**number, "text": 'é€\N{GRINNING FACE}\\"\n' * number, "list": [{"a": -1.5e3}, None, True]} for number in range(9)]
    path = tmp_path / "rows.json"
    path.write_text(" \n" + json.dumps(rows, indent=2, ensure_ascii=False) + "\n ")
    content = path.read_bytes()
    for size in (1, 2, 3, 7, 64, 1 << 20):
        monkeypatch.setattr(files, "PIECE", size)
        found = list(files.rows(path))
        assert [row.value for row in found] == rows
        assert [row.where for row in found] == [f"{path}:item {number}" for number in range(9)]
        for row in found:
            assert json.JSONDecoder().raw_decode(content[row.start :].decode())[0] == row.value


def test_numbers_in_an_array_are_not_cut_at_the_end_of_a_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PIECE", 1)
    path = tmp_path / "rows.json"
    path.write_text("[123, 456,\ttrue , -Infinity]")
    assert [row.value for row in files.rows(path)] == [123, 456, True, float("-inf")]


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        ('[{"text": "a", "image": "red.png"}, {"text": "b', "is not JSON: Unterminated string"),
        ('[{"text": "a", "image": "red.png"} {"text": "b"}]', "is not JSON: found '{' where `,` or `]` is required"),
        ('[{"text": "a", "image": "red.png"}', "is not JSON: found '' where `,` or `]` is required"),
        ('[{"text": "a", "image": "red.png"},]', "is not JSON: Expecting value"),
        ('[{"text": "a", "image": "red.png"}, {"text": b}, ' + " " * 100 + "]", "is not JSON: Expecting value"),
        ('[{"text": "a", "image": "red.png"}] []', "is not JSON: there is more text after the array"),
    ],
)
def test_a_torn_array_keeps_the_records_before_the_place_that_is_named(tmp_path: Path, image: str, content: str, cause: str) -> None:
    path = tmp_path / "pairs.json"
    path.write_text(content)
    scan = scan_source(str(path), 1)
    assert texts(scan.records) == ["a"]
    (problem,) = scan.problems
    assert problem.where.startswith(f"{path}:byte 3")
    assert problem.what.startswith(cause)


def test_an_error_early_in_a_large_array_is_found_without_reading_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "pairs.json"
    path.write_text('[{"text": oops}, ' + '{"text": "a"},' * 1_000_000)
    tracemalloc.start()
    (row,) = files.rows(path)
    assert tracemalloc.get_traced_memory()[1] < 5 * files.PIECE
    tracemalloc.stop()
    assert isinstance(row.value, Problem)


@pytest.mark.parametrize(("content", "found"), [('{"text": "a"}\n{"text": "b"}', "begins with '{'"), (" ", "is empty")])
def test_json_that_is_no_array_is_one_problem(tmp_path: Path, content: str, found: str) -> None:
    path = tmp_path / "pairs.json"
    path.write_text(content)
    (problem,) = problems_of(path, 1)
    assert problem.what == f"{found}, required is a JSON array"
    assert "jsonl" in problem.fix


def test_an_array_in_a_jsonl_file_is_explained(tmp_path: Path) -> None:
    (problem,) = problems_of(write_lines(tmp_path / "pairs.jsonl", [{"text": "a"}]), 1)
    assert ".json file" in problem.fix


def test_parquet_images_are_read_from_bytes_or_from_a_path(tmp_path: Path, image: str) -> None:
    colours = ["green", "blue", "white", "black", "yellow"]
    rows: list[dict[str, Any]] = [{"text": colour, "image": {"bytes": encoded(colour), "path": f"{colour}.png"}} for colour in colours]
    rows.insert(2, {"text": "red", "image": {"bytes": None, "path": image}})
    records = read_records(str(write_parquet(tmp_path / "pairs.parquet", *rows)), 1)
    assert texts(records) == [row["text"] for row in rows]
    for record in records:
        assert image_of(record).read() == encoded(record.messages[-1].text)
    assert image_of(records[2]) == MediaRef("image", str(tmp_path / image))
    assert image_of(records[1]) == MediaRef("image", str(tmp_path / "pairs.parquet"), 1, "image")


def test_parquet_lists_of_media_and_of_messages_are_read(tmp_path: Path, image: str) -> None:
    def row(*media: Any) -> dict[str, Any]:
        turns = [{"role": "user", "content": "<image>" * len(media) + "?"}, {"role": "assistant", "content": str(len(media))}]
        return {"messages": turns, "images": list(media), "system": None}

    blue, red = {"bytes": encoded("blue"), "path": None}, {"bytes": None, "path": image}
    path = write_parquet(tmp_path / "chat.parquet", row(), row(blue, red), row(red, blue, blue), row(blue), group=3)
    records = read_records(str(path), 2)
    assert texts(records) == ["0", "2", "3", "1"]
    found = [[ref.read() for ref in record.media()] for record in records]
    one, two = encoded("blue"), encoded("red")
    assert found == [[], [one, two], [two, one, one], [one]]
    assert [ref.place for ref in records[2].media()] == ["", "images.1", "images.2"]


def test_parquet_columns_of_bytes_or_data_urls_are_references_too(tmp_path: Path) -> None:
    rows = [{"text": "a", "image": encoded("red"), "audio": "data:audio/wav;base64,UklGRg=="}]
    (record,) = read_records(str(write_parquet(tmp_path / "pairs.parquet", *rows)), 1)
    assert [ref.read() for ref in record.media()] == [encoded("red"), b"RIFF"]


def test_the_bytes_of_parquet_media_never_become_python_objects(tmp_path: Path) -> None:
    rows = [{"text": str(number), "image": {"bytes": number.to_bytes(2, "big") * 5_000, "path": "a"}} for number in range(1, 600)]
    path = write_parquet(tmp_path / "pairs.parquet", *rows, group=600)
    read_records(str(path), 1)  # what is imported and cached at first is not counted
    tracemalloc.start()
    records = read_records(str(path), 1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(records) == 599
    assert peak < 1_000_000  # of 6 MB


def test_bad_parquet_rows_are_named_by_number(tmp_path: Path) -> None:
    good = {"bytes": encoded("red"), "path": None}
    rows: list[dict[str, Any]] = [
        {"text": "a", "image": good},
        {"text": None, "image": good},
        {"text": "c", "image": {"bytes": None, "path": "absent.png"}},
        {"text": "d", "image": {"bytes": None, "path": None}},
        {"text": "e", "image": {"bytes": b"", "path": None}},
    ]
    path = write_parquet(tmp_path / "pairs.parquet", *rows)
    found = {problem.where.removeprefix(f"{path}:"): problem.what for problem in problems_of(path, 1)}
    expected = ("has only `image`", "no such image: absent.png", "has only `text`", "`image` has no content")
    assert list(found.values()) == list(expected)


def test_empty_bytes_in_parquet_are_a_bad_record_and_not_a_text_only_one(tmp_path: Path) -> None:
    asked = {"instruction": "What?", "response": "A cat."}
    for cell, other in ((b"", encoded("red")), ({"bytes": b"", "path": None}, {"bytes": encoded("red"), "path": None})):
        path = write_parquet(tmp_path / "asked.parquet", asked | {"image": cell}, asked | {"image": other}, asked | {"image": None})
        (problem,) = problems_of(path, 2)
        assert (problem.where, problem.what) == (f"{path}:row 0", "`image` has no content")


@pytest.mark.parametrize("task", ["Q&A", "a/b", "..", "x" * 101, "two\nlines"])
def test_a_task_must_be_able_to_be_part_of_a_metrics_name(tmp_path: Path, task: str) -> None:
    """MLflow refuses other names, and the run would never be complete there."""
    asked = {"instruction": "What?", "response": "A cat."}
    good = [asked | {"task": name} for name in ("group", "größe 2.1", "a:b-c_d")]
    path = write_lines(tmp_path / "asked.jsonl", *good, asked | {"task": task})
    (problem,) = problems_of(path, 2)
    assert problem.where == f"{path}:4"
    assert problem.what.startswith("`task` is `")


def test_parquet_that_python_cannot_hold_is_refused(tmp_path: Path) -> None:
    torn = pa.array([b"\xff\xfe"]).view(pa.binary())
    pq.write_table(pa.table({"text": pa.Array.from_buffers(pa.string(), 1, torn.buffers())}), tmp_path / "torn.parquet")
    pq.write_table(pa.table({"text": ["a"], "id": pa.array([2**62], pa.duration("ms"))}), tmp_path / "long.parquet")
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["text", "text"]), tmp_path / "twice.parquet")
    for name in ("torn", "long", "twice"):
        (problem,) = problems_of(tmp_path / f"{name}.parquet", 1)
        assert "is not a readable Parquet file" in problem.what


def test_a_torn_parquet_file_is_refused(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "pairs.parquet", {"text": "a", "image": {"bytes": encoded("red"), "path": None}})
    path.write_bytes(path.read_bytes()[:-20])
    (problem,) = problems_of(path, 1)
    assert "is not a readable Parquet file" in problem.what


def test_a_torn_file_among_several_does_not_hide_the_others(tmp_path: Path, image: str) -> None:
    write_lines(tmp_path / "a.jsonl", {"text": "a", "image": "absent.png"})
    (tmp_path / "b.parquet").write_bytes(b"PAR1")
    write_lines(tmp_path / "c.jsonl", {"text": "c", "image": image})
    scan = scan_source(str(tmp_path / "?.*"), 1)
    assert texts(scan.records) == ["c"]
    assert len(scan.problems) == 2


def test_the_embedded_set_has_its_published_sizes() -> None:
    counts = {split: len(read_records(f"emoji:{split}", 1)) for split in EMBEDDED["emoji"].splits}
    assert counts["train"] + counts["val"] == 2120
    assert counts["test_drawing"] == 1060
    assert counts["test_concept"] == 552
    assert 2120 / 30 < counts["val"] < 2120 / 12  # about one in 20


def test_phase_2_asks_two_questions_about_each_embedded_drawing() -> None:
    for split in EMBEDDED["emoji"].splits:
        drawings, questions = read_records(f"emoji:{split}", 1), read_records(f"emoji:{split}", 2)
        assert Counter(question.task for question in questions) == {"group": len(drawings), "name": len(drawings)}
        assert {image_of(question) for question in questions} == {image_of(drawing) for drawing in drawings}
        assert len({question.messages[0].text for question in questions}) == 2


def test_no_embedded_drawing_is_in_two_splits() -> None:
    images = [image_of(record) for split in EMBEDDED["emoji"].splits for record in read_records(f"emoji:{split}", 1)]
    assert len(images) == len(set(images)) == 3732


def test_unseen_concepts_are_never_trained_on() -> None:
    concepts = {split: {record.concept for record in read_records(f"emoji:{split}", 1)} for split in EMBEDDED["emoji"].splits}
    assert not concepts["test_concept"] & (concepts["train"] | concepts["val"] | concepts["test_drawing"])


@pytest.mark.parametrize("split", ["val", "test_drawing"])
def test_concepts_of_held_out_drawings_are_known_from_training(split: str) -> None:
    trained = {record.concept for record in read_records("emoji:train", 1)}
    assert not {record.concept for record in read_records(f"emoji:{split}", 1)} - trained


def test_an_unknown_split_of_the_embedded_set_names_the_valid_ones() -> None:
    with pytest.raises(InputError) as caught:
        read_records("emoji:test", 1, "data.test")
    (problem,) = caught.value.problems
    assert problem.where == "data.test=emoji:test"
    assert all(split in problem.fix for split in EMBEDDED["emoji"].splits)


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.json"])
def test_a_key_that_comes_twice_is_a_bad_record(tmp_path: Path, image: str, name: str) -> None:
    """Python's reader of JSON takes the last one, others the first."""
    rows = [f'{{"text": "a", "image": "{image}"}}', f'{{"text": "a", "image": "{image}", "text": "b"}}']
    (tmp_path / name).write_text("\n".join(rows) if name.endswith("jsonl") else f"[{', '.join(rows)}]")
    scan = scan_source(str(tmp_path / name), 1)
    assert len(scan.records) == 1
    assert [problem.what for problem in scan.problems] == ["has the key `text` twice in one object"]


@pytest.mark.parametrize("name", ["x" * 300 + ".jsonl", "x/" * 3000 + "a.jsonl", "a\0.jsonl", "x" * 300 + "*.jsonl"])
def test_a_name_that_no_file_can_have_is_refused(name: str) -> None:
    with pytest.raises(InputError):
        scan_source(name, 1)
