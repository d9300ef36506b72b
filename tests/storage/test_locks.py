"""Locks that end with their process."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from raytrain2p.storage.locks import Lock
from tests.tracking.stores import lock_holder


def test_a_lock_is_held_by_one_process_at_a_time_and_names_it(tmp_path: Path) -> None:
    lock = Lock(tmp_path / ".lock")
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
def killed_soon(process: subprocess.Popen[str]) -> Iterator[None]:
    """Kills a process half a second after the block begins."""
    timer = threading.Timer(0.5, process.kill)
    timer.start()
    yield
    timer.join()


@pytest.mark.timeout(60)
def test_a_held_lock_is_waited_for(tmp_path: Path) -> None:
    lock = Lock(tmp_path / ".lock")
    with lock_holder(lock.path) as process, killed_soon(process), lock.held(50.0) as holder:
        assert holder is None


def test_a_killed_process_releases_its_lock(tmp_path: Path) -> None:
    lock = Lock(tmp_path / ".lock")
    with lock_holder(lock.path) as process:
        assert lock.is_held()
        process.kill()
        process.wait()
        assert not lock.is_held()
        with lock.held() as holder:
            assert holder is None


def test_a_lock_is_released_after_an_error(tmp_path: Path) -> None:
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


def test_touching_a_lock_updates_the_time_of_its_file(tmp_path: Path) -> None:
    lock = Lock(tmp_path / ".lock")
    with lock.held():
        os.utime(lock.path, (1, 1))
        lock.touch()
    assert lock.path.stat().st_mtime > 1
