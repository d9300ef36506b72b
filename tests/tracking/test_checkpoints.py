"""Checkpoint files: complete or refused, one best and one last."""

import errno
import os
import zipfile
from pathlib import Path

import pytest
import torch

from raytrain2p.storage.errors import StorageError, storage_error
from raytrain2p.tracking.checkpoints import (
    LAST,
    CheckpointScore,
    best_checkpoint,
    damage,
    last_checkpoint,
    resumable_checkpoint,
    settle,
    write_checkpoint,
)
from tests.tracking.checkpoint_files import content, flip_bit, load, names, tear


def best_and_last(folder: Path) -> None:
    """Two different checkpoints."""
    write_checkpoint(content(0.01, 1.0), folder / LAST, "best-epoch=00-train_loss=1.0000.ckpt")
    write_checkpoint(content(0.01, 2.0), folder / LAST, None)


def test_a_missing_best_is_not_replaced_by_a_later_last(tmp_path: Path) -> None:
    (tmp_path / LAST).write_bytes(b"a later step")
    (tmp_path / "best-epoch=00-train_loss=2.0000.ckpt").write_bytes(b"an older best")
    settle(tmp_path, "best-epoch=01-train_loss=1.0000.ckpt", is_last=False)
    assert names(tmp_path) == ["best-epoch=00-train_loss=2.0000.ckpt", "last.ckpt"]


def test_a_complete_directory_is_left_unchanged(tmp_path: Path) -> None:
    best_and_last(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    settle(tmp_path, "best-epoch=00-train_loss=1.0000.ckpt", is_last=False)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_run_resumes_from_an_undamaged_last(tmp_path: Path) -> None:
    best_and_last(tmp_path)
    assert resumable_checkpoint(tmp_path) == (tmp_path / LAST, [])


def test_if_both_are_damaged_both_are_reported_and_there_is_none(tmp_path: Path) -> None:
    best_and_last(tmp_path)
    best = tmp_path / "best-epoch=00-train_loss=1.0000.ckpt"
    tear(tmp_path / LAST)
    flip_bit(best)
    path, complaints = resumable_checkpoint(tmp_path)
    assert path is None
    assert [complaint.partition(" is damaged")[0] for complaint in complaints] == [str(tmp_path / LAST), str(best)]


def test_a_flipped_bit_is_reported_otherwise_than_a_truncated_file(tmp_path: Path) -> None:
    best_and_last(tmp_path)
    assert damage(tmp_path / LAST) is None
    flip_bit(tmp_path / LAST)
    assert "checksum" in str(damage(tmp_path / LAST))
    tear(tmp_path / LAST)
    assert "BadZipFile" in str(damage(tmp_path / LAST))


def test_an_archive_that_is_not_a_checkpoint_is_damaged(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / LAST, "w") as archive:
        archive.writestr("notes.txt", "something else")
    assert damage(tmp_path / LAST) is not None
    assert resumable_checkpoint(tmp_path)[0] is None


def test_a_partial_file_of_a_killed_process_is_not_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / ".last.ckpt.aside-4711").write_bytes(b"half")
    (tmp_path / ".best-epoch=00-train_loss=1.0000.ckpt.aside-4711").write_bytes(b"half")
    assert resumable_checkpoint(tmp_path) == (None, [])
    assert best_checkpoint(tmp_path) is None
    assert last_checkpoint(tmp_path) is None


