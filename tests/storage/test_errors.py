"""What a disk that fails is told, whoever writes to it."""

import errno
from pathlib import Path

import pytest
import torch

from raytrain2p.models.artifacts import save_artifact
from raytrain2p.storage.errors import StorageError, is_reachable, reporting_disk_errors


def test_an_artifact_that_finds_no_room_is_told_in_one_line_and_leaves_nothing(small_disk: Path) -> None:
    path = small_disk / "model.pt"
    with (
        pytest.raises(StorageError, match=r"model\.pt cannot be written: no space left; needed 4\.0 MB"),
        reporting_disk_errors(path, 4_000_000),
    ):
        save_artifact(path, "phase2", {}, {}, weights=torch.zeros(1_000_000))
    assert list(small_disk.iterdir()) == []


def test_a_bug_is_no_failed_disk(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="shapes") as caught, reporting_disk_errors(tmp_path / "file", 0):
        raise RuntimeError("shapes do not fit")
    assert not isinstance(caught.value, StorageError)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOTCONN])
def test_a_directory_that_cannot_be_asked_for_is_not_there(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_reachable(tmp_path)
    assert not is_reachable(tmp_path / "absent")

    def fail(*_: object, **__: object) -> None:
        raise OSError(number, "of a device that was pulled")

    monkeypatch.setattr(Path, "stat", fail)
    assert not is_reachable(tmp_path)
