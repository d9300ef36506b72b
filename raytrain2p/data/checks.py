"""Checks of records beyond their form: every media item is decoded."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from raytrain2p.config import Problem
from raytrain2p.data.media import MediaRef, content_key, decode
from raytrain2p.data.records import Record

THREADS = 8  # Pillow and libsndfile decode outside Python's lock
AT_ONCE = 1024  # items given to the threads at once: each waits as an object that is larger than its reference

Result = TypeVar("Result")


def read_media_keys(media: Iterable[MediaRef]) -> dict[MediaRef, bytes]:
    """The content key of each distinct item."""
    return dict(_of_each(dict.fromkeys(media), lambda ref: content_key(ref.read())))


def media_problems(
    records: Iterable[Record],
    checks: Mapping[str, Callable[[Any], None]] | None = None,
    known: Callable[[MediaRef], bool] = lambda ref: False,
) -> list[Problem]:
    """Media that cannot be used, by record.

    Args:
        checks: by modality, what raises ValueError for a decoded item that its encoder does not take.
        known: items that are not decoded again, because their features are stored.
    """
    users: dict[MediaRef, list[str]] = {}
    for record in records:
        for ref in dict.fromkeys(record.media()):
            users.setdefault(ref, []).append(record.where)
    causes = dict(_of_each((ref for ref in users if not known(ref)), lambda ref: fault(ref, (checks or {}).get(ref.modality))))
    return [
        Problem(
            where,
            f"{ref.modality} {ref} {cause}",
            f"replace the {ref.modality} or leave the record out",
            cause=f"{ref.modality} {cause}",
        )
        for ref, found in users.items()
        if (cause := causes.get(ref)) is not None
        for where in found
    ]


def fault(ref: MediaRef, check: Callable[[Any], None] | None = None) -> str | None:
    """What is wrong with an item, or None."""
    try:
        item = decode(ref)
    except OSError as error:
        return f"does not decode: {error.strerror or ' '.join(str(error).split()) or type(error).__name__}"
    except (ValueError, SyntaxError) as error:
        return f"does not decode: {' '.join(str(error).split()) or type(error).__name__}"
    try:
        if check is not None:
            check(item)
    except ValueError as error:
        return str(error)
    return None


def _of_each(media: Iterable[MediaRef], function: Callable[[MediaRef], Result]) -> Iterator[tuple[MediaRef, Result]]:
    """Each item with a function of it. Sorted, so that each part of a file is read once."""
    ordered = sorted(media, key=lambda ref: (ref.source, ref.place.partition(".")[0], ref.row or 0))
    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, len(ordered), AT_ONCE):
            some = ordered[start : start + AT_ONCE]
            yield from zip(some, pool.map(function, some), strict=True)
