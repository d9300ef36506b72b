"""Files that are whole whenever they can be read, and locks that end with their process."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from raytrain2p.storage.files import read_json, write_file, write_json
from raytrain2p.storage.locks import Lock
from tests.tracking.stores import lock_holder


def test_new_content_replaces_the_old_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "made on the way" / "file"
    for content in ("older and longer", "new", b"bytes\xff", "Füße"):
        write_file(path, content)
        assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert [path.name for path in path.parent.iterdir()] == ["file"]


def test_a_file_is_not_written_where_the_directory_above_its_own_is_gone(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_file(tmp_path / "a run" / "plots" / "curves.png", b"")
    assert list(tmp_path.iterdir()) == []


def test_what_is_written_as_json_is_read_again(tmp_path: Path) -> None:
    value = {"text": "Füße", "nothing": None, "numbers": [1, 2.5], "groups": {"a": {"b": True}}}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    assert "Füße" in (tmp_path / "a.json").read_text()


def test_a_file_that_is_not_there_is_none(tmp_path: Path) -> None:
    assert read_json(tmp_path / "a.json") is None


def test_what_cannot_be_written_leaves_the_file_of_before_and_nothing_beside_it(small_disk: Path) -> None:
    write_file(small_disk / "file", "before")
    with pytest.raises(OSError, match="No space left"):
        write_file(small_disk / "file", bytes(2_000_000))
    assert (small_disk / "file").read_text() == "before"
    assert [path.name for path in small_disk.iterdir()] == ["file"]


def test_a_lock_is_held_by_one_process_at_a_time_and_says_by_whom(tmp_path: Path) -> None:
    lock = Lock(tmp_path / "folder" / ".lock")
    assert not lock.is_held()
    with lock_holder(lock.path) as process:
        assert lock.is_held()
        with lock.held() as holder:
            assert str(holder).startswith(f"pid {process.pid} on ")
    with lock.held() as holder:
        assert holder is None
        assert lock.is_held()
        assert f"pid {os.getpid()} on " in lock.path.read_text()
    assert not lock.is_held()


@contextmanager
def ended_soon(process: subprocess.Popen[str]) -> Iterator[None]:
    """Kills a process while what is within goes on."""
    timer = threading.Timer(0.5, process.kill)
    timer.start()
    yield
    timer.join()


@pytest.mark.timeout(60)
def test_a_lock_is_waited_for(tmp_path: Path) -> None:
    lock = Lock(tmp_path / ".lock")
    with lock_holder(lock.path) as process, ended_soon(process), lock.held(50.0) as holder:
        assert holder is None


def test_a_killed_process_lets_go_of_its_lock(tmp_path: Path) -> None:
    lock = Lock(tmp_path / ".lock")
    with lock_holder(lock.path) as process:
        assert lock.is_held()
        process.kill()
        process.wait()
        assert not lock.is_held()
        with lock.held() as holder:
            assert holder is None


def test_a_lock_that_an_error_ends_is_let_go(tmp_path: Path) -> None:
    lock = Lock(tmp_path / ".lock")
    with pytest.raises(ZeroDivisionError), lock.held():
        raise ZeroDivisionError
    assert not lock.is_held()


def test_asking_whether_a_lock_is_held_makes_no_file(tmp_path: Path) -> None:
    assert not Lock(tmp_path / ".lock").is_held()
    assert list(tmp_path.iterdir()) == []


def test_a_child_of_another_program_does_not_keep_a_lock(tmp_path: Path) -> None:
    lock = Lock(tmp_path / ".lock")
    with lock.held():
        child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    try:
        assert not lock.is_held()
    finally:
        child.communicate()


def test_a_sign_of_life_is_a_new_time_of_the_file(tmp_path: Path) -> None:
    lock = Lock(tmp_path / ".lock")
    with lock.held():
        os.utime(lock.path, (1, 1))
        lock.touch()
    assert lock.path.stat().st_mtime > 1
