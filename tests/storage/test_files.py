"""Atomic files."""

import errno
import os
import stat
from contextlib import nullcontext
from pathlib import Path

import pytest

from raytrain2p.storage.files import link_file, read_json, remove_partial_files, replaced, write_file, write_json


def test_new_content_replaces_the_old_and_leaves_no_other_file(tmp_path: Path) -> None:
    path = tmp_path / "made on the way" / "file"
    for content in ("older and longer", "new", b"bytes\xff", "Füße"):
        write_file(path, content)
        assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert [path.name for path in path.parent.iterdir()] == ["file"]


def test_a_file_is_not_written_where_the_directory_above_its_own_is_gone(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_file(tmp_path / "a run" / "plots" / "curves.png", b"")
    assert list(tmp_path.iterdir()) == []


def test_json_is_read_as_it_was_written(tmp_path: Path) -> None:
    value = {"text": "Füße", "nothing": None, "numbers": [1, 2.5], "groups": {"a": {"b": True}}}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    assert "Füße" in (tmp_path / "a.json").read_text()


def test_a_missing_json_file_is_read_as_none(tmp_path: Path) -> None:
    assert read_json(tmp_path / "a.json") is None


def test_a_full_disk_leaves_the_previous_content_and_no_other_file(small_disk: Path) -> None:
    write_file(small_disk / "file", "before")
    with pytest.raises(OSError, match="No space left"):
        write_file(small_disk / "file", bytes(2_000_000))
    assert (small_disk / "file").read_text() == "before"
    assert [path.name for path in small_disk.iterdir()] == ["file"]


def test_a_stream_that_raises_leaves_the_previous_content_and_no_other_file(tmp_path: Path) -> None:
    write_file(tmp_path / "file", "before")
    with pytest.raises(TypeError), replaced(tmp_path / "file") as stream:
        stream.writelines([b"half of it", "not bytes"])  # type: ignore[list-item]
    assert (tmp_path / "file").read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_file_is_on_disk_before_it_is_renamed_and_its_directory_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[tuple[str, int, bool]] = []

    def record(descriptor: int) -> None:
        status = os.fstat(descriptor)
        synced.append(("directory" if stat.S_ISDIR(status.st_mode) else "file", status.st_size, (tmp_path / "file").exists()))

    monkeypatch.setattr(os, "fsync", record)
    write_file(tmp_path / "file", "content")
    assert synced == [("file", len("content"), False), ("directory", tmp_path.stat().st_size, True)]


@pytest.mark.parametrize(("number", "raises"), [(errno.EINVAL, False), (errno.EIO, True)])
def test_a_directory_that_cannot_be_synced_is_an_error_unless_its_file_system_never_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, raises: bool
) -> None:
    sync = os.fsync

    def fail(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, "of a directory")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="of a directory") if raises else nullcontext():
        write_file(tmp_path / "file", "content")
    assert (tmp_path / "file").read_text() == "content"


def test_a_second_name_replaces_a_file_even_if_a_killed_process_left_a_partial_one(tmp_path: Path) -> None:
    source, path = tmp_path / "source", tmp_path / "path"
    source.write_text("new")
    path.write_text("old")
    (tmp_path / f".path.aside-{os.getpid()}").write_text("half")
    for _ in range(2):
        link_file(source, path)
        assert path.samefile(source)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["path", "source"]


def test_partial_files_of_killed_processes_are_removed_and_others_kept(tmp_path: Path) -> None:
    (tmp_path / "plots").mkdir()
    kept, left = [tmp_path / "a.json", tmp_path / ".mirror.json"], [tmp_path / ".a.json.aside-1", tmp_path / "plots" / ".b.png.aside-2"]
    for path in kept + left:
        path.write_bytes(b"")
    remove_partial_files(tmp_path)
    assert [path for path in kept + left if path.exists()] == kept


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "is empty"),
        (bytes(100), "has zero bytes alone, as after a power failure"),
        (b'{"a": 1', "is not JSON"),
        (b"null", "is `null`"),
        (b"\xff\xfe{}", "is not UTF-8 text"),
        (b'["\\ud800"]', "is not UTF-8 text"),
        (b"[" * 100_000, "is nested too deeply"),
    ],
)
def test_what_is_no_json_is_said_in_a_few_words(tmp_path: Path, content: bytes, what: str) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=what):
        read_json(tmp_path / "a.json")


def test_a_directory_in_place_of_a_json_file_is_said_and_so_is_a_file_in_place_of_its_directory(tmp_path: Path) -> None:
    (tmp_path / "a.json").mkdir()
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        read_json(tmp_path / "a.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be read: Not a directory"):
        read_json(tmp_path / "file" / "a.json")
