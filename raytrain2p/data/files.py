"""Rows of the files that hold records: JSON Lines, a JSON array, or Parquet. Read piece by piece; a file may be larger than memory."""

import codecs
import glob
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raytrain2p.config import InputError, Problem
from raytrain2p.config.paths import is_kind

PIECE = 1 << 20  # bytes read at once
BATCH, BATCH_BYTES = 256, 1 << 26  # rows and bytes of a Parquet file decoded at once, at most: images are on the way through
SPACE = re.compile(r"[ \t\r\n]*")
LONGEST_SYMBOL = 16  # of JSON, such as -Infinity or an escaped character
BYTE_ORDER_MARK = codecs.BOM_UTF8


class RawRow(NamedTuple):
    """What a file has in one place: `start` is its byte in a JSON file, or its row in a Parquet file."""

    where: str
    start: int
    value: Any


def source_files(source: str, setting: str) -> list[Path]:
    """The files of a path or of a pattern, sorted.

    Raises:
        InputError: there is none, or it is of an unknown kind.
    """
    where = f"{setting}={source}"
    path = Path(source)
    if is_kind(path, Path.is_dir):
        raise InputError(Problem(where, "is a directory", "give a file, or a pattern such as DIRECTORY/*.parquet"))
    is_pattern = glob.has_magic(source) and not is_kind(path, Path.exists)
    files = sorted(filter(Path.is_file, map(Path, glob.glob(source, recursive=True)))) if is_pattern else [path]  # noqa: PTH207
    if not files:
        raise InputError(Problem(where, "no file matches the pattern", "quote the pattern, so that the shell leaves it as it is"))
    for file in files:
        if not is_kind(file, Path.is_file):
            what = "is a pipe or a device" if is_kind(file, Path.exists) else "no such file"
            raise InputError(Problem(where, what, f"give a {', '.join(READERS)} file, a pattern, or emoji:SPLIT"))
        if file.suffix not in READERS:
            raise InputError(Problem(f"{setting}={file}", f"files of kind `{file.suffix}` are not read", f"give {' or '.join(READERS)}"))
    return files


