"""Atomic files."""

import errno
import os
import stat
from contextlib import nullcontext
from pathlib import Path

import pytest

from raytrain2p.storage.files import link_file, move, read_json, remove_partial_files, replaced, write_file, write_json
from tests.killed_between import KILLED, NEVER, in_child


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


def test_what_is_in_place_of_a_json_file_or_of_its_directory_is_said(
    tmp_path: Path,
) -> None:
    (tmp_path / "a.json").mkdir()
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        read_json(tmp_path / "a.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be read: Not a directory"):
        read_json(tmp_path / "file" / "a.json")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="is not a file, but a pipe"):
        read_json(tmp_path / "pipe")
    os.truncate(tmp_path / "file", 2**40)
    with pytest.raises(ValueError, match=r"has 1099\.5 GB, more than any such file"):
        read_json(tmp_path / "file")


# Moves


def some_files(folder: Path) -> Path:
    (folder / "inner" / "empty").mkdir(parents=True)
    (folder / "a").write_bytes(b"a" * 5000)
    (folder / "inner" / "b").write_bytes(b"b")
    (folder / "inner" / "gone").symlink_to("nowhere")
    for path in (folder / "a", folder / "inner" / "b", folder / "inner"):
        os.utime(path, ns=(10**18, 10**18 + 12345))
    return folder


def everything(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Kind, time and content of all below a folder."""
    paths = [path for path in folder.rglob("*") if not path.is_symlink()]
    links = {str(path.relative_to(folder)): (0, 0, str(path.readlink()).encode()) for path in folder.rglob("*") if path.is_symlink()}
    return links | {
        str(path.relative_to(folder)): (path.stat().st_mode, path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in paths
    }


@pytest.mark.parametrize("disks", [1, 2])
def test_a_directory_is_moved_whole_and_back(tmp_path: Path, other_disk: Path, disks: int) -> None:
    source, target = some_files(tmp_path / "source"), (other_disk if disks == 2 else tmp_path) / "target"
    before = everything(source)
    move(source, target)
    assert not source.exists()
    assert everything(target) == before
    move(target, source)
    assert not target.exists()
    assert everything(source) == before


def test_a_move_between_disks_that_is_killed_loses_nothing_and_is_finished_either_way(tmp_path: Path, other_disk: Path) -> None:
    source, target = some_files(tmp_path / "source"), other_disk / "target"
    before = everything(source)
    code, operations = in_child([tmp_path, other_disk], NEVER, lambda: move(source, target))
    assert code == 0
    assert operations > 12
    move(target, source)
    for kill_at in range(operations):
        for then in ((source, target), (target, source)):
            assert in_child([tmp_path, other_disk], kill_at, lambda: move(source, target))[0] == KILLED
            assert before in (everything(source), everything(target)), f"killed before operation {kill_at}"
            if not then[0].exists() and then[1].exists():
                continue
            move(*then)
            assert everything(then[1]) == before
            assert not then[0].exists()
            if then[1] == target:
                move(target, source)
    assert list(other_disk.iterdir()) == []


@pytest.mark.parametrize("content", [b"longer than mine", b"mine"])
def test_a_move_replaces_nothing_but_a_copy(tmp_path: Path, content: bytes) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(b"mine")
    os.utime(source, (1e9, 1e9))
    target.write_bytes(content)
    with pytest.raises(FileExistsError, match="is there already"):
        move(source, target)
    assert (source.read_bytes(), target.read_bytes()) == (b"mine", content)
