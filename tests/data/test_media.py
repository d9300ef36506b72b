"""Media items: decoding, why it fails, and reading them where they are."""

import base64
import io
import resource
import struct
import time
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import EpsImagePlugin, Image, ImageFile

from raytrain2p.data import media
from raytrain2p.data.checks import check_media, examine
from raytrain2p.data.media import IMAGE_FORMATS, MEDIA, MediaRef, content_key, decode, decode_audio, decode_image, item_bytes
from raytrain2p.data.reading import read_records
from raytrain2p.data.records import USER, Message, Record

from .files import encoded, sound, write_lines, write_parquet


def saved(path: Path, content: bytes, modality: str = "image") -> MediaRef:
    path.write_bytes(content)
    return MediaRef(modality, str(path))


def test_transparent_parts_become_white() -> None:
    buffer = io.BytesIO()
    Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(buffer, "PNG")
    image = decode_image(buffer.getvalue())
    assert image.mode == "RGB"
    assert image.getpixel((0, 0)) == (255, 255, 255)


def test_photos_are_turned_as_their_exif_tag_says() -> None:
    photo, turned = Image.new("RGB", (8, 4)), Image.Exif()
    turned[0x0112] = 6
    buffer = io.BytesIO()
    photo.save(buffer, "JPEG", exif=turned)
    assert decode_image(buffer.getvalue()).size == (4, 8)


def test_sixteen_bits_become_eight_and_values_without_a_range_are_refused() -> None:
    ramp = np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8)
    buffer = io.BytesIO()
    Image.fromarray(ramp).save(buffer, "PNG")
    assert (np.asarray(decode_image(buffer.getvalue()))[:, :, 0] == ramp >> 8).all()
    buffer = io.BytesIO()
    Image.fromarray(ramp.astype(np.float32)).save(buffer, "TIFF")
    with pytest.raises(ValueError, match="their range is not known"):
        decode_image(buffer.getvalue())


def test_sound_that_is_cut_off_or_at_an_impossible_rate_is_refused() -> None:
    whole = sound()
    with pytest.raises(ValueError, match=r"truncated: has 822 of 1,644 bytes"):
        decode_audio(whole[: len(whole) // 2])
    streamed = whole[:4] + b"\xff" * 4 + whole[8:]  # written to a pipe: the size was not known
    assert len(decode_audio(streamed).samples) == 800
    with pytest.raises(ValueError, match="has 2,147,483,647 samples per second"):
        decode_audio(whole[:24] + (2**31 - 1).to_bytes(4, "little") + whole[28:])


def test_channels_of_sound_are_averaged_and_its_rate_is_kept() -> None:
    clip = decode_audio(sound(400, 8000, channels=2))
    assert clip.samples.shape == (400,)
    assert clip.samples.dtype == np.float32
    assert (clip.rate, clip.seconds) == (8000, 0.05)


def test_torn_media_and_other_files_have_a_cause_and_whole_ones_none(tmp_path: Path) -> None:
    whole = encoded("red", "JPEG", size=64)
    assert examine(saved(tmp_path / "whole.jpg", whole)).fault is None
    assert "truncated" in (examine(saved(tmp_path / "torn.jpg", whole[:-40])).fault or "")
    assert "not an image in a format that is read (PNG, JPEG" in (examine(saved(tmp_path / "text.jpg", b"no image at all")).fault or "")
    assert examine(saved(tmp_path / "empty.jpg", b"")).fault
    assert examine(MediaRef("image", str(tmp_path / "absent.jpg"))).fault == "cannot be read: No such file or directory"
    assert examine(saved(tmp_path / "whole.wav", sound(), "audio")).fault is None
    assert examine(saved(tmp_path / "text.wav", b"no sound at all", "audio")).fault == "does not decode: Format not recognised."
    assert examine(saved(tmp_path / "silent.wav", sound(0), "audio")).fault == "does not decode: the clip has no samples"


@pytest.mark.parametrize(("modality", "content", "size"), [("image", encoded("red"), "8 x 8"), ("audio", sound(), "0.1 s")])
def test_every_modality_has_a_size_and_something_to_show(tmp_path: Path, modality: str, content: bytes, size: str) -> None:
    item = decode(saved(tmp_path / "item", content, modality))
    assert MEDIA[modality].size(item) == size
    assert isinstance(MEDIA[modality].show(item), Image.Image)


@pytest.mark.parametrize(
    ("value", "cause"),
    [
        ("data:image/png;base64,AAA", "is not base64"),
        ("data:image/png;base64,AA A", "is not base64"),
        ("ÄÄÄÄ", "is not base64"),
        ("data:text/plain,hello", "is a data URL that is not in base64"),
        ("data:image/png;base64,", "has no content"),
        (7, "is a int, required are bytes or base64"),
        ({"bytes": None}, "is a NoneType"),
    ],
)
def test_what_holds_no_bytes_has_a_cause(value: object, cause: str) -> None:
    with pytest.raises(ValueError, match=cause):
        item_bytes(value)


def test_bytes_are_taken_from_structs_data_urls_and_base64() -> None:
    written = base64.b64encode(b"content").decode()
    assert [item_bytes(value) for value in ({"bytes": b"content"}, written, f"data:;base64,{written}")] == [b"content"] * 3


def test_a_reference_into_a_file_that_changed_is_an_error_and_no_crash(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "pairs.parquet", {"text": "a", "image": {"bytes": encoded("red"), "path": None}})
    lines = write_lines(tmp_path / "pairs.jsonl", {"text": "a"})
    for ref in (
        MediaRef("image", str(path), 9, "image"),
        MediaRef("image", str(path), 0, "picture"),
        MediaRef("image", str(path), 0, "image.4"),
        MediaRef("image", str(lines), 0, "image"),
        MediaRef("image", str(lines), 3, "image"),
    ):
        assert "the file has changed" in (examine(ref).fault or "")


def test_a_long_record_is_read_from_its_place_in_a_json_file(tmp_path: Path) -> None:
    url = "data:image/png;base64," + base64.b64encode(bytes(300_000)).decode()
    row = {"text": "é" * media.FIRST_READ, "image": url}
    records = read_records(str(write_lines(tmp_path / "pairs.jsonl", row, row)), 1)
    assert [ref.read() for record in records for ref in record.media()] == [bytes(300_000)] * 2


def test_threads_that_need_one_row_group_read_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": str(number), "image": {"bytes": b"x" * number, "path": None}} for number in range(1, 50)]
    path = write_parquet(tmp_path / "pairs.parquet", *rows, group=100)
    media._parquet_column.cache_clear()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda row: MediaRef("image", str(path), row, "image").read(), range(49)))
    assert found == [b"x" * number for number in range(1, 50)]
    assert media._parquet_column.cache_info().misses == 1


