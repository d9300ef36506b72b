"""Media items (images, clips of sound, …): MEDIA says what each kind is; a reference says where its bytes are.

No bytes are kept, but of what a program holds in memory: they are read when an item is hashed, checked or encoded.
"""

import binascii
import functools
import hashlib
import io
import json
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image, ImageOps, UnidentifiedImageError

TEXT = "text"  # the modality of what needs no reference
RATES = (1_000, 1_000_000)  # samples per second of sound that is meant to be heard
UNKNOWN_SIZE = 0xFFFFFFFF  # in the header of a WAV that was written as a stream
FIRST_READ = 1 << 16  # bytes that are read of a JSON record at first; more if it is longer
# What Pillow decodes itself. Of the others it decodes nothing (BUFR, GRIB, HDF5, MPEG), or starts a program: EPS runs Ghostscript.
IMAGE_FORMATS = (
    *("AVIF", "BLP", "BMP", "CUR", "DCX", "DDS", "DIB", "FITS", "FLI", "FTEX", "GBR", "GIF", "ICNS", "ICO", "IM", "JPEG", "JPEG2000"),
    *("MSP", "PCD", "PCX", "PIXAR", "PNG", "PPM", "PSD", "QOI", "SGI", "SPIDER", "SUN", "TGA", "TIFF", "WEBP", "XBM", "XPM", "XVTHUMB"),
)
COMMON_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "AVIF")  # for messages
MOST_PIXELS = 178_956_970  # of an image, and values (samples x channels) of a clip: beyond it a few kilobytes can stand for gigabytes
MOST_BYTES = 1 << 30  # of a file
# Images and clips with more pixels or values are decoded one at a time: 8 threads with 12 bytes a pixel are 2 GB. Reentrant.
LARGE, LARGE_ITEM = 1 << 24, threading.RLock()
STRIP = 1 << 22  # pixels
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # MOST_PIXELS is an error, below it nothing is to be said
LARGE_GROUP = 1 << 28  # bytes of a column in a row group of Parquet, from which on only a part of it is kept
BATCH, KEPT_BATCHES, PIECE = 8, 8, 1 << 20  # rows read at once, how many of them are kept for threads that are behind, and bytes
READING = threading.Lock()  # threads that need one row group read it once, not once each


@dataclass(frozen=True, slots=True)
class MediaRef:
    """Where the bytes of an item are.

    Args:
        modality: a key of MEDIA.
        source: a media file, or a Parquet or JSON file of records that holds the item.
        row: number of the row in a Parquet file, or byte at which the record begins in a JSON file.
        place: keys and indices that lead from the record to the item, such as `images.1`.
        content: the encoded bytes themselves, of an item that is in no file; `source` and `place` then name it in messages.
    """

    modality: str
    source: str
    row: int | None = None
    place: str = ""
    content: bytes | None = field(default=None, repr=False)

    def read(self) -> bytes:
        """The encoded bytes.

        Raises:
            OSError: the file cannot be read.
            ValueError: the item is not at that place any more.
        """
        if self.content is not None:
            return self.content
        if self.row is None:
            if (size := Path(self.source).stat().st_size) > MOST_BYTES:
                raise ValueError(f"has {size:,} bytes, the most that is read is {MOST_BYTES:,}")
            return Path(self.source).read_bytes()
        if self.source.endswith(".parquet"):
            column, _, rest = self.place.partition(".")
            record, rest = _parquet_cell(self.source, column, self.row), rest
        else:
            record, rest = _json_record(self.source, self.row), self.place
        return item_bytes(_walk(record, rest))

    def __str__(self) -> str:
        if self.content is not None:
            return f"{self.source} ({self.place})"
        if self.row is None:
            return self.source
        return f"in {self.source} at {'row' if self.source.endswith('.parquet') else 'byte'} {self.row} ({self.place})"


def item_bytes(value: Any) -> bytes:
    """Bytes of an item inside a record: `{bytes, path}` of a Parquet file, a data URL, or base64.

    Raises:
        ValueError: it is none of them.
    """
    if isinstance(value, Mapping):
        value = value.get("bytes")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise ValueError(f"is a {type(value).__name__}, required are bytes or base64")
    if value.startswith("data:"):
        head, _, value = value.partition(",")
        if not head.endswith(";base64"):
            raise ValueError("is a data URL that is not in base64")
    try:
        content = binascii.a2b_base64(value, strict_mode=True)
    except ValueError as error:  # also text that is not ASCII
        raise ValueError(f"is not base64: {error}") from None
    if not content:
        raise ValueError("has no content")
    return content


def _walk(value: Any, place: str) -> Any:
    try:
        for key in place.split(".") if place else ():
            value = value[int(key)] if isinstance(value, list) else value[key]
    except (KeyError, IndexError, TypeError, ValueError):
        raise ValueError(f"nothing is at {place}: the file has changed") from None
    return value


