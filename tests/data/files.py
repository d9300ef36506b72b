"""Files of records and media for tests."""

import io
import json
import wave
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def encoded(colour: str, kind: str = "PNG", size: int = 8) -> bytes:
    """An image of one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), colour).save(buffer, kind)
    return buffer.getvalue()


def sound(samples: int = 800, rate: int = 8000, channels: int = 1) -> bytes:
    """A WAV file of a rising line."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(b"".join(int(place * 30).to_bytes(2, "little") * channels for place in range(samples)))
    return buffer.getvalue()


def write_examples_media(folder: Path) -> None:
    """The files that the examples of all formats name."""
    (folder / "cat.png").write_bytes(encoded("red"))
    (folder / "dog.png").write_bytes(encoded("blue"))
    (folder / "meow.wav").write_bytes(sound())


def write_lines(path: Path, *lines: Any) -> Path:
    """A JSON Lines file; a `str` is written as it stands, everything else as JSON."""
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def write_array(path: Path, *records: Any) -> Path:
    path.write_text(json.dumps(records, indent=1))
    return path


def write_parquet(path: Path, *rows: dict[str, Any], group: int = 2) -> Path:
    pq.write_table(pa.Table.from_pylist(list(rows)), path, row_group_size=group)
    return path


def write_records(path: Path, *rows: dict[str, Any]) -> Path:
    """A file of the kind that its name says."""
    return {".jsonl": write_lines, ".json": write_array, ".parquet": write_parquet}[path.suffix](path, *rows)
