"""Checks of records beyond their form: every image is decoded."""

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

from raytrain2p.config import Problem
from raytrain2p.data.media import ImageRef, content_key, decoding_error
from raytrain2p.data.records import Record

THREADS = 8  # Pillow decodes outside Python's lock


def read_media_keys(images: Iterable[ImageRef]) -> dict[ImageRef, bytes]:
    """The content key of each distinct image."""
    distinct = list(dict.fromkeys(images))
    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(distinct, pool.map(lambda image: content_key(image.read()), distinct), strict=True))


def image_problems(records: Iterable[Record], known: Callable[[ImageRef], bool] = lambda image: False) -> list[Problem]:
    """Images that do not decode, by record; those that are `known` (their features are stored) are not decoded again."""
    users: dict[ImageRef, list[str]] = {}
    for record in records:
        if record.image is not None:
            users.setdefault(record.image, []).append(record.where)
    unknown = [image for image in users if not known(image)]
    with ThreadPoolExecutor(THREADS) as pool:
        causes: Mapping[ImageRef, str | None] = dict(zip(unknown, pool.map(_cause, unknown), strict=True))
    return [
        Problem(where, f"image {_name(image)} does not decode: {cause}", "replace the image or leave the record out")
        for image, cause in causes.items()
        if cause is not None
        for where in users[image]
    ]


def _cause(image: ImageRef) -> str | None:
    try:
        encoded = image.read()
    except OSError as error:
        return error.strerror or str(error)
    return decoding_error(encoded)


def _name(image: ImageRef) -> str:
    return image.source if image.row is None else f"in row {image.row} of {image.source}"