def _parquet_cell(source: str, column: str, row: int) -> Any:
    starts = _group_starts(source)
    group = next(number for number in reversed(range(len(starts))) if starts[number] <= row)
    try:
        with READING:
            if _group_bytes(source, column, group) > LARGE_GROUP:
                return _passing(source, column, group).cell(row - starts[group])
            cells = _parquet_column(source, column, group)
        return cells[row - starts[group]].as_py()
    except (IndexError, KeyError):
        raise ValueError(f"nothing is at {column} of row {row}: the file has changed") from None


@functools.lru_cache(maxsize=16)
def _group_starts(source: str) -> tuple[int, ...]:
    metadata = pq.ParquetFile(source).metadata
    rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    return tuple(np.cumsum([0, *rows[:-1]]).tolist())


@functools.lru_cache(maxsize=64)
def _group_bytes(source: str, column: str, group: int) -> int:
    metadata = pq.ParquetFile(source).metadata.row_group(group)
    leaves = [metadata.column(number) for number in range(metadata.num_columns)]
    return int(sum(leaf.total_uncompressed_size for leaf in leaves if leaf.path_in_schema.partition(".")[0] == column))


class _PassingColumn:
    """A column of a row group that is too large to keep: a few of its rows, from which to move on. To go back, it is read anew."""

    def __init__(self, source: str, column: str, group: int) -> None:
        self.source, self.column, self.group = source, column, group
        self.first, self.last = 0, 0  # rows that are kept
        self.kept: deque[Any] = deque()
        self.batches: Iterator[Any] = iter(())
        self.restart()

    def restart(self) -> None:
        file = pq.ParquetFile(self.source, pre_buffer=False, buffer_size=PIECE)
        self.batches = file.iter_batches(BATCH, row_groups=[self.group], columns=[self.column])
        self.first = self.last = 0
        self.kept.clear()

    def cell(self, row: int) -> Any:
        if row < self.first:
            self.restart()
        while row >= self.last:
            batch = next(self.batches, None)
            if batch is None:
                raise IndexError(row)
            self.kept.append(batch.column(0))
            self.last += len(batch)
            if len(self.kept) > KEPT_BATCHES:
                self.first += len(self.kept.popleft())
        place = row - self.first
        for cells in self.kept:
            if place < len(cells):
                return cells[place].as_py()
            place -= len(cells)
        raise IndexError(row)


@functools.lru_cache(maxsize=2)
def _passing(source: str, column: str, group: int) -> _PassingColumn:
    return _PassingColumn(source, column, group)


@functools.lru_cache(maxsize=2)
def _parquet_column(source: str, column: str, group: int) -> Any:
    return pq.ParquetFile(source).read_row_group(group, columns=[column]).column(column)


def _json_record(source: str, start: int) -> Any:
    """The JSON value that begins at a byte; the file may go on after it."""
    size = FIRST_READ
    with Path(source).open("rb") as stream:
        while True:
            stream.seek(start)
            content = stream.read(size)
            try:
                return json.JSONDecoder().raw_decode(content.decode("utf-8", errors="ignore"))[0]
            except ValueError:
                if len(content) < size:
                    raise ValueError(f"no record begins at byte {start}: the file has changed") from None
            size *= 4


@dataclass(frozen=True)
class MediaKind:
    """What a modality's items are.

    Args:
        decode: encoded bytes to what its encoder takes; raises OSError, ValueError or SyntaxError.
        size: a decoded item's size in words, for statistics.
        show: a decoded item as an image, for plots.
        stated: the pixels or values that encoded bytes say they hold, without decoding them; 0 if they do not say. Raises as `decode`.
    """

    decode: Callable[[bytes], Any]
    size: Callable[[Any], str]
    show: Callable[[Any], Image.Image]
    stated: Callable[[bytes], int] = lambda encoded: 0


def decode_image(encoded: bytes) -> Image.Image:
    """Decode in full, to RGB, turned as its Exif tag says; transparent parts become white, 16 bits become 8.

    Raises:
        ValueError: not an image, a too large one, or one whose values have no known range. Pillow raises anything for damaged ones.
    """
    image = _opened(encoded)
    with _one_at_a_time(image.width * image.height, "pixels"):
        return _rgb(image)


def _opened(encoded: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(encoded), formats=_formats())  # reads the header alone
    except UnidentifiedImageError:
        raise ValueError(f"not an image in a format that is read ({', '.join(COMMON_FORMATS)}, ...)") from None  # Pillow's has an address
    except Image.DecompressionBombError:
        raise ValueError(f"has more than {MOST_PIXELS:,} pixels, the most that are read") from None


