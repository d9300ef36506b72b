"""Records: what users provide. Phase 1: `{"text", "image"}`; phase 2: `{"instruction", "response", "image"?, "task"?}`."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raytrain2p.config import InputError, Problem
from raytrain2p.config.phases import PHASES
from raytrain2p.data.emoji import EMOJI_PREFIX, emoji_rows
from raytrain2p.data.media import ImageRef

ALL_TASKS = "all"  # the task of records that name none


@dataclass(frozen=True)
class Record:
    """One record of either phase, and `where` it was read, for messages. Fields of the other phase are empty."""

    where: str
    image: ImageRef | None
    text: str = ""
    instruction: str = ""
    response: str = ""
    task: str = ALL_TASKS


def read_records(source: str, phase: int, setting: str = "data", answered: bool = True) -> list[Record]:
    """Read a `.jsonl` or `.parquet` file, or a split of the embedded set (`emoji:SPLIT`).

    Args:
        source: a value of data.train.
        phase: 1 or 2, which have different fields.
        setting: of `source`, for messages.
        answered: False for phase 2 records that need no response: to ask, not to train.

    Raises:
        InputError: the file is missing, of an unknown kind, empty, or has bad records; every one is listed.
    """
    records, problems = scan_records(source, phase, setting, answered)
    if problems:
        raise InputError(problems)
    if not records:
        raise InputError(Problem(f"{setting}={source}", "holds no record", "give a file with at least one record"))
    return records


def scan_records(source: str, phase: int, setting: str = "data", answered: bool = True) -> tuple[list[Record], list[Problem]]:
    """As `read_records`, but returns the good records and the problems of the bad ones.

    Raises:
        InputError: the file is missing, or cannot be read at all.
    """
    records, problems = [], []
    for where, row in _rows(source, phase, setting):
        found = _record_problems(row, where, phase, answered)
        problems += found
        if not found:
            records.append(_record(row, where))
    return records, problems


def _rows(source: str, phase: int, setting: str) -> Iterator[tuple[str, Any]]:
    if source.startswith(EMOJI_PREFIX):
        return emoji_rows(source.removeprefix(EMOJI_PREFIX), phase, setting)
    path = Path(source)
    if not path.is_file():
        raise InputError(Problem(f"{setting}={source}", "no such file", "give a .jsonl or .parquet file, or emoji:SPLIT"))
    if path.suffix == ".jsonl":
        return _jsonl_rows(path)
    if path.suffix == ".parquet":
        return _parquet_rows(path, setting)
    raise InputError(Problem(f"{setting}={source}", f"files of kind `{path.suffix}` are not read", "give .jsonl or .parquet"))


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except ValueError as error:
                    row = Problem(f"{path}:{number}", f"is not JSON: {error}", "write one JSON object per line")
                yield f"{path}:{number}", row


def _parquet_rows(path: Path, setting: str) -> Iterator[tuple[str, Any]]:
    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(Problem(f"{setting}={path}", f"is not a readable Parquet file: {str(error).splitlines()[0]}")) from None
    light = table.drop_columns("image") if "image" in table.column_names else table
    images = table.column("image").to_pylist() if "image" in table.column_names else None
    for number, row in enumerate(light.to_pylist()):
        if images is not None and (cell := images[number]) is not None:
            has_bytes = isinstance(cell, dict) and cell.get("bytes")
            row["image"] = ImageRef(str(path), number) if has_bytes else cell.get("path") if isinstance(cell, dict) else cell
        yield f"{path}:row {number}", row


def _record_problems(row: Any, where: str, phase: int, answered: bool) -> list[Problem]:
    """Every problem with one record's form. Whether its image decodes is checked elsewhere: that takes longer."""
    if isinstance(row, Problem):
        return [row]
    if not isinstance(row, Mapping):
        return [Problem(where, f"is a {type(row).__name__}, required is a JSON object")]
    required: tuple[str, ...]
    required, optional = PHASES[phase].required_fields, PHASES[phase].optional_fields
    if not answered:
        required = tuple(name for name in required if name != "response")
    problems = []
    for name in required + optional:
        value = row.get(name)
        if value is None:
            if name in required:
                problems.append(Problem(where, f"has no `{name}`", f"phase {phase} records need {', '.join(required)}"))
        elif name == "image" and isinstance(value, ImageRef):
            continue
        elif not isinstance(value, str):
            problems.append(Problem(where, f"`{name}` is a {type(value).__name__}, required is text"))
        elif not value.strip():
            problems.append(Problem(where, f"`{name}` is empty"))
        elif name == "image" and not _is_file(_relative_to(where, value)):
            problems.append(Problem(where, f"no such image: {value[:200]}", "image paths are relative to the file that names them"))
    return problems


def _record(row: Mapping[str, Any], where: str) -> Record:
    image = row.get("image")
    if isinstance(image, str):
        image = ImageRef(str(_relative_to(where, image)))
    texts = {name: row[name] for name in ("text", "instruction", "response", "task") if row.get(name) is not None}
    return Record(where=where, image=image, **texts)


def _relative_to(where: str, image: str) -> Path:
    return Path(where.rpartition(":")[0]).parent / image


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # too long for a file name, as an image embedded in the record is
        return False
