"""One row of a file while it is turned into a record: its fields, and the problems found."""

import re
import sys
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from raytrain2p.config import Problem
from raytrain2p.config.paths import is_kind
from raytrain2p.data.media import MEDIA, MediaRef, image_bytes, item_bytes

LONGEST_SHOWN = 200  # characters of a value in a message
ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
LOCAL_FILE = "file://"


class RecordFile:
    """What the records of one file have in common. Records that use one media file share one reference to it.

    Args:
        path: of the file; media files are relative to its folder.
        in_memory: there is no such file: the records come from a program, and references to what is inside them hold it.
        local_files: whether media may be files that the records name; not if strangers wrote them.
    """

    def __init__(self, path: Path, in_memory: bool = False, local_files: bool = True) -> None:
        self.in_memory, self.local_files = in_memory, local_files
        self.path, self.folder, self.is_parquet = str(path), path.parent, path.suffix == ".parquet"
        self.modalities = tuple(MEDIA)
        self.placeholders = re.compile("|".join(f"<{modality}>" for modality in MEDIA))
        self.media_files: dict[tuple[str, str], MediaRef | None] = {}

    def media_file(self, modality: str, name: str) -> MediaRef | None:
        """A file, relative to the one that names it; None if there is none."""
        key = (modality, name)
        if key not in self.media_files:
            path = self.folder / name
            self.media_files[key] = MediaRef(modality, str(path)) if is_kind(path, Path.is_file) else None
        return self.media_files[key]


class Row:
    """One row's fields, without those that are null: Parquet has every column in every row.

    Args:
        start: its byte in a JSON file, or its row in a Parquet file.
    """

    __slots__ = ("fields", "file", "problems", "start", "where")

    def __init__(self, file: RecordFile, where: str, start: int, fields: Mapping[str, Any]) -> None:
        self.file, self.where, self.start = file, where, start
        self.fields = present(fields)
        self.problems: list[Problem] = []

    def bad(self, what: str, fix: str = "", cause: str = "") -> None:
        """Add a problem; `cause` is `what` without the specifics of this row."""
        self.problems.append(Problem(self.where, what, fix, cause))

    def check_keys(self, fields: Collection[str], known: Collection[str], place: str = "") -> None:
        """Report keys that are not known, each with the nearest one that is."""
        for key in fields:
            if key not in known:
                near = _nearest(key, tuple(known))
                inside = f" in `{place}`" if place else ""
                fix = f"did you mean `{near}`?" if near else f"known keys: {', '.join(known)}"
                self.bad(f"has the unknown key {shown(key)}{inside}", fix, f"unknown key {shown(key)}")

    def text(self, key: str, fix: str = "") -> str | None:
        """The text of a required field."""
        if key not in self.fields:
            self.bad(f"has no `{key}`", fix)
            return None
        return self.optional_text(key)

    def optional_text(self, key: str) -> str | None:
        """The text of a field that may be absent."""
        value = self.fields.get(key)
        return value if value is not None and self.is_text(value, key) else None

    def is_text(self, value: Any, place: str, may_be_empty: bool = False) -> bool:
        """Whether it is text with something in it; a problem if not. `place` leads to it from the record."""
        if not isinstance(value, str):
            found = f"is a {type(value).__name__}, required is text"
        elif not may_be_empty and (not value or value.isspace()):
            found = "is empty"
        elif not value.isascii() and _is_torn(value):
            found = "has half of a character (a lone surrogate)"
        else:
            return True
        self.bad(f"`{place}` {found}", cause=f"`{_without_numbers(place)}` {found}")
        return False

    def media_lists(self, keys: Mapping[str, str], one: bool = True) -> dict[str, list[MediaRef | None]]:
        """Media by modality, from the keys that name them; None in place of a bad one.

        Args:
            keys: the key of each modality.
            one: a value may be a single item instead of a list.
        """
        found = {}
        for modality, key in keys.items():
            if (value := self.fields.get(key)) is None:
                continue
            if isinstance(value, list):
                found[modality] = [self.media(modality, item, f"{key}.{place}") for place, item in enumerate(value)]
            elif one:
                found[modality] = [self.media(modality, value, key)]
            else:
                self.bad(f"`{key}` is a {type(value).__name__}, required is a list")
        return found

    def media(self, modality: str, value: Any, place: str) -> MediaRef | None:
        """The reference to an item: a file's name, a data URL, or in Parquet {bytes, path}; None, and a problem, if it is bad. From a
        program it may also be a Path, bytes or a PIL image."""
        if self.file.in_memory and isinstance(value, bytes | Image.Image):
            return self.held(modality, value, place)
        value = str(value) if self.file.in_memory and isinstance(value, Path) else value
        if self.file.is_parquet and isinstance(value, bool | Mapping):
            content, path = (value.get("bytes"), value.get("path")) if isinstance(value, Mapping) else (value, None)
            if content:
                return MediaRef(modality, self.file.path, self.start, sys.intern(place))
            if path is None:
                self.bad(f"`{place}` has no content", cause=f"{modality} without content")
                return None
            value = path
        if not self.is_text(value, place):
            return None
        if value.startswith("data:"):
            return self.embedded(modality, value, place)
        if not self.file.local_files:
            self.bad(f"`{place}` is not a data URL", f"send the {modality} itself: data:TYPE;base64,...", f"{modality} that is not sent")
            return None
        name = value.removeprefix(LOCAL_FILE)
        if ADDRESS.match(name):
            fix = "media are read from files: download it, and give the file's path"
            self.bad(f"`{place}` is at an address: {shown(value)}", fix, f"{modality} at an address")
        elif (ref := self.file.media_file(modality, name)) is not None:
            return ref
        else:
            self.bad(f"no such {modality}: {plain(value)}", "paths are relative to the file that names them", f"no such {modality}")
        return None

    def embedded(self, modality: str, encoded: str, place: str) -> MediaRef | None:
        """The reference to an item that is inside the record, in base64."""
        try:
            content = item_bytes(encoded)
        except ValueError as error:
            self.bad(f"`{place}` {error}", cause=f"{modality} that is not base64")
            return None
        if self.file.in_memory:
            return self.held(modality, content, place)
        return MediaRef(modality, self.file.path, self.start, sys.intern(place))

    def held(self, modality: str, value: bytes | Image.Image, place: str) -> MediaRef | None:
        """The reference to an item that a program holds."""
        try:
            content = value if isinstance(value, bytes) else image_bytes(value)
        except (ValueError, OSError) as error:
            self.bad(f"`{place}` is an image that cannot be used: {error}")
            return None
        return MediaRef(modality, self.where, place=place, content=content)


def present(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that are not null."""
    return {key: value for key, value in fields.items() if value is not None}


def plain(value: Any) -> str:
    """A value's text in a message: cut, and with half characters escaped."""
    return str(value)[:LONGEST_SHOWN].encode("utf-8", "backslashreplace").decode()


def shown(value: Any) -> str:
    """A name as it stands in a message."""
    return f"`{plain(value)}`"


def _is_torn(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


@lru_cache
def _nearest(key: str, known: tuple[str, ...]) -> str | None:
    return next(iter(get_close_matches(key, known, 1)), None)


def _without_numbers(place: str) -> str:
    return ".".join(part for part in place.split(".") if not part.isdigit())