def rows(path: Path) -> Iterator[RawRow]:
    """Every row of a file, in order; a Problem in place of its value where the file is torn.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        yield from READERS[path.suffix](path)
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:  # text that is no UTF-8, times beyond Python's
        cause = str(error).partition("\n")[0]
        kind = " Parquet" if path.suffix == ".parquet" else ""
        raise InputError(Problem(str(path), f"is not a readable{kind} file: {cause}")) from None


def _jsonl_rows(path: Path) -> Iterator[RawRow]:
    start = 0
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            content = (line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line).strip()
            if content:
                where = f"{path}:{number}"
                try:
                    value = json.loads(content.decode(), object_pairs_hook=without_repeats)
                except (ValueError, RecursionError) as error:
                    value = _torn(where, error, "write one JSON object per line")
                yield RawRow(where, start + line.index(content), value)
            start += len(line)


def _torn(where: str, error: Exception, fix: str) -> Problem:
    if isinstance(error, RepeatedKeyError):
        return Problem(where, str(error), "keep one of the two: readers of JSON differ in which they take")
    return Problem(where, f"is not JSON: {error}", fix, cause="is not JSON")


class RepeatedKeyError(ValueError):
    """An object has a key twice."""


def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, for `json`, which would keep the last of equal keys.

    Raises:
        RepeatedKeyError: there are some.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise RepeatedKeyError(f"has the key `{ascii(twice)[1:-1]}` twice in one object")
    return found


def _json_rows(path: Path) -> Iterator[RawRow]:
    with path.open("rb") as stream:
        text = _JsonText(stream)
        try:
            if (first := text.next_character()) != "[":
                found = f"begins with {first!r}" if first else "is empty"
                fix = "write `[record, record, ...]`; the name of a file with one record per line ends in .jsonl"
                yield RawRow(str(path), 0, Problem(str(path), f"{found}, required is a JSON array", fix))
                return
            number = 0
            while (between := text.take()) != "]":
                if between != ("," if number else "["):
                    raise ValueError(f"found {between!r} where `,` or `]` is required")
                if not number and text.next_character() == "]":
                    continue
                text.next_character()
                start = text.offset
                yield RawRow(f"{path}:item {number}", start, text.value())
                number += 1
            if text.next_character():
                raise ValueError("there is more text after the array")
        except (ValueError, RecursionError) as error:
            where = f"{path}:byte {text.offset}"
            yield RawRow(where, text.offset, _torn(where, error, "fix this place first: nothing after it was read"))


class _JsonText:
    """The text of a JSON file: the piece not yet taken, which begins at byte `offset` of the file."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream, self.decoder, self.json = (
            stream,
            codecs.getincrementaldecoder("utf-8")(),
            json.JSONDecoder(object_pairs_hook=without_repeats),
        )
        self.offset = len(BYTE_ORDER_MARK) if stream.read(len(BYTE_ORDER_MARK)) == BYTE_ORDER_MARK else 0
        stream.seek(self.offset)
        self.buffer, self.place, self.ended = "", 0, False

    def next_character(self) -> str:
        """The next one that is not white space, which is skipped; empty at the end of the file."""
        while True:
            self._move(SPACE.match(self.buffer, self.place).end())  # type: ignore[union-attr]  # it matches any text
            if self.place < len(self.buffer) or self.ended:
                return self.buffer[self.place : self.place + 1]
            self._read_more()

    def take(self) -> str:
        """As `next_character`, and go past it."""
        character = self.next_character()
        self._move(self.place + len(character))
        return character

    def value(self) -> Any:
        """The JSON value that begins here.

        Raises:
            ValueError: it is torn.
        """
        while True:
            try:
                value, end = self.json.raw_decode(self.buffer, self.place)
            except json.JSONDecodeError as error:
                # A value that goes on beyond the buffer fails at its end, or in a string that does not end.
                may_go_on = error.msg.startswith("Unterminated") or error.pos > len(self.buffer) - LONGEST_SYMBOL
                if self.ended or not may_go_on:
                    raise ValueError(error.msg) from None
            else:
                if end < len(self.buffer) or self.ended:  # a number might have more digits
                    self._move(end)
                    return value
            self._read_more()

    def _move(self, place: int) -> None:
        self.offset += len(self.buffer[self.place : place].encode())
        self.place = place

    def _read_more(self) -> None:
        rest = self.buffer[self.place :]
        piece = self.stream.read(max(PIECE, len(rest)))  # twice as much each time: a long value is parsed anew only a few times
        self.ended = not piece
        self.buffer, self.place = rest + self.decoder.decode(piece, final=self.ended), 0


def _parquet_rows(path: Path) -> Iterator[RawRow]:
    number = 0
    with pq.ParquetFile(path, pre_buffer=False, buffer_size=PIECE) as file:
        if repeated := [name for name, count in Counter(file.schema_arrow.names).items() if count > 1]:
            raise ValueError(f"has several columns of the name {', '.join(repeated)}")
        groups = [file.metadata.row_group(index) for index in range(file.metadata.num_row_groups)]
        largest = max((group.total_byte_size // max(1, group.num_rows) for group in groups), default=0)  # mean bytes of a row
        for batch in file.iter_batches(max(1, min(BATCH, BATCH_BYTES // max(1, largest)))):
            columns = [_values(column) for column in batch.columns]
            for values in zip(*columns, strict=True):
                yield RawRow(f"{path}:row {number}", number, dict(zip(batch.schema.names, values, strict=True)))
                number += 1


def _values(array: pa.Array) -> list[Any]:
    """Python's values of an Arrow array. Of bytes only whether there are any: True or False; a struct of nulls is None."""
    kind = array.type
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind):
        return pc.greater(pc.binary_length(array), 0).to_pylist()
    if pa.types.is_struct(kind):
        names = [field.name for field in kind]
        children = zip(*map(_values, array.flatten()), strict=True)  # flatten: children of a null are null
        return [dict(zip(names, values, strict=True)) if any(value is not None for value in values) else None for values in children]
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        items = iter(_values(array.flatten()))
        return [length if length is None else list(islice(items, length)) for length in pc.list_value_length(array).to_pylist()]
    return array.to_pylist()


READERS: dict[str, Callable[[Path], Iterator[RawRow]]] = {".jsonl": _jsonl_rows, ".json": _json_rows, ".parquet": _parquet_rows}
