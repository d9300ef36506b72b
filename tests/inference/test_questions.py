"""What a program asks becomes the same record as in a file."""

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from raytrain2p.config import InputError
from raytrain2p.data.media import decode
from raytrain2p.data.reading import read_records
from raytrain2p.inference.questions import as_records

QUESTION = "What does the picture show?"
DRAWN = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8))


def encoded(image: Image.Image) -> bytes:
    image.save(stream := io.BytesIO(), "PNG")
    return stream.getvalue()


def test_every_form_of_an_image_is_the_same_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    DRAWN.save("drawn.png")
    url = "data:image/png;base64," + base64.b64encode(encoded(DRAWN)).decode()
    forms: list[Any] = [
        DRAWN,
        Path("drawn.png"),
        *({"image": form} for form in (DRAWN, "drawn.png", Path("drawn.png"), encoded(DRAWN), url)),
    ]
    content = [{"type": "text", "text": QUESTION}, {"type": "image_url", "image_url": {"url": url}}]
    records = as_records([*forms, {"messages": [{"role": "user", "content": content}]}], QUESTION)
    assert [record.question for record in records] == [QUESTION] * len(records)
    for record in records:
        (ref,) = record.media()
        assert np.array_equal(np.asarray(decode(ref)), np.asarray(DRAWN))


def test_a_record_a_text_and_a_dictionary_with_its_own_question_stay_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "records.jsonl").write_text('{"instruction": "Who?"}\n')
    (record,) = read_records(str(tmp_path / "records.jsonl"), 2, answered=False)
    found = as_records([record, "Say hello.", {"instruction": "Why?", "image": DRAWN}], QUESTION)
    assert found[0] is record
    assert [one.question for one in found] == ["Who?", "Say hello.", "Why?"]
    assert [len(list(one.media())) for one in found] == [0, 0, 1]


def test_an_image_is_turned_as_its_exif_tag_says() -> None:
    turned = DRAWN.copy()
    turned.getexif()[0x0112] = 6
    (record,) = as_records([turned], QUESTION)
    assert decode(next(iter(record.media()))).size == (5, 7)


def test_every_problem_is_named_at_once() -> None:
    items: list[Any] = [
        DRAWN,
        {"instruction": "Who?", "image": "missing.png"},
        {"instruction": "Who?", "picture": DRAWN},
        {"instruction": "x", "image": 3},
    ]
    with pytest.raises(InputError) as caught:
        as_records(items)
    where = [problem.where for problem in caught.value.problems]
    assert where == ["item 1", "item 2", "item 3", "item 4"]
    with pytest.raises(InputError, match="is a int; required is a record"):
        as_records([3])  # type: ignore[list-item]
