"""From a source, as in `data.train`, to records: the format of each file is detected, and every bad record is found."""

import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from raytrain2p.config import InputError, Problem
from raytrain2p.config.phases import INSTRUCTION
from raytrain2p.data.embedded import EMBEDDED, embedded_records
from raytrain2p.data.files import rows, source_files
from raytrain2p.data.formats import FORMATS, Format, format_of
from raytrain2p.data.formats.conversation import check_alignment
from raytrain2p.data.formats.format import CONCEPT, TASK
from raytrain2p.data.formats.row import RecordFile, Row, shown
from raytrain2p.data.records import ALL_TASKS, Record

EMBEDDED_FORMAT = "embedded"
TASK_NAME = re.compile(r"\w[\w.: -]{0,99}")  # what MLflow takes within a metric's name
LOOKED_AT = 100  # readable records whose keys decide the format; all do if a later one has a key that it does not know


@dataclass(frozen=True)
class Scan:
    """What a source holds.

    Args:
        records: the good ones.
        problems: of the others, and of files.
        files: path, name of the format, and number of good records of each.
    """

    records: list[Record] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    files: list[tuple[str, str, int]] = field(default_factory=list)


@dataclass
class ScannedRows:
    """What is in one file, and whether a record has a key that the format does not know."""

    records: list[Record] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    unknown_keys: bool = False


def read_records(source: str, phase: int, setting: str = "data", answered: bool = True) -> list[Record]:
    """The records of a file, of all files of a pattern, or of an embedded set (`emoji:SPLIT`).

    Args:
        source: a value of data.train.
        phase: 1 or 2, which take different formats.
        setting: of `source`, for messages.
        answered: False for phase 2 records that need no answer: to ask, not to train.

    Raises:
        InputError: a file is missing, of an unknown kind, empty, or has bad records; every one is listed.
    """
    scan = scan_source(source, phase, setting, answered)
    if scan.problems:
        raise InputError(scan.problems)
    return scan.records


def scan_source(source: str, phase: int, setting: str = "data", answered: bool = True) -> Scan:
    """As `read_records`, but returns the problems beside the good records.

    Raises:
        InputError: there is no such file, or it is of an unknown kind.
    """
    scan = Scan()
    if source.partition(":")[0] in EMBEDDED:
        scan.records.extend(embedded_records(source, phase, setting))
        scan.files.append((source, EMBEDDED_FORMAT, len(scan.records)))
        return scan
    for path in source_files(source, setting):
        try:
            _scan_file(path, phase, setting, answered, scan)
        except InputError as error:  # torn or not readable
            scan.problems.extend(error.problems)
    if not scan.records and not scan.problems:
        scan.problems.append(Problem(f"{setting}={source}", "holds no record", "give a file with at least one record"))
    return scan


def _scan_file(path: Path, phase: int, setting: str, answered: bool, scan: Scan) -> None:
    kind = _detect(path, phase, setting, LOOKED_AT)
    found = _scan_rows(path, kind, phase, answered)
    if found.unknown_keys and (whole := _detect(path, phase, setting, None)) is not kind:
        kind, found = whole, _scan_rows(path, whole, phase, answered)
    scan.records.extend(found.records)
    scan.problems.extend(found.problems)
    scan.files.append((str(path), kind.name if kind else "unknown", len(found.records)))


def _scan_rows(path: Path, kind: Format | None, phase: int, answered: bool) -> ScannedRows:
    scan, file = ScannedRows(), RecordFile(path)
    keys = tuple(kind.keys()) if kind else ()
    for where, start, value in rows(path):
        if isinstance(value, Problem):
            scan.problems.append(value)
        elif not isinstance(value, Mapping):
            what = f"is a {type(value).__name__}, required is a JSON object"
            scan.problems.append(Problem(where, what, "an array of records is read from a .json file" * isinstance(value, list)))
        else:
            assert kind is not None, "a file with a readable record has a format, or was refused"
            row = Row(file, where, start, value)
            row.check_keys(row.fields, keys)
            scan.unknown_keys = scan.unknown_keys or bool(row.problems)
            record = _record(row, kind, phase, answered)
            if row.problems:
                scan.problems.extend(row.problems)
            else:
                scan.records.append(record)
    return scan


def _record(row: Row, kind: Format, phase: int, answered: bool) -> Record:
    messages = kind.read(row, answered)
    if phase == 1 and not row.problems:
        check_alignment(row, messages)
    task = row.optional_text(TASK)
    if task and not TASK_NAME.fullmatch(task):
        fix = "it becomes part of metrics' names: use letters, digits, spaces and . : - _, at most 100"
        row.bad(f"`{TASK}` is {shown(task)}", fix, f"`{TASK}` that cannot be part of a metric's name")
    return Record(row.where, tuple(messages), sys.intern(task) if task else ALL_TASKS, row.optional_text(CONCEPT))


def _detect(path: Path, phase: int, setting: str, most: int | None) -> Format | None:
    """The file's format, from its first `most` readable records; None if it has none.

    Raises:
        InputError: it is in none that is known, or in one that the phase does not take.
    """
    first = list(islice(_readable(path), most))
    if not first:
        return None
    kind = format_of(first)
    if kind is not None and phase in kind.phases:
        return kind
    taken = "; ".join(f"{one.name} ({', '.join(one.example)})" for one in FORMATS.values() if phase in one.phases)
    if kind is None:
        keys = set[str]().union(*first)
        what = f"is in no known format: its records have {', '.join(map(shown, sorted(keys))) or 'no keys'}"
    else:
        what = f"is in the format {kind.name} (of phase {kind.phases[0]}), which phase {phase} does not take"
    raise InputError(Problem(f"{setting}={path}", what, f"phase {phase} takes {taken}", cause=what.partition(":")[0]))


def _readable(path: Path) -> Iterator[set[str]]:
    """The keys of each row that is a JSON object."""
    return ({key for key, value in row.value.items() if value is not None} for row in rows(path) if isinstance(row.value, Mapping))


def records_in_memory(values: Mapping[str, Mapping[str, Any]], local_files: bool = True) -> list[Record]:
    """Records of phase 2 that a program holds, each in a format of its own; answers are not needed. Media are files' names, relative to
    the working directory, data URLs, bytes or PIL images.

    Args:
        values: by what messages call each one.
        local_files: False for records of strangers: what names a file is refused, and no file is looked at.

    Raises:
        InputError: every problem of every record.
    """
    file, records, problems = RecordFile(Path.cwd() / "record", True, local_files), list[Record](), list[Problem]()
    for where, fields in values.items():
        row = Row(file, where, 0, fields)
        kind = format_of([set(row.fields)])
        if kind is None or INSTRUCTION.number not in kind.phases:
            kind = FORMATS["instruction"]
        row.check_keys(row.fields, tuple(kind.keys()))
        records.append(_record(row, kind, INSTRUCTION.number, answered=False))
        problems += row.problems
    if problems:
        raise InputError(problems)
    return records
