"""Media items: decoding, why it fails, and reading them where they are."""

import base64
import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from raytrain2p.data import media
from raytrain2p.data.checks import check_media, examine
from raytrain2p.data.media import MEDIA, MediaRef, content_key, decode, decode_audio, decode_image, item_bytes
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
    assert examine(saved(tmp_path / "text.jpg", b"no image at all")).fault == "does not decode: not an image that Pillow knows"
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
