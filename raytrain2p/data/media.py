"""References to images: where the bytes are, and how they decode."""

import functools
import hashlib
import io
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
from PIL import Image


@dataclass(frozen=True)
class ImageRef:
    """An image by reference: a file, or a row of a Parquet file with an `image` column of `{bytes, path}`."""

    source: str
    row: int | None = None

    def read(self) -> bytes:
        """The encoded bytes.

        Raises:
            OSError: the file cannot be read.
        """
        if self.row is None:
            return Path(self.source).read_bytes()
        return _parquet_images(self.source, self._group())[self.row - _group_starts(self.source)[self._group()]]

    def _group(self) -> int:
        assert self.row is not None
        starts = _group_starts(self.source)
        return next(group for group in reversed(range(len(starts))) if starts[group] <= self.row)


@functools.lru_cache(maxsize=16)
def _group_starts(source: str) -> tuple[int, ...]:
    metadata = pq.ParquetFile(source).metadata
    starts, total = [], 0
    for group in range(metadata.num_row_groups):
        starts.append(total)
        total += metadata.row_group(group).num_rows
    return tuple(starts)


@functools.lru_cache(maxsize=2)
def _parquet_images(source: str, group: int) -> list[bytes]:
    column = pq.ParquetFile(source).read_row_group(group, columns=["image"]).column("image")
    return [cell["bytes"] for cell in column.to_pylist()]


def decode_image(encoded: bytes) -> Image.Image:
    """Decode in full, to RGB; transparent parts become white.

    Raises:
        OSError, ValueError, SyntaxError: not an image, or truncated; Pillow uses all three.
    """
    image: Image.Image = Image.open(io.BytesIO(encoded))
    image.load()
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return image.convert("RGB")


def decoding_error(encoded: bytes) -> str | None:
    """Why an image does not decode, or None if it does."""
    try:
        decode_image(encoded)
    except Image.DecompressionBombError as error:
        return str(error)
    except (OSError, ValueError, SyntaxError) as error:
        return " ".join(str(error).split()) or type(error).__name__
    return None


def content_key(content: bytes) -> bytes:
    """The sha256 of an item's bytes: identifies it wherever it is stored."""
    return hashlib.sha256(content).digest()
