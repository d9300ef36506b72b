"""Files of a run directory, each written aside and then renamed: what can be read is whole. And locks on them."""

import json
import os
from pathlib import Path
from typing import Any


def write_file(path: Path, content: str | bytes) -> None:
    """Replace a file by new content in one step, on disk before it is seen.

    Its directory is made if need be, but none above it: where a run's directory is gone, its disk was taken away, and what
    is made in its place would lie on another one.
    """
    path.parent.mkdir(exist_ok=True)
    aside = path.with_name(f".{path.name}.aside-{os.getpid()}")
    try:
        with aside.open("wb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
            stream.flush()
            os.fsync(stream.fileno())
        aside.rename(path)
    finally:
        aside.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    write_file(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """What `write_json` wrote; None if there is no such file."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
