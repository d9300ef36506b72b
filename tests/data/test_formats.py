"""Each format: its examples, the files they may be in, and the kinds of bad records, each named with its cause."""

import base64
from pathlib import Path
from typing import Any

import pytest

from raytrain2p.config import InputError
from raytrain2p.data.formats import FORMATS, Example, Format, format_of
from raytrain2p.data.media import MediaRef
from raytrain2p.data.reading import read_records, scan_source
from raytrain2p.data.records import Record

from .files import encoded, sound, write_examples_media, write_lines, write_records

CASES = [
    pytest.param(kind, example, phase, id=f"{kind.name}-{number}-phase{phase}")
    for kind in FORMATS.values()
    for number, example in enumerate(kind.examples)
    for phase in kind.phases
]
GOOD = [case for case in CASES if not case.values[1].problem]  # type: ignore[union-attr]
BAD = [case for case in CASES if case.values[1].problem]  # type: ignore[union-attr]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_examples_media(tmp_path)
    return tmp_path


def in_columns(row: dict[str, Any]) -> dict[str, Any]:
    """A row for Parquet, whose columns have one type: content is always a list if it is one anywhere."""
    messages = row.get("messages", ())
    if not any(isinstance(message["content"], list) for message in messages):
        return row
    parts = [one["content"] if isinstance(one["content"], list) else [{"type": "text", "text": one["content"]}] for one in messages]
    return row | {"messages": [one | {"content": content} for one, content in zip(messages, parts, strict=True)]}


def written(record: Record) -> tuple[str, ...]:
    """A record as the examples write it."""
    return tuple(
        f"{message.role}: " + "".join(f"[{Path(part.source).name}]" if isinstance(part, MediaRef) else part for part in message.parts)
        for message in record.messages
    )


@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize(("kind", "example", "phase"), GOOD)
def test_an_example_becomes_what_its_table_says_in_each_kind_of_file(
    folder: Path, kind: Format, example: Example, phase: int, ending: str
) -> None:
    path = write_records(folder / f"data.{ending}", in_columns(example.row) if ending == "parquet" else example.row)
    if phase == 1 and not any(name in str(example.row) for name in ("cat.png", "meow.wav")):
        assert scan_source(str(path), 1).problems[0].what == "has no media"
    elif phase == 1 and "dog.png" in str(example.row):
        assert scan_source(str(path), 1).problems[0].what == "has 2 items of `image`"
    else:
        (record,) = read_records(str(path), phase)
        assert written(record) == example.messages
        assert all(ref.read() for ref in record.media())


@pytest.mark.parametrize(("kind", "example", "phase"), BAD)
def test_a_bad_example_is_refused_for_the_cause_in_the_table(folder: Path, kind: Format, example: Example, phase: int) -> None:
    path = write_lines(folder / "data.jsonl", kind.example, example.row)
    problems = [problem for problem in scan_source(str(path), phase).problems if problem.where == f"{path}:2"]
    assert [problem.what for problem in problems if problem.what.startswith(example.problem)]


@pytest.mark.parametrize("kind", FORMATS.values(), ids=FORMATS)
def test_a_format_is_found_by_the_keys_of_its_own_examples(kind: Format) -> None:
    assert "\n" not in kind.description
    for example in kind.examples:
        if not example.problem:
            keys = example.row.keys()
            assert format_of([keys]) is kind
            assert set(keys) <= set(kind.keys())


