"""Files of a run that are not what this program writes: empty, torn, of another shape, or of another version.

Each is read through `read_as`, and so found with its path and what is wrong. A command whose own run is damaged refuses it as any
bad input; one that looks at many runs reports the damaged one in a line, and continues with the others.
"""

import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from raytrain2p.config import InputError, Problem
from raytrain2p.config.secrets import one_line
from raytrain2p.storage.files import read_json

RESTORE = "restore it from a backup, or move the directory that it is in away"


class DamagedFileError(InputError):
    """A file of a run is damaged, or of another version of this program. Made by `damaged`."""

    @property
    def line(self) -> str:
        """File, what is wrong and how to fix it, for a command that continues."""
        problem = self.problems[0]
        return f"{problem.where} {problem.what}; {problem.fix}"


def damaged(path: Path, what: str, fix: str = RESTORE) -> DamagedFileError:
    return DamagedFileError(Problem(str(path), one_line(what, 300), fix))


_read_before: dict[tuple[Path, int], Any] | None = None  # see `reading_once`


@contextmanager
def reading_once() -> Iterator[None]:
    """Within, `read_as` reads each file once, and returns the same value again: checks that follow each other read the same files, which
    no one changes meanwhile. The values must not be changed. Not for several threads."""
    global _read_before
    _read_before = {}
    try:
        yield
    finally:
        _read_before = None


def read_as(path: Path, kind: Any, fix: str = RESTORE) -> Any:
    """The value of a JSON file, as it was written; None if the file does not exist.

    Args:
        kind: a dataclass, a TypedDict or another type that pydantic knows, which the value must fit. More keys are allowed.

    Raises:
        DamagedFileError: it is not JSON, or does not fit.
    """
    if _read_before is not None and (path, id(kind)) in _read_before:
        return _read_before[path, id(kind)]
    try:
        value = read_json(path)
    except ValueError as error:
        raise damaged(path, str(error), fix) from None
    if value is not None:
        check_shape(path, value, kind, fix)
    if _read_before is not None:
        _read_before[path, id(kind)] = value
    return value


def check_shape(path: Path, value: Any, kind: Any, fix: str = RESTORE) -> None:
    """Check that a value that a file contains fits a type.

    Raises:
        DamagedFileError: it does not.
    """
    if not isinstance(value, dict):
        raise damaged(path, f"has a {type(value).__name__} where an object is required", fix)
    try:
        _adapter(kind).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False, include_context=False)
        missing = [str(detail["loc"][-1]) for detail in details if detail["type"] == "missing"]
        wrong = [f"`{'.'.join(map(str, detail['loc']))}`: {detail['msg']}" for detail in details if detail["type"] != "missing"]
        if missing:
            wrong.insert(0, f"lacks {', '.join(missing)}: another version of raytrain2p wrote it, or another program")
        raise damaged(path, "; ".join(wrong[:3]), fix) from None


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