def test_an_item_that_does_not_decode_is_reported_for_every_record_that_has_it(tmp_path: Path) -> None:
    (tmp_path / "red.png").write_bytes(encoded("red"))
    (tmp_path / "torn.jpg").write_bytes(encoded("red", "JPEG", size=64)[:-40])
    (tmp_path / "torn.wav").write_bytes(b"RIFF")
    names = [{"image": "torn.jpg"}, {"image": "red.png"}, {"image": "torn.jpg"}, {"audio": "torn.wav"}]
    path = write_lines(tmp_path / "pairs.jsonl", *[{"text": str(number)} | name for number, name in enumerate(names)])
    records = read_records(str(path), 1)
    problems = check_media(records).problems
    assert [problem.where for problem in problems] == [f"{path}:1", f"{path}:3", f"{path}:4"]
    assert all("torn.jpg does not decode: image file is truncated" in problem.what for problem in problems[:2])
    assert problems[2].what.startswith(f"audio {tmp_path / 'torn.wav'} does not decode: ")
    images = [key for ref, key in check_media(records).keys.items() if ref.modality == "image"]
    assert [problem.where for problem in check_media(records, stored={"image": images}).problems] == [f"{path}:4"]


def test_an_item_that_its_encoder_does_not_take_is_reported(tmp_path: Path) -> None:
    def refuse(clip: Any) -> None:
        raise ValueError(f"lasts {len(clip.samples)} samples, the longest that the encoder takes is 3")

    (tmp_path / "long.wav").write_bytes(sound())
    records = read_records(str(write_lines(tmp_path / "pairs.jsonl", {"text": "a", "audio": "long.wav"})), 1)
    assert check_media(records, {"image": refuse}).problems == []
    (problem,) = check_media(records, {"audio": refuse}).problems
    assert problem.what.startswith(f"audio {tmp_path / 'long.wav'} lasts ")


def test_equal_items_have_one_key_wherever_they_are(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "pairs.parquet", {"text": "a", "image": {"bytes": encoded("red"), "path": None}})
    refs = [saved(tmp_path / "red.png", encoded("red")), MediaRef("image", str(path), 0, "image")]
    records = [Record("", (Message(USER, (ref,)),)) for ref in [*refs, refs[0]]]
    assert check_media(records).keys == dict.fromkeys(refs, content_key(encoded("red")))


def test_an_item_that_cannot_be_read_hides_no_other(tmp_path: Path) -> None:
    (tmp_path / "torn.wav").write_bytes(b"RIFF")
    path = write_lines(tmp_path / "pairs.jsonl", {"text": "a", "image": "red.png"}, {"text": "b", "audio": "torn.wav"})
    (tmp_path / "red.png").write_bytes(encoded("red"))
    records = read_records(str(path), 1)
    (tmp_path / "red.png").unlink()  # between reading the records and the media
    checked = check_media(records)
    assert [problem.where for problem in checked.problems] == [f"{path}:1", f"{path}:2"]
    assert "red.png cannot be read: No such file or directory" in checked.problems[0].what
    assert [ref.modality for ref in checked.keys] == ["audio"]


