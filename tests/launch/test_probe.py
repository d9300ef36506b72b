"""What a node sees, on real disks. Two nodes that see different ones: tests/cluster/test_shared_files.py."""

import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from ray import cloudpickle

import raytrain2p
import raytrain2p.launch.nodes  # has it sent by value
from raytrain2p.launch import probe
from tests.disks import Disk


def looked(folder: Path, seconds: float = 0.0) -> str:
    """What is wrong with a folder, or nothing."""
    return probe.look("node", [str(folder)], {}, [], seconds)[0].get(str(folder), "")


def test_a_folder_that_the_driver_has_made_gets_a_file(tmp_path: Path) -> None:
    assert looked(tmp_path) == ""
    assert [path.read_text() for path in tmp_path.iterdir()] == ["node"]


def test_where_the_drivers_folder_is_not_to_be_seen_nothing_is_written(tmp_path: Path) -> None:
    assert looked(tmp_path / "probe") == probe.OTHER
    assert looked(tmp_path / "root" / "probe") == probe.ABSENT
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_seen_a_moment_later_is_waited_for(tmp_path: Path) -> None:
    later = threading.Timer(0.3, (tmp_path / "probe").mkdir)
    later.start()
    assert looked(tmp_path / "probe", 20.0) == ""
    later.join()


def test_a_disk_that_is_full_or_read_only_is_named_as_that(disk: Disk) -> None:
    disk.fill()
    assert looked(disk.folder) == probe.FULL
    disk.make_read_only()
    assert looked(disk.folder) == "cannot be written to: Read-only file system"


def test_what_others_have_written_is_waited_for_and_missed(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    (tmp_path / "b").write_text("")
    later = threading.Timer(0.3, (tmp_path / "b").write_text, ["b"])
    later.start()
    begin = time.monotonic()
    assert probe.unseen("node", {str(tmp_path): ["a", "b"]}, 20.0) == {}
    assert time.monotonic() - begin < 10
    assert probe.unseen("node", {str(tmp_path): ["a", "b", "c"]}, 0.2) == {str(tmp_path): ["c"]}
    later.join()


def test_files_that_are_missing_or_have_another_size_are_counted(tmp_path: Path) -> None:
    (tmp_path / "same").write_text("xx")
    (tmp_path / "cut").write_text("x")
    files = {str(tmp_path / name): 2 for name in ("same", "cut", "gone")}
    _, differing, _ = probe.look("node", [], {"model": files, "all there": {str(tmp_path / "same"): 2}}, [], 0.0)
    assert differing == {"model": (1, 2, str(tmp_path / "cut"))}


def test_versions_are_without_the_build_and_a_package_that_is_not_there_has_a_reason() -> None:
    _, _, versions = probe.look("node", [], {}, ["torch", "raytrain2p", "no-such-package"], 0.0)
    assert versions["torch"] == torch.__version__.partition("+")[0]
    assert versions["raytrain2p"] == raytrain2p.__version__
    assert versions["no-such-package"].startswith(" ")


def test_a_node_needs_nothing_of_this_package_to_run_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = cloudpickle.dumps((probe.look, probe.unseen))
    monkeypatch.setitem(sys.modules, probe.__name__, None)
    look, unseen = cloudpickle.loads(sent)
    assert look("node", [str(tmp_path)], {}, [], 0.0) == ({}, {}, {})
    assert unseen("other", {str(tmp_path): ["node"]}, 0.0) == {}
