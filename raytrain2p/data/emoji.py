"""The embedded set: 1,244 emoji by three artists, with which both phases run out of the box. See emoji/NOTICE.md."""

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from raytrain2p.config import InputError, Problem
from raytrain2p.data.images import ImageRef

EMOJI_PREFIX = "emoji:"
EMOJI_FILE = Path(__file__).parent / "emoji" / "emoji.parquet"
SPLITS = ("train", "val", "test_drawing", "test_concept")
VALIDATION_SHARE = 20  # one in 20 training drawings; its concept stays known through another artist

QUESTIONS = {"group": "Which group does it belong to?", "name": "What does the picture show?"}


def emoji_rows(split: str, phase: int, setting: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows in the form of a user's file: one a drawing in phase 1 (name: keywords), one a question in phase 2.

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
    stored = "train" if split == "val" else split
    for number in pc.indices_nonzero(pc.equal(table.column("split"), stored)).to_pylist():
        row = table.slice(number, 1).to_pylist()[0]
        if stored == "train" and (split == "val") != _held_out(row):
            continue
        image = ImageRef(str(EMOJI_FILE), number)
        where = f"{EMOJI_PREFIX}{split}:row {number}"
        if phase == 1:
            yield where, {"text": f"{row['name']}: {', '.join(row['keywords'])}", "image": image}
        else:
            for task, question in QUESTIONS.items():
                yield where, {"instruction": question, "response": row[task], "image": image, "task": task}


def _held_out(row: dict[str, Any]) -> bool:
    return zlib.crc32(f"{row['name']}/{row['artist']}".encode()) % VALIDATION_SHARE == 0