def test_an_empty_or_absent_directory_has_no_checkpoint(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        assert best_checkpoint(folder) is None
        assert last_checkpoint(folder) is None
        assert resumable_checkpoint(folder) == (None, [])


def test_the_last_and_the_best_are_one_file_on_disk_and_no_other_file_is_left(tmp_path: Path) -> None:
    (tmp_path / "best-epoch=00-x=9.0000.ckpt").write_bytes(b"an older best")
    write_checkpoint(content(0.1), tmp_path / LAST, "best-epoch=01-x=1.0000.ckpt")
    assert names(tmp_path) == ["best-epoch=01-x=1.0000.ckpt", "last.ckpt"]
    assert (tmp_path / LAST).samefile(tmp_path / "best-epoch=01-x=1.0000.ckpt")
    write_checkpoint(content(0.1, 2.0), tmp_path / LAST, None)
    assert load(tmp_path / "best-epoch=01-x=1.0000.ckpt")["state_dict"]["weight"][0] == 1
    assert load(tmp_path / LAST)["state_dict"]["weight"][0] == 2


def test_a_file_system_without_hard_links_gets_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    write_checkpoint(content(0.1), tmp_path / LAST, "best-epoch=00-x=1.0000.ckpt")
    assert names(tmp_path) == ["best-epoch=00-x=1.0000.ckpt", "last.ckpt"]
    assert (tmp_path / LAST).read_bytes() == (tmp_path / "best-epoch=00-x=1.0000.ckpt").read_bytes()


def test_a_best_of_the_same_name_is_replaced(tmp_path: Path) -> None:
    name = CheckpointScore(0, 2, "train_loss", 1.00001).file_name()
    assert name == CheckpointScore(0, 4, "train_loss", 1.00002).file_name()
    write_checkpoint(content(0.1, 1.0), tmp_path / LAST, name)
    write_checkpoint(content(0.1, 2.0), tmp_path / LAST, name)
    assert names(tmp_path) == [name, "last.ckpt"]
    assert load(tmp_path / name)["state_dict"]["weight"][0] == 2


def reports_full_disk(text: str, path: Path) -> None:
    assert text.startswith(f"{path} cannot be written: no space left; needed 1.5 MB, free ")
    assert 0 < float(text.rpartition("free ")[2].removesuffix(" MB")) < 1.1
    assert "\n" not in text


def test_a_full_disk_is_reported_with_path_and_sizes_and_earlier_files_are_unchanged(small_disk: Path) -> None:
    write_checkpoint(content(0.3), small_disk / LAST, "best-epoch=00-x=1.0000.ckpt")
    with pytest.raises(StorageError) as caught:
        write_checkpoint(content(1.5, 2.0), small_disk / LAST, "best-epoch=01-x=0.5000.ckpt")
    reports_full_disk(str(caught.value), small_disk / LAST)
    assert names(small_disk) == ["best-epoch=00-x=1.0000.ckpt", "last.ckpt"]
    for name in names(small_disk):
        assert damage(small_disk / name) is None
        assert load(small_disk / name)["state_dict"]["weight"][0] == 1


def test_a_run_directory_that_is_gone_is_not_made_again(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="is gone"):
        write_checkpoint(content(0.1), tmp_path / "a run" / "lightning_checkpoints" / LAST, None)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_gone_is_reported_as_gone(tmp_path: Path) -> None:
    path = tmp_path / "unmounted" / LAST
    assert f"{tmp_path / 'unmounted'} is gone" in str(storage_error(path, OSError(errno.EIO, "Input/output error"), 10))


def test_a_directory_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "run").write_bytes(b"no directory")
    with pytest.raises(StorageError):
        write_checkpoint({}, tmp_path / "run" / "checkpoints" / "last.ckpt", None)


def test_a_directory_or_another_file_in_place_of_last_is_reported_and_the_best_is_taken(tmp_path: Path) -> None:
    best_and_last(tmp_path)
    best = tmp_path / "best-epoch=00-train_loss=1.0000.ckpt"
    (tmp_path / LAST).unlink()
    (tmp_path / LAST).mkdir()
    path, (complaint,) = resumable_checkpoint(tmp_path)
    assert path == best
    assert complaint.startswith(f"{tmp_path / LAST} is damaged")
    (tmp_path / LAST).rmdir()
    torch.save({"tensors": torch.ones(1)}, tmp_path / LAST)
    path, (complaint,) = resumable_checkpoint(tmp_path)
    assert path == best
    assert "has no weights to resume from" in complaint
