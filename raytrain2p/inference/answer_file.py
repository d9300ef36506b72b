"""The file of `predict --output`: a line for each answer, kept as it is made. The same command continues where a kill ended it."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from raytrain2p.config import InputError, Problem
from raytrain2p.config.escaping import json_line
from raytrain2p.data.media import MediaRef
from raytrain2p.data.records import ASSISTANT, Record
from raytrain2p.storage.errors import reporting_disk_errors
from raytrain2p.storage.files import trim_torn_line, write_file
from raytrain2p.storage.locks import Lock

MEGABYTE = 1_000_000
RECORD, ANSWER, KEY = "record", "answer", "key"
BEGINNING = f'{{"{RECORD}": "'.encode()  # of each line


def question_key(digest: str, record: Record, media: Mapping[MediaRef, bytes], max_new_tokens: int) -> str:
    """Identifies what is asked of which model, by content: equal keys have equal answers.

    Args:
        digest: of the model.
        media: the sha256 of each item.
    """
    asked = record.messages[:-1] if record.messages[-1].role == ASSISTANT else record.messages
    messages = [
        [message.role, [part if isinstance(part, str) else [part.modality, media[part].hex()] for part in message.parts]]
        for message in asked
    ]
    return hashlib.sha256(json.dumps([digest, max_new_tokens, messages]).encode()).hexdigest()


class AnswerFile:
    """Rows that begin with `record` and have `answer` and `key`. One process at a time appends to them.

    Attributes:
        answers: by key, those that the file has.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.answers: dict[str, str] = {}
        for number, line in enumerate(self._lines(), 1):
            try:
                if not line.endswith(b"\n") and is_torn(line):
                    continue
                row = json.loads(line)
                self.answers[row[KEY]] = row[ANSWER]
            except (ValueError, KeyError, TypeError):
                what = f"line {number} is not an answer of this command: it lacks `{KEY}` or `{ANSWER}`"
                raise InputError(Problem(f"--output={path}", what, "give another file")) from None
        trim_torn_line(path)

    def _lines(self) -> list[bytes]:
        return self.path.read_bytes().splitlines(keepends=True) if self.path.is_file() else []

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write the rows of a batch at once: what is left after a kill is divided into the same batches, and so gets the same answers.

        Raises:
            StorageError: the disk is full, read-only or gone.
        """
        with reporting_disk_errors(self.path, MEGABYTE), self.path.open("ab") as stream:
            stream.write(lines_of(rows))
        self.answers |= {row[KEY]: row[ANSWER] for row in rows}

    def finish(self, rows: Sequence[Mapping[str, Any]]) -> int:
        """Put the rows in this order, atomically, after those of other questions or models. Returns the number of these."""
        asked = {row[KEY] for row in rows}
        others = [line for line in self._lines() if json.loads(line)[KEY] not in asked]
        with reporting_disk_errors(self.path, MEGABYTE):
            write_file(self.path, b"".join(others) + lines_of(rows))
        return len(others)


def is_torn(line: bytes) -> bool:
    """Whether a last line without an end is the beginning of one of ours, or the zeros that a power failure leaves."""
    text = line.rstrip(b"\0")
    return text.startswith(BEGINNING) or BEGINNING.startswith(text)


def lines_of(rows: Sequence[Mapping[str, Any]]) -> bytes:
    return "".join(f"{json_line(row)}\n" for row in rows).encode()


@contextmanager
def opened(path: Path) -> Iterator[AnswerFile]:
    """Within, this process alone writes to the file.

    Raises:
        InputError: it cannot be written, another process writes to it, or it holds something else.
    """
    where = f"--output={path}"
    if path.is_dir():
        raise InputError(Problem(where, "is a directory", "give the name of a file in it, such as answers.jsonl"))
    if not path.parent.is_dir():
        raise InputError(Problem(where, f"there is no directory {path.parent}", "make it first"))
    if not os.access(path if path.exists() else path.parent, os.W_OK) or not os.access(path.parent, os.W_OK):
        raise InputError(Problem(where, "cannot be written", "give a file that can be"))
    with Lock(path.with_name(f".{path.name}.lock")).held() as holder:
        if holder is not None:
            raise InputError(Problem(where, f"{holder} writes to it", "wait for it, or give another file"))
        yield AnswerFile(path)
