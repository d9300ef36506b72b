"""The printed cause of a failed training: a traceback for a bug, one line for a disk."""

import errno
import os
import shlex
import sys
import traceback
from dataclasses import asdict
from pathlib import Path

import pytest
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.train import TrainingFailedError
from ray.train.v2.api.exceptions import ControllerError

from raytrain2p.config import InputError, Problem
from raytrain2p.launch.monitor import TrainingFailedError as FailedLaunch
from raytrain2p.launch.monitor import cause_of, naming_run, typed_command
from raytrain2p.storage.errors import StorageError
from raytrain2p.storage.files import write_json
from raytrain2p.tracking.run import Run, disk_gone, launch_record


class WorkersFailed(TrainingFailedError):
    """Like Ray's own error for failed workers."""

    def __init__(self, first: Exception) -> None:
        snippet = "".join(traceback.format_exception(raised(first)))
        super().__init__(f"Training failed due to worker errors:\n[Rank 0 Error Snippet]:\n{snippet}")
        self.worker_failures = {0: first, 1: RuntimeError("of another worker")}


def raised(error: Exception) -> Exception:
    """An error with a traceback."""
    try:
        raise error
    except Exception as caught:
        return caught


def test_a_bug_has_the_workers_traceback_without_passwords() -> None:
    text = cause_of(WorkersFailed(KeyError("http://me:secret@server")), None)  # Ray's error holds its traceback
    assert text.startswith("[Rank 0 Error Snippet]:\nTraceback (most recent call last):\n  File")
    assert "KeyError" in text
    assert "secret" not in text


def test_an_error_of_ray_has_its_traceback() -> None:
    assert cause_of(raised(KeyError("key")), None).startswith("Traceback (most recent call last):\n  File")


class WorkerHealthCheckTimeoutError(Exception):
    """Like Ray's own, of a private module."""


class WorkerHealthCheckFailedError(Exception):
    """Likewise."""

    def __init__(self, failure: Exception) -> None:
        super().__init__("A worker health check failed.")
        self.health_check_failure = failure


@pytest.mark.parametrize(
    ("failure", "line"),
    [
        (WorkerHealthCheckTimeoutError("hanging"), "worker 0 did not answer for longer than launch.hang_timeout_s"),
        (WorkerHealthCheckFailedError(OutOfMemoryError("memory")), "worker 0 was ended because its node ran out of memory"),
        (WorkerHealthCheckFailedError(RayActorError()), "worker 0 was ended from outside"),
    ],
)
def test_a_worker_that_ray_lost_has_one_line(failure: Exception, line: str) -> None:
    text = cause_of(WorkersFailed(failure), None)
    assert text.startswith(line)
    assert "\n" not in text


def test_a_gpu_without_memory_is_an_error_of_the_worker_with_its_traceback() -> None:
    text = cause_of(WorkersFailed(raised(RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"))), None)
    assert "node" not in text
    assert "CUDA out of memory" in text


def test_bad_input_that_a_worker_finds_is_shown_without_a_traceback() -> None:
    text = cause_of(WorkersFailed(raised(InputError(Problem("--launch-id x", "belongs to another root", "take another one")))), None)
    assert "Traceback" not in text
    assert "belongs to another root" in text


def test_a_controller_that_ray_ended_for_memory_has_one_line() -> None:
    text = cause_of(ControllerError(OutOfMemoryError("1 worker(s) were killed due to the node running low on memory")), None)
    assert text.startswith("Ray's controller was ended because its node ran out of memory")
    assert "\n" not in text


@pytest.mark.parametrize("line", ["last.ckpt cannot be written: no space left", "run.json cannot be written: gone"])
def test_a_disk_that_failed_has_one_line(line: str) -> None:
    assert cause_of(WorkersFailed(raised(StorageError(line))), None) == line
    assert cause_of(WorkersFailed(raised(StorageError(line))), StorageError("another line")) == line


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_disk_error_outside_our_own_writes_has_one_line(number: int) -> None:
    text = cause_of(WorkersFailed(OSError(number, os.strerror(number), "/disk/file")), None)
    assert text == f"[Errno {number}] {os.strerror(number)}: '/disk/file'"
    assert "Traceback" in cause_of(WorkersFailed(FileNotFoundError(errno.ENOENT, "No such file", "/a/bug")), None)


def test_a_disk_that_is_gone_has_one_line_whatever_met_it_first(tmp_path: Path) -> None:
    error_of_ray = RuntimeError("Unable to set up cluster storage with the following settings: StorageContext<...>")
    (tmp_path / "there" / ".launches").mkdir(parents=True)
    assert disk_gone(str(tmp_path / "there"), "launch-1") is None
    gone = disk_gone(str(tmp_path / "gone"), "launch-1")
    for error in (error_of_ray, WorkersFailed(error_of_ray)):
        assert cause_of(error, gone).startswith(f"{tmp_path / 'gone'} cannot be written: {tmp_path / 'gone' / '.launches'} is gone, ")
        assert "StorageContext" in cause_of(error, None)


@pytest.mark.parametrize("verb", [["/bin/raytrain2p", "train"], ["raytrain2p/train.py"]])
def test_the_recorded_command_can_be_pasted_however_it_was_typed(monkeypatch: pytest.MonkeyPatch, verb: list[str]) -> None:
    monkeypatch.setattr(sys, "argv", [*verb, "--phase", "1", "--dry-run", "tracking.uri=http://me:secret@server", "data.train=a b.jsonl"])
    command = typed_command("raytrain2p.train", leave_out=["--dry-run"])
    assert command.startswith("python -m raytrain2p.train --phase 1 ")
    assert shlex.split(command)[5:] == ["tracking.uri=http://me:***@server", "data.train=a b.jsonl"]


@pytest.mark.parametrize("has_run", [True, False])
def test_a_failed_launch_has_its_run(tmp_path: Path, has_run: bool) -> None:
    run = Run("a" * 32, f"{tmp_path}/alignment/{'a' * 32}_20260101_000000", "e", "20260101_000000", "one", "alignment", "sqlite:///x")
    run.path.mkdir(parents=True)
    launch_record(str(tmp_path), "one").parent.mkdir()
    if has_run:
        write_json(launch_record(str(tmp_path), "one"), asdict(run))
    with pytest.raises(FailedLaunch) as caught, naming_run(str(tmp_path), "one"):
        raise FailedLaunch("the cause")
    assert caught.value.run == (run if has_run else None)
