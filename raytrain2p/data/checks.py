"""Checks of records beyond their form: every media item is read, and decoded."""

import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

from raytrain2p.config import Problem
from raytrain2p.data.media import MEDIA, MediaRef, content_key
from raytrain2p.data.records import Record

# How other programs write that media stand in a text; here only the placeholders of MEDIA do.
FOREIGN_MARKS = re.compile(r"<img\b|<video>|<image[ _]?\d+>|<\|(?:image|video|audio)[^|]*\|>", re.IGNORECASE)
THREADS = 8  # Pillow and libsndfile decode outside Python's lock
AT_ONCE = 1024  # items given to the threads at once: each waits as an object that is larger than its reference


class Examined(NamedTuple):
    """An item, its content key if it can be read, and what is wrong with it, if anything is."""

    ref: MediaRef
    key: bytes | None
    fault: str | None


@dataclass(frozen=True)
class CheckedMedia:
    """Content keys of all items that can be read, and a problem for each record with an item that cannot be used."""

    keys: dict[MediaRef, bytes]
    problems: list[Problem]


def check_media(
    records: Iterable[Record],
    checks: Mapping[str, Callable[[Any], None]] | None = None,
    stored: Mapping[str, Container[bytes]] | None = None,
) -> CheckedMedia:
    """Read and decode each distinct item.

    Args:
        checks: by modality, what raises ValueError for a decoded item that its encoder does not take.
        stored: by modality, content keys of items that are not decoded again, because their features are stored.
    """
    users: dict[MediaRef, list[str]] = {}
    for record in records:
        for ref in dict.fromkeys(record.media()):
            users.setdefault(ref, []).append(record.where)
    checks, stored = checks or {}, stored or {}
    keys, faults = dict[MediaRef, bytes](), dict[MediaRef, str]()
    for ref, key, fault in _of_each(users, lambda ref: examine(ref, checks.get(ref.modality), stored.get(ref.modality, ()))):
        if key is not None:
            keys[ref] = key
        if fault is not None:
            faults[ref] = fault
    problems = [
        Problem(
            where,
            f"{ref.modality} {ref} {faults[ref]}",
            f"replace the {ref.modality} or leave the record out",
            cause=f"{ref.modality} {faults[ref]}",
        )
        for ref, found in users.items()
        if ref in faults
        for where in found
    ]
    return CheckedMedia(keys, problems)


def foreign_marks(records: Iterable[Record]) -> str | None:
    """A line about records without media whose text has the marks of other programs: the model would see their text alone."""
    found = [
        match[0]
        for record in records
        if not any(record.media()) and (match := FOREIGN_MARKS.search("\n".join(message.text for message in record.messages)))
    ]
    if not found:
        return None
    return f"{len(found):,} records without media have marks like `{found[0]}`, which stand for no media here: they are learnt as text"


def examine(ref: MediaRef, check: Callable[[Any], None] | None = None, stored: Container[bytes] = ()) -> Examined:
    """Read an item, and decode it unless its key is in `stored`."""
    try:
        content = ref.read()
    except OSError as error:
        return Examined(ref, None, f"cannot be read: {error.strerror or _one_line(error)}")
    except ValueError as error:
        return Examined(ref, None, f"cannot be read: {_one_line(error)}")
    key = content_key(content)
    if key in stored:
        return Examined(ref, key, None)
    try:
        item = MEDIA[ref.modality].decode(content)
    except Exception as error:  # a foreign decoder may raise anything, for a damaged size even a MemoryError
        return Examined(ref, key, f"does not decode: {_one_line(error)}")
    try:
        if check is not None:
            check(item)
    except ValueError as error:
        return Examined(ref, key, str(error))
    return Examined(ref, key, None)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _of_each(media: Iterable[MediaRef], function: Callable[[MediaRef], Examined]) -> Iterator[Examined]:
    """The function of each item. Sorted, so that each part of a file is read once."""
    ordered = sorted(media, key=lambda ref: (ref.source, ref.place.partition(".")[0], ref.row or 0))
    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, len(ordered), AT_ONCE):
            yield from pool.map(function, ordered[start : start + AT_ONCE])
