"""How a failed disk is recognized and reported."""

import errno
from pathlib import Path

import pytest
import torch

from raytrain2p.config.phases import INSTRUCTION
from raytrain2p.models.artifacts import save_artifact
from raytrain2p.storage.errors import StorageError, is_disk_failure, is_reachable, reporting_disk_errors


def test_an_artifact_on_a_full_disk_is_reported_in_one_line_and_leaves_no_file(small_disk: Path) -> None:
    path = small_disk / "model.pt"
    with (
        pytest.raises(StorageError, match=r"model\.pt cannot be written: no space left; needed 4\.0 MB"),
        reporting_disk_errors(path, 4_000_000),
    ):
        save_artifact(path, INSTRUCTION, {}, {}, weights=torch.zeros(1_000_000))
    assert list(small_disk.iterdir()) == []


def test_a_bug_is_not_reported_as_a_failed_disk(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="shapes") as caught, reporting_disk_errors(tmp_path / "file", 0):
        raise RuntimeError("shapes do not fit")
    assert not isinstance(caught.value, StorageError)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, "full"), True),
        (OSError(errno.EROFS, "read-only"), True),
        (StorageError("one line"), True),
        (FileNotFoundError(errno.ENOENT, "no such file"), False),
        (RuntimeError("shapes do not fit"), False),
    ],
    ids=str,
)
def test_a_failed_disk_is_recognized_by_its_error_and_by_what_is_raised_while_it_is_handled(error: Exception, expected: bool) -> None:
    assert is_disk_failure(error) == expected
    follow_up = RuntimeError("unexpected position in the file")
    follow_up.__context__ = error
    assert is_disk_failure(follow_up) == expected


def test_an_error_that_is_reported_already_is_not_reported_twice(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"^inner$"), reporting_disk_errors(tmp_path / "outer", 0):
        raise StorageError("inner")


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOTCONN])
def test_a_directory_on_a_failed_device_is_not_reachable(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_reachable(tmp_path)
    assert not is_reachable(tmp_path / "absent")

    def fail(*_: object, **__: object) -> None:
        raise OSError(number, "of a device that was removed")

    monkeypatch.setattr(Path, "stat", fail)
    assert not is_reachable(tmp_path)
