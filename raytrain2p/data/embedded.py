"""The embedded sets, enough to run both phases: 1,244 emoji by three artists, and their names by three speakers.

`emoji:SPLIT` has images, `speech:SPLIT` clips; see emoji/NOTICE.md and speech/NOTICE.md. Two more are made of them, for phase 2:
`emoji_order:SPLIT` asks of which group the first of two images is, `emoji_speech:SPLIT` whether a clip names an image.
"""

import functools
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow.parquet as pq

from raytrain2p.config import InputError, Problem
from raytrain2p.config.phases import ALIGNMENT
from raytrain2p.data.media import MediaRef
from raytrain2p.data.records import ASSISTANT, USER, Message, Record

IMAGES = Path(__file__).parent / "emoji" / "emoji.parquet"
CLIPS = Path(__file__).parent / "speech" / "speech.parquet"
VALIDATION_SHARE = 10  # one item of every tenth concept that has two in the training part: so the concept stays known


@dataclass(frozen=True, slots=True)
class Item:
    """An image or a clip of one concept."""

    ref: MediaRef
    name: str
    group: str
    caption: str


@functools.cache
def items(file: Path, modality: str) -> dict[str, list[Item]]:
    """The items of a file by split."""
    kept = [name for name in pq.read_schema(file).names if name != modality]
    rows = pq.read_table(file, columns=kept).to_pylist()
    trained: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        if row["split"] == "train":
            trained.setdefault(row["name"], []).append(number)
    held_out = set()
    for name, numbers in trained.items():  # chosen by name, so the same on every machine
        lot = zlib.crc32(name.encode())
        if len(numbers) > 1 and lot % VALIDATION_SHARE == 0:
            held_out.add(numbers[lot // VALIDATION_SHARE % len(numbers)])
    found: dict[str, list[Item]] = {}
    for number, row in enumerate(rows):
        caption = f"{row['name']}: {', '.join(row['keywords'])}" if "keywords" in row else row["name"]
        item = Item(MediaRef(modality, str(file), number, modality), row["name"], row["group"], caption)
        found.setdefault("val" if number in held_out else row["split"], []).append(item)
    return found


def images(split: str) -> list[Item]:
    return items(IMAGES, "image")[split]


def clips(split: str) -> list[Item]:
    return items(CLIPS, "audio")[split]


def asked(parts: tuple[MediaRef | str, ...], answer: str, task: str) -> Record:
    return Record("", (Message(USER, parts), Message(ASSISTANT, (answer,))), task)


def captions(of: Callable[[str], list[Item]], split: str) -> Iterator[tuple[int, Record]]:
    """Phase 1: an item and its caption; items of one name are of one concept."""
    for number, item in enumerate(of(split)):
        yield number, Record("", (Message(USER, (item.ref,)), Message(ASSISTANT, (item.caption,))), concept=item.name)


def emoji(split: str) -> Iterator[tuple[int, Record]]:
    for number, item in enumerate(images(split)):
        yield number, asked((item.ref, "Which group does it belong to?"), item.group, "group")
        yield number, asked((item.ref, "What does the picture show?"), item.name, "name")


def speech(split: str) -> Iterator[tuple[int, Record]]:
    for number, item in enumerate(clips(split)):
        yield number, asked((item.ref, "Which group does it belong to?"), item.group, "group")
        yield number, asked((item.ref, "What was said?"), item.name, "said")


def emoji_order(split: str) -> Iterator[tuple[int, Record]]:
    """Pairs of images of two groups, each twice, with the images swapped: then the other answer is right."""
    found = images(split)
    half = len(found) // 2
    for number in range(2 * half):
        first, second = found[number], found[(number + half) % (2 * half)]
        if first.group != second.group:
            groups = " or ".join(sorted((first.group, second.group)))
            yield number, asked((first.ref, second.ref, f"Which came first, {groups}?"), first.group, "order")


def emoji_speech(split: str) -> Iterator[tuple[int, Record]]:
    """Each image twice: with a clip of its name, and with one of another name."""
    spoken = clips({"test_drawing": "test_speaker"}.get(split, split))
    by_name: dict[str, list[Item]] = {}
    for clip in spoken:
        by_name.setdefault(clip.name, []).append(clip)
    for number, item in enumerate(images(split)):
        lot = zlib.crc32(f"{item.name}:{number}".encode())
        right = by_name.get(item.name, [])
        other = next(clip for clip in (spoken[(lot + step) % len(spoken)] for step in range(len(spoken))) if clip.name != item.name)
        for clip, answer in ([(right[lot % len(right)], "yes")] if right else []) + [(other, "no")]:
            yield number, asked((item.ref, clip.ref, "Is this what was said?"), answer, "match")


@dataclass(frozen=True)
class EmbeddedSet:
    """The splits of a set, and its records in each phase, with the numbers of their items; None: it has none."""

    splits: tuple[str, ...]
    pairs: Callable[[str], Iterator[tuple[int, Record]]] | None
    questions: Callable[[str], Iterator[tuple[int, Record]]]


# test_concept: the concept was never seen. test_drawing and test_speaker: it is known, this drawing or voice of it is not.
_IMAGE_SPLITS = ("train", "val", "test_drawing", "test_concept")
EMBEDDED = {
    "emoji": EmbeddedSet(_IMAGE_SPLITS, functools.partial(captions, images), emoji),
    "speech": EmbeddedSet(("train", "val", "test_speaker", "test_concept"), functools.partial(captions, clips), speech),
    "emoji_order": EmbeddedSet(_IMAGE_SPLITS, None, emoji_order),
    "emoji_speech": EmbeddedSet(_IMAGE_SPLITS, None, emoji_speech),
}


def embedded_records(source: str, phase: int, setting: str) -> list[Record]:
    """The records of `SET:SPLIT`.

    Raises:
        InputError: no such set or split, or the set has no records of this phase.
    """
    name, _, split = source.partition(":")
    if name not in EMBEDDED:
        raise InputError(Problem(f"{setting}={source}", "no such embedded set", f"take one of {', '.join(EMBEDDED)}"))
    found = EMBEDDED[name]
    if split not in found.splits:
        raise InputError(Problem(f"{setting}={source}", "no such split of the embedded set", f"take one of {', '.join(found.splits)}"))
    read = found.pairs if phase == ALIGNMENT.number else found.questions
    if read is None:
        raise InputError(Problem(f"{setting}={source}", f"the set has no records of phase {phase}", "take emoji or speech"))
    return [replace(record, where=f"{source}:row {number}") for number, record in read(split)]
