"""The embedded set: 1,244 emoji by three artists, enough to run both phases. See emoji/NOTICE.md."""

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from raytrain2p.config import InputError, Problem
from raytrain2p.data.media import ImageRef

EMOJI_PREFIX = "emoji:"
EMOJI_FILE = Path(__file__).parent / "emoji" / "emoji.parquet"
SPLITS = ("train", "val", "test_drawing", "test_concept")
VALIDATION_SHARE = 10  # one drawing of every tenth concept that has two in the training part: so the concept stays known

QUESTIONS = {"group": "Which group does it belong to?", "name": "What does the picture show?"}


def emoji_rows(split: str, phase: int, setting: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows in the form of a user's file: phase 1 has one per drawing (name: keywords), phase 2 one per question.

    - `test_drawing`: the concept is known, this artist's drawing of it is not;
    - `test_concept`: the concept was never seen.

    Raises:
        InputError: no such split.
    """
    if split not in SPLITS:
        raise InputError(
            Problem(f"{setting}={EMOJI_PREFIX}{split}", "no such split of the embedded set", f"take one of {', '.join(SPLITS)}")
        )
    table = pq.read_table(EMOJI_FILE, columns=["name", "group", "keywords", "split", "artist"])
    rows = table.to_pylist()
    held_out = _held_out(rows)
    for number, row in enumerate(rows):
        if split != ("val" if number in held_out else row["split"]):
            continue
        image = ImageRef(str(EMOJI_FILE), number)
        where = f"{EMOJI_PREFIX}{split}:row {number}"
        if phase == 1:
            yield where, {"text": f"{row['name']}: {', '.join(row['keywords'])}", "image": image}
        else:
            for task, question in QUESTIONS.items():
                yield where, {"instruction": question, "response": row[task], "image": image, "task": task}


def _held_out(rows: list[dict[str, Any]]) -> set[int]:
    """Row numbers of the validation drawings: chosen by name, so the same on every machine."""
    drawings: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        if row["split"] == "train":
            drawings.setdefault(row["name"], []).append(number)
    chosen = set()
    for name, numbers in drawings.items():
        lot = zlib.crc32(name.encode())
        if len(numbers) > 1 and lot % VALIDATION_SHARE == 0:
            chosen.add(numbers[lot // VALIDATION_SHARE % len(numbers)])
    return chosen