def stated_pixels(encoded: bytes) -> int:
    """By the header of an image."""
    image = _opened(encoded)
    return image.width * image.height


def stated_samples(encoded: bytes) -> int:
    """Samples of all channels, by the header of a clip."""
    import soundfile

    try:
        with soundfile.SoundFile(io.BytesIO(encoded)) as file:
            return int(file.frames * file.channels)
    except soundfile.LibsndfileError as error:
        raise ValueError(error.error_string) from None


def image_bytes(image: Image.Image) -> bytes:
    """An image that a program holds, as a PNG, which loses nothing; turned as its Exif tag says.

    Raises:
        ValueError, OSError: as `decode_image`.
    """
    image = ImageOps.exif_transpose(image)
    stream = io.BytesIO()
    (image if image.mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16") else _rgb(image)).save(stream, "PNG", compress_level=1)
    return stream.getvalue()


def _one_at_a_time(values: int, unit: str) -> AbstractContextManager[object]:
    if values > MOST_PIXELS:
        raise ValueError(f"has {values:,} {unit}, the most that are read are {MOST_PIXELS:,}")
    return LARGE_ITEM if values > LARGE else nullcontext()


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in IMAGE_FORMATS if name in Image.OPEN)


def _rgb(image: Image.Image) -> Image.Image:
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode in ("I", "F"):
        raise ValueError("its values have 32 bits, and their range is not known: write it with 8 or 16")
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = _on_white(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    """In strips: copies of a whole large image would need gigabytes."""
    result, rows = Image.new("RGB", image.size), max(1, STRIP // image.width)
    for top in range(0, image.height, rows):
        box = (0, top, image.width, min(top + rows, image.height))
        layer = image.crop(box).convert("RGBA")
        result.paste(Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB"), box)
    return result


@dataclass(frozen=True)
class Clip:
    """Sound in one channel: samples (n,), float32 in [-1, 1], and their number per second."""

    samples: np.ndarray
    rate: int

    @property
    def seconds(self) -> float:
        return len(self.samples) / self.rate


def decode_audio(encoded: bytes) -> Clip:
    """Decode WAV, FLAC, Ogg (Vorbis, Opus) or MP3; several channels are averaged. An MP3 that is cut off is a shorter one.

    Raises:
        ValueError: not sound, too long, truncated, empty, at an impossible rate, or with values that are not finite.
    """
    import soundfile

    if encoded[:4] == b"RIFF" and len(encoded) - 8 < (size := int.from_bytes(encoded[4:8], "little")) < UNKNOWN_SIZE:
        raise ValueError(f"truncated: has {len(encoded):,} of {size + 8:,} bytes")  # libsndfile takes what is there
    try:
        with soundfile.SoundFile(io.BytesIO(encoded)) as file, _one_at_a_time(file.frames * file.channels, "values (samples x channels)"):
            samples, rate = file.read(dtype="float32", always_2d=True).mean(axis=1), file.samplerate
    except soundfile.LibsndfileError as error:
        raise ValueError(error.error_string) from None  # without the prefix, which has an address in memory
    if not RATES[0] <= rate <= RATES[1]:
        raise ValueError(f"has {rate:,} samples per second, possible are {RATES[0]:,} to {RATES[1]:,}")
    if not len(samples):
        raise ValueError("the clip has no samples")
    if not np.isfinite(samples).all():
        raise ValueError("the clip has samples that are not finite")
    return Clip(samples, rate)


def draw_wave(clip: Clip, width: int = 96, height: int = 96) -> Image.Image:
    """The clip's envelope as an image."""
    peaks = [float(np.abs(part).max()) if len(part) else 0.0 for part in np.array_split(clip.samples, width)]
    half = np.clip(np.array(peaks) / max(*peaks, 1e-6) * height / 2, 1, None)
    rows = np.abs(np.arange(height)[:, None] - height / 2)
    return Image.fromarray(np.where(rows <= half[None, :], 90, 255).astype(np.uint8)).convert("RGB")


MEDIA: dict[str, MediaKind] = {
    "image": MediaKind(
        decode_image,
        lambda image: f"{image.width} x {image.height}",
        lambda image: image,
        stated_pixels,
    ),
    "audio": MediaKind(decode_audio, lambda clip: f"{clip.seconds:.1f} s", draw_wave, stated_samples),
}


def decode(ref: MediaRef) -> Any:
    """An item, as its encoder takes it.

    Raises:
        OSError, ValueError, SyntaxError: it cannot be read or decoded.
    """
    return MEDIA[ref.modality].decode(ref.read())


def content_key(content: bytes) -> bytes:
    """The sha256 of an item's bytes: identifies it wherever it is stored."""
    return hashlib.sha256(content).digest()
