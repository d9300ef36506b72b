"""What a program asks, in whatever form it has it, as records."""

import mimetypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from raytrain2p.config import InputError, Problem
from raytrain2p.data.media import MEDIA
from raytrain2p.data.reading import records_in_memory
from raytrain2p.data.records import Record

Question = Record | Mapping[str, Any] | str | Path | Image.Image


def as_records(items: Sequence[Question], question: str | None = None) -> list[Record]:
    """Questions as records.

    Args:
        items: records; dictionaries as in the files of phase 2, whose media may also be bytes, PIL images or data URLs; texts, which are
            questions without media; PIL images, and the paths of media files.
        question: what to ask of those that bring none.

    Raises:
        InputError: every problem of every item.
    """
    fields = {f"item {number}": _fields(item, question) for number, item in enumerate(items, 1) if not isinstance(item, Record)}
    made = iter(records_in_memory(fields))
    return [item if isinstance(item, Record) else next(made) for item in items]


def _fields(item: Any, question: str | None) -> Mapping[str, Any]:
    if isinstance(item, Mapping):
        asks = question is None or "instruction" in item or not set(item) <= {*MEDIA, "id", "task"}
        return item if asks else {"instruction": question, **item}
    if isinstance(item, str):
        return {"instruction": item}
    if isinstance(item, Image.Image):
        return {"instruction": question, "image": item}
    if isinstance(item, Path):
        kind = (mimetypes.guess_type(item.name)[0] or "").partition("/")[0]
        return {"instruction": question, kind if kind in MEDIA else "image": item}
    what = f"is a {type(item).__name__}; required is a record, a dictionary, a text, a PIL image or the path of a media file"
    raise InputError(Problem("a question", what, "see docs/python.md"))