PNG = "data:image/png;base64," + base64.b64encode(encoded("red")).decode()
USER, ASSISTANT = {"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "A cat."}
ASKED, ANSWERED = {"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A cat."}


def asking(**part: Any) -> dict[str, Any]:
    """An OpenAI record with one part."""
    return {"messages": [{"role": "user", "content": [part]}, ANSWERED]}


def sharegpt(value: str = "<image>", **fields: Any) -> dict[str, Any]:
    return {"conversations": [{"from": "human", "value": value}, ASSISTANT], "images": ["cat.png"]} | fields


def llava(*turns: Any, **fields: Any) -> dict[str, Any]:
    return {"conversations": list(turns)} | fields


BAD_RECORDS: list[tuple[str, int, Any, str]] = [
    # JSON
    ("pair", 1, '{"text": "a cat", "image": "cat', "is not JSON: Unterminated string"),
    ("pair", 1, ["a cat", "cat.png"], "is a list, required is a JSON object"),
    ("pair", 1, '"a cat"', "is a str, required is a JSON object"),
    ("openai", 2, "[" * 100_000, "is not JSON: "),
    # pair
    ("pair", 1, {}, "has nothing to align"),
    ("pair", 1, {"image": "cat.png"}, "has only `image`"),
    ("pair", 1, {"text": None, "image": "cat.png"}, "has only `image`"),
    ("pair", 1, {"text": 7, "image": "cat.png"}, "`text` is a int, required is text"),
    ("pair", 1, {"text": " ", "image": "cat.png"}, "`text` is empty"),
    ("pair", 1, {"text": "half \ud83d", "image": "cat.png"}, "`text` has half of a character"),
    ("pair", 1, {"text": "a cat", "image": "absent.png"}, "no such image: absent.png"),
    ("pair", 1, {"text": "a cat", "audio": "absent.wav"}, "no such audio: absent.wav"),
    ("pair", 1, {"text": "a cat", "image": ""}, "`image` is empty"),
    ("pair", 1, {"text": "a cat", "image": "\0"}, "no such image: \0"),
    ("pair", 1, {"text": "a cat", "image": "x" * 5000}, "no such image: xxx"),
    ("pair", 1, {"text": "a cat", "image": ["cat.png", "dog.png"]}, "`image` is a list, required is text"),
    ("pair", 1, {"text": "a cat", "image": {"bytes": "AAAA", "path": None}}, "`image` is a dict, required is text"),
    ("pair", 1, {"text": "a cat", "image": True}, "`image` is a bool, required is text"),
    ("pair", 1, {"text": "a cat", "image": "https://example.com/cat.png"}, "`image` is at an address: `https://example.com/cat.png`"),
    ("pair", 1, {"text": "a cat", "image": "s3://bucket/cat.png"}, "`image` is at an address"),
    ("pair", 1, {"text": "a cat", "image": PNG[:-3]}, "`image` is not base64: "),
    ("pair", 1, {"text": "a cat", "image": "data:image/png,cat"}, "`image` is a data URL that is not in base64"),
    ("pair", 1, {"text": "a cat", "image": "data:image/png;base64,"}, "`image` has no content"),
    ("pair", 1, {"text": "a <audio> cat", "image": "cat.png"}, "`text` has the placeholder `<audio>`"),
    ("pair", 1, {"text": "a cat", "image": "cat.png", "concept": 3}, "`concept` is a int, required is text"),
    ("pair", 1, {"instruction": "What is it?", "response": "A cat."}, "has the unknown key `instruction`"),
    # instruction
    ("instruction", 2, {"instruction": None, "response": "A cat."}, "has no `instruction`"),
    ("instruction", 2, {"instruction": "What is it?", "response": ""}, "`response` is empty"),
    ("instruction", 2, {"instruction": "What is it?", "response": "A cat.", "task": 3}, "`task` is a int, required is text"),
    (
        "instruction",
        2,
        {"instruction": "What is it?", "response": "A <image>.", "image": "cat.png"},
        "`response` has the placeholder `<image>`",
    ),
    (
        "instruction",
        2,
        {"instruction": "<image>?", "response": "No.", "image": ["cat.png", "dog.png"]},
        "has 1 placeholders `<image>` for 2",
    ),
    ("instruction", 2, {"instruction": "What?", "response": "No.", "image": ["cat.png", "absent.png"]}, "no such image: absent.png"),
    ("instruction", 2, {"instruction": "<image>", "response": "No.", "audio": "meow.wav"}, "has 0 placeholders `<audio>` for 1 media"),
    # llava
    ("llava", 2, {"image": "cat.png"}, "has no `conversations`"),
    ("llava", 2, llava(), "`conversations` is empty"),
    ("llava", 2, {"conversations": "hello"}, "`conversations` is a str, required is a list of messages"),
    ("llava", 2, llava("hello", ASSISTANT), "`conversations.0` is a str, required is a JSON object"),
    ("llava", 2, llava({"from": "bot", "value": "Hi"}, ASSISTANT), "`conversations.0` has the unknown role `bot`"),
    ("llava", 2, llava({"value": "Hi"}, ASSISTANT), "`conversations.0` has no `from`"),
    ("llava", 2, llava({"from": ["human"], "value": "Hi"}, ASSISTANT), "`conversations.0` has the unknown role"),
    ("llava", 2, llava({"from": "human"}, ASSISTANT), "`conversations.0` has no `value`"),
    ("llava", 2, llava({"from": "human", "content": "Hi"}, ASSISTANT), "has the unknown key `content` in `conversations.0`"),
    ("llava", 2, llava({"from": "human", "value": ""}, ASSISTANT), "`conversations.0.value` is empty"),
    ("llava", 2, llava({"from": "human", "value": ["Hi"]}, ASSISTANT), "`conversations.0.value` is a list, required is text"),
    ("llava", 2, llava(USER, USER, ASSISTANT), "message 1 is of the user, required is one of the assistant"),
    ("llava", 2, llava(USER, {"from": "system", "value": "Be brief."}, ASSISTANT), "message 1 is of the system"),
    ("llava", 2, llava({"from": "system", "value": "Be brief."}), "has no message of the user"),
    ("llava", 2, llava(USER), "ends with a message of the user"),
    ("llava", 2, llava(USER, ASSISTANT, image="cat.png"), "has 0 placeholders `<image>` for 1 media"),
    ("llava", 2, llava(USER, ASSISTANT, images=["cat.png"]), "has the unknown key `images`"),
    ("llava", 1, llava(USER, ASSISTANT), "has no media"),
    # sharegpt
    ("sharegpt", 2, sharegpt("<image><image>"), "has 2 placeholders `<image>` for 1 media"),
    ("sharegpt", 2, sharegpt("<video>", videos=["cat.mp4"]), "has the unknown key `videos`"),
    ("sharegpt", 2, sharegpt(system=["Be brief."]), "`system` is a list, required is text"),
    (
        "sharegpt",
        2,
        {"messages": [ASKED | {"content": [{"type": ["image"]}]}, ANSWERED], "images": []},
        "`messages.0.content` is a list, req",
    ),
    ("sharegpt", 2, sharegpt(images=[7]), "`images.0` is a int, required is text"),
    ("sharegpt", 2, sharegpt(images=["absent.png"]), "no such image: absent.png"),
    ("sharegpt", 1, sharegpt("<image><image>", images=["cat.png", "dog.png"]), "has 2 items of `image`"),
    ("sharegpt", 2, {"conversations": [USER, ASSISTANT], "messages": [ASKED, ANSWERED], "images": []}, "has both `conversations` and"),
    # openai
    (
        "openai",
        2,
        asking(type="video_url", video_url={"url": "cat.mp4"}),
        "`messages.0.content.0` is a part of the unknown type `video_url`",
    ),
    ("openai", 2, asking(text="Hi"), "`messages.0.content.0` is a part without a type"),
    ("openai", 2, asking(type="text", text=""), "`messages.0.content` is empty"),
    ("openai", 2, asking(type="text"), "`messages.0.content.0` has no `text`"),
    ("openai", 2, asking(type="image_url", image_url={"url": PNG[:-3]}), "`messages.0.content.0.image_url.url` is not base64"),
    ("openai", 2, asking(type="image_url", image_url={"path": "cat.png"}), "`messages.0.content.0.image_url` has no `url`"),
    (
        "openai",
        2,
        asking(type="input_audio", input_audio={"data": "mew", "format": "wav"}),
        "`messages.0.content.0.input_audio.data` is not",
    ),
    ("openai", 2, asking(type="input_audio"), "`messages.0.content.0` has no `input_audio`"),
    ("openai", 2, {"messages": [{"role": "user", "content": []}, ANSWERED]}, "`messages.0.content` is empty"),
    ("openai", 2, {"messages": [ASKED, {"role": "assistant", "content": " "}]}, "`messages.1.content` is empty"),
    ("openai", 2, {"messages": [{"role": "user", "content": ["Hi"]}, ANSWERED]}, "`messages.0.content.0` is a str, required is a JSON obj"),
    ("openai", 2, asking(type="image_url", image_url={"url": "absent.png"}), "no such image: absent.png"),
    ("openai", 2, {"messages": [ASKED, {"role": "assistant", "content": None, "tool_calls": []}]}, "has the unknown key `tool_calls`"),
    (
        "openai",
        2,
        {"messages": [ASKED, {"role": "assistant", "content": [{"type": "image_url", "image_url": {"url": "cat.png"}}]}]},
        "`messages.1.content.0` is media in a message of the assistant",
    ),
]


@pytest.mark.parametrize(("name", "phase", "bad", "cause"), BAD_RECORDS, ids=[f"{one[0]}-{one[3][:50]}" for one in BAD_RECORDS])
def test_a_bad_record_is_named_by_file_line_and_cause(folder: Path, name: str, phase: int, bad: Any, cause: str) -> None:
    good = FORMATS[name].example
    path = write_lines(folder / "data.jsonl", good, bad, good)
    scan = scan_source(str(path), phase)
    assert scan.files == [(str(path), name, 2)]
    assert {problem.where for problem in scan.problems} == {f"{path}:2"}
    assert [problem.what for problem in scan.problems if problem.what.startswith(cause)], scan.problems


def test_every_fault_of_every_record_is_found_at_once(folder: Path) -> None:
    bad = {"text": None, "image": ["a"], "pictures": 1}
    path = write_lines(folder / "data.jsonl", {"text": "a", "image": "cat.png"}, bad, {"text": 7, "image": "absent.png"})
    found = [(problem.where.rpartition(":")[2], problem.what) for problem in scan_source(str(path), 1).problems]
    assert found == [
        ("2", "has the unknown key `pictures`"),
        ("2", "has only `image`"),
        ("2", "`image` is a list, required is text"),
        ("3", "`text` is a int, required is text"),
        ("3", "no such image: absent.png"),
    ]


def test_faults_of_media_do_not_hide_those_of_turns(folder: Path) -> None:
    path = write_lines(folder / "data.jsonl", llava({"from": "human", "value": "<image><image>"}, USER, image="absent.png"))
    found = [problem.what for problem in scan_source(str(path), 2).problems]
    assert found[0] == "no such image: absent.png"
    assert found[1].startswith("message 1 is of the user")
    assert found[2].startswith("has 2 placeholders `<image>` for 1 media")


def test_a_part_may_be_a_line_break_between_media(folder: Path) -> None:
    image = {"type": "image_url", "image_url": {"url": "cat.png"}}
    row = {"messages": [{"role": "user", "content": [image, {"type": "text", "text": "\n"}, image]}, ANSWERED]}
    (record,) = read_records(str(write_lines(folder / "data.jsonl", row)), 2)
    assert written(record)[0] == "user: [cat.png]\n[cat.png]"


def test_an_unknown_key_is_shown_with_the_nearest_known_one(folder: Path) -> None:
    path = write_lines(folder / "data.jsonl", {"text": "a", "images": "cat.png"}, {"text": "a", "image": "cat.png", "colour": "red"})
    first, _, second = scan_source(str(path), 1).problems
    assert first.fix == "did you mean `image`?"
    assert second.fix.startswith("known keys: text, image, audio")


def test_problems_of_one_kind_have_one_cause_whatever_the_record(folder: Path) -> None:
    rows = [llava(USER, {"from": "human", "value": "again"}), llava(USER, ASSISTANT, {"from": "gpt", "value": "more"})]
    rows += [llava({"from": "human", "value": "<image>" * count}, ASSISTANT) for count in (1, 2)]
    problems = scan_source(str(write_lines(folder / "data.jsonl", *rows)), 2).problems
    assert len({problem.what for problem in problems}) == 4
    assert len({problem.cause for problem in problems}) == 3  # user for assistant, assistant for user, placeholders


@pytest.mark.parametrize("ending", ["jsonl", "json"])
def test_media_inside_json_are_references_to_their_place_in_the_file(folder: Path, ending: str) -> None:
    clip = base64.b64encode(sound()).decode()
    parts = [
        {"type": "image_url", "image_url": {"url": PNG, "detail": "low"}},
        {"type": "text", "text": "é\N{GRINNING FACE}"},  # bytes and characters differ
        {"type": "input_audio", "input_audio": {"data": clip, "format": "wav"}},
        {"type": "image_url", "image_url": {"url": f"file://{folder / 'dog.png'}"}},
    ]
    row = {"messages": [{"role": "user", "content": parts}, ANSWERED]}
    path = write_records(folder / f"data.{ending}", row, row, row)
    for record in read_records(str(path), 2):
        image, clip_ref, file = record.media()
        assert (image.source, image.place) == (str(path), "messages.0.content.0.image_url.url")
        assert [image.read(), clip_ref.read(), file.read()] == [encoded("red"), sound(), encoded("blue")]
        assert file.row is None


def test_records_that_use_one_file_share_the_reference(folder: Path) -> None:
    row = {"instruction": "What is it?", "response": "A cat.", "image": "cat.png"}
    first, second = read_records(str(write_lines(folder / "data.jsonl", row, row)), 2)
    assert next(first.media()) is next(second.media())


@pytest.mark.parametrize("name", ["instruction", "llava", "sharegpt", "openai"])
def test_no_answer_is_needed_where_nothing_is_learnt(folder: Path, name: str) -> None:
    asked = {
        "instruction": {"instruction": "What is it?", "image": "cat.png"},
        "llava": llava({"from": "human", "value": "<image>What is it?"}, image="cat.png"),
        "sharegpt": {"conversations": [{"from": "human", "value": "<image>What is it?"}], "images": ["cat.png"]},
        "openai": {"messages": [ASKED]},
    }[name]
    path = write_records(folder / "data.json", asked)
    (record,) = read_records(str(path), 2, answered=False)
    assert [message.role for message in record.messages] == ["user"]
    with pytest.raises(InputError, match=r"has no `response`|ends with a message of the user"):
        read_records(str(path), 2)