def grey_png(width: int, height: int) -> bytes:
    """An image of any size in a few kilobytes: black, one bit a pixel."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    compressor = zlib.compressobj(9)
    row = bytes(1 + (width + 7) // 8)
    pixels = b"".join([*(compressor.compress(row) for _ in range(height)), compressor.flush()])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize("content", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", b"\xc5\xd0\xd3\xc6" + bytes(60)])
def test_postscript_never_reaches_ghostscript(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "gs"
    script.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # looked up anew
    with pytest.raises(ValueError, match=r"not an image in a format that is read \(PNG"):
        decode_image(content)
    assert not (tmp_path / "started").exists()


def test_every_format_that_is_read_is_decoded_by_pillow_itself() -> None:
    """Stubs hand an image to a program that an application registers, EPS to Ghostscript, WMF to Windows."""
    Image.init()
    for name in IMAGE_FORMATS:
        reader = Image.OPEN[name][0]
        assert not isinstance(reader, type) or not issubclass(reader, (ImageFile.StubImageFile, EpsImagePlugin.EpsImageFile)), name


@pytest.mark.parametrize(("width", "height"), [(40_000, 40_000), (13_400, 13_400), (2**31 - 1, 2**31 - 1)])
def test_an_image_that_would_need_gigabytes_is_refused_by_its_header(width: int, height: int) -> None:
    small = grey_png(8, 8)
    header = small[:16] + struct.pack(">II", width, height) + small[24:29]
    content = header + struct.pack(">I", zlib.crc32(header[12:])) + small[33:]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "178,956,970" in (examine_bytes(content) or "")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000, "kilobytes"


def examine_bytes(content: bytes) -> str | None:
    with NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        return examine(MediaRef("image", file.name)).fault


def test_large_images_are_decoded_one_at_a_time_and_small_ones_beside_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight threads, each with an image of 178 megapixels, took 10 GB."""
    monkeypatch.setattr(media, "LARGE", 100)
    real, active, most = Image.Image.convert, Counter[bool](), Counter[bool]()

    def slow(image: Image.Image, *arguments: Any, **options: Any) -> Image.Image:
        large = image.width * image.height > 100
        active[large] += 1
        most[large] = max(most[large], active[large])
        time.sleep(0.02)
        active[large] -= 1
        return real(image, *arguments, **options)

    monkeypatch.setattr(Image.Image, "convert", slow)
    refs = [saved(tmp_path / f"{number}.png", grey_png(side, side)) for number, side in enumerate([5, 20] * 8)]
    assert not check_media([Record("here", (Message(USER, tuple(refs)),))]).problems
    assert most[True] == 1
    assert most[False] > 1


def test_a_large_transparent_image_is_put_on_white_in_strips_and_looks_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 23, 4), np.uint8), "RGBA")
    buffer = io.BytesIO()
    noise.save(buffer, "PNG")
    whole = decode_image(buffer.getvalue())
    monkeypatch.setattr(media, "STRIP", 100)
    assert decode_image(buffer.getvalue()) == whole
    assert whole == Image.alpha_composite(Image.new("RGBA", noise.size, "white"), noise).convert("RGB")


def test_sound_of_absurd_length_is_refused_by_its_header() -> None:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.zeros(48_000, np.int16), 48_000, format="FLAC")
    content = bytearray(buffer.getvalue())
    content[21] |= 0x0F  # the upper bits of the number of samples: 64 thousand million
    with pytest.raises(ValueError, match=r"values \(samples x channels\), the most that are read are 178,956,970"):
        decode_audio(bytes(content))


def test_a_file_that_is_larger_than_memory_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "sparse.png").open("wb") as file:
        file.truncate(1 << 40)
    assert "has 1,099,511,627,776 bytes, the most that is read is" in (examine(MediaRef("image", str(tmp_path / "sparse.png"))).fault or "")


def test_a_large_row_group_is_read_in_passing_from_any_place_by_any_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row group of 1 GB took 3.6 GB of memory."""
    monkeypatch.setattr(media, "LARGE_GROUP", 0)
    path = write_parquet(tmp_path / "a.parquet", *({"image": {"bytes": bytes([number]), "path": None}} for number in range(250)), group=200)
    refs = [MediaRef("image", str(path), number, "image") for number in range(250)]
    kept = media._passing(str(path), "image", 0)
    with ThreadPoolExecutor(8) as pool:
        assert [content[0] for content in pool.map(MediaRef.read, refs)] == list(range(250))
    assert sum(map(len, kept.kept)) <= media.BATCH * media.KEPT_BATCHES
    assert [refs[number].read()[0] for number in (199, 3, 249, 100, 0)] == [199, 3, 249, 100, 0]
