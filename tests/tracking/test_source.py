"""The source of a run, from real repositories of git."""

import getpass
import os
import subprocess
import time
from pathlib import Path

import pytest
from mlflow.utils import mlflow_tags

from raytrain2p.tracking import source
from raytrain2p.tracking.source import source_tags, version_tags

USER, NAME, COMMIT = mlflow_tags.MLFLOW_USER, mlflow_tags.MLFLOW_SOURCE_NAME, mlflow_tags.MLFLOW_GIT_COMMIT
BRANCH, DIRTY, REMOTE = mlflow_tags.MLFLOW_GIT_BRANCH, mlflow_tags.MLFLOW_GIT_DIRTY, mlflow_tags.MLFLOW_GIT_REPO_URL


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    return subprocess.run(["git", "-C", folder, *who, *arguments], check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """With one commit on the branch `work`."""
    folder = tmp_path / "repository"
    folder.mkdir()
    git(folder, "init", "-q", "-b", "work")
    (folder / "mine.py").write_text("1\n")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "first")
    return folder


def test_the_source_is_the_entry_point_and_the_commit_of_the_working_directory(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (repository / "inner").mkdir()
    monkeypatch.chdir(repository / "inner")
    tags = source_tags("raytrain2p.train")
    assert tags == {
        USER: getpass.getuser(),
        NAME: "raytrain2p.train",
        mlflow_tags.MLFLOW_SOURCE_TYPE: "LOCAL",
        COMMIT: git(repository, "rev-parse", "HEAD"),
        BRANCH: "work",
        DIRTY: "false",
    }


def test_a_changed_file_makes_the_source_dirty_and_a_new_run_directory_does_not(repository: Path) -> None:
    (repository / "checkpoints").mkdir()
    (repository / "checkpoints" / "model.pt").write_text("x")
    assert source_tags("x", repository)[DIRTY] == "false"
    (repository / "mine.py").write_text("2\n")
    assert source_tags("x", repository)[DIRTY] == "true"


@pytest.mark.parametrize("remote", ["https://user:hunter2secret@host/x.git", "https://hunter2secret@host/x.git"])
def test_the_remote_has_no_credentials(repository: Path, remote: str) -> None:
    git(repository, "remote", "add", "origin", remote)
    tags = source_tags("x", repository)
    assert tags[REMOTE].endswith("@host/x.git")
    assert "hunter2secret" not in str(tags)


def test_a_commit_without_a_branch_and_a_repository_without_a_commit(repository: Path, tmp_path: Path) -> None:
    git(repository, "checkout", "-q", "--detach")
    assert BRANCH not in (tags := source_tags("x", repository))
    assert len(tags[COMMIT]) == 40
    new = tmp_path / "new"
    new.mkdir()
    git(new, "init", "-q")
    assert not {COMMIT, DIRTY} & set(source_tags("x", new))


def test_outside_a_repository_and_without_git_there_is_no_commit(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    assert set(source_tags("x", tmp_path)) == {USER, NAME, mlflow_tags.MLFLOW_SOURCE_TYPE}
    monkeypatch.setenv("PATH", str(tmp_path))
    assert COMMIT not in source_tags("x", repository)


def test_git_that_hangs_is_not_waited_for(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "git").write_text("#!/bin/sh\nexec sleep 60\n")
    (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(source, "SECONDS_FOR_GIT", 0.2)
    began = time.monotonic()
    assert COMMIT not in source_tags("x", repository)
    assert time.monotonic() - began < 10


def test_the_repositorys_own_monitor_is_not_run(repository: Path, tmp_path: Path) -> None:
    monitor = tmp_path / "monitor"
    monitor.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    monitor.chmod(0o755)
    git(repository, "config", "core.fsmonitor", str(monitor))
    git(repository, "status")
    assert (tmp_path / "ran").exists(), "git does run it"
    (tmp_path / "ran").unlink()
    assert COMMIT in source_tags("x", repository)
    assert not (tmp_path / "ran").exists()


def test_the_user_is_the_login_at_the_server_or_of_the_machine_or_its_number(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "anna")
    assert source_tags("x", tmp_path)[USER] == "anna"
    monkeypatch.delenv("MLFLOW_TRACKING_USERNAME")

    def nobody() -> str:
        raise OSError("no such user")

    monkeypatch.setattr(getpass, "getuser", nobody)
    assert source_tags("x", tmp_path)[USER] == f"uid {os.getuid()}"


def test_the_versions_of_what_trains_are_tags() -> None:
    import torch

    tags = version_tags()
    assert tags["version.torch"] == torch.__version__
    assert {"version.python", "version.ray", "version.pytorch-lightning", "version.transformers", "version.peft", "version.mlflow"} <= set(
        tags
    )
