"""Fixtures of the tests of tracking: stores of their own, and a small disk."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from raytrain2p.config import Settings
from raytrain2p.tracking.mlflow_store import prepare_store
from tests.tracking.stores import EXPERIMENT, STORES, begin, settings_in


@pytest.fixture(scope="session")
def made_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a made SQLite store, to be copied: MLflow takes seconds to make one. Made from a working directory
    that has nothing to do with it."""
    folder = tmp_path_factory.mktemp("store")
    before, working = Path.cwd(), folder / "working"
    working.mkdir()
    os.chdir(working)
    try:
        prepare_store(settings_in(folder / "new" / "folder"), EXPERIMENT)
    finally:
        os.chdir(before)
    return folder / "new" / "folder"


@pytest.fixture
def settings(tmp_path: Path, made_store: Path) -> Settings:
    """With an SQLite store of this test's own."""
    shutil.copy(made_store / "mlflow.db", tmp_path)
    return begin(settings_in(tmp_path))


@pytest.fixture(params=list(STORES))
def each_store(request: pytest.FixtureRequest, tmp_path: Path, made_store: Path) -> Settings:
    """Once with an SQLite store and once with a plain-file store of this test's own."""
    if request.param == "sqlite":
        shutil.copy(made_store / "mlflow.db", tmp_path)
        return begin(settings_in(tmp_path))
    settings = settings_in(tmp_path, store=request.param)
    prepare_store(settings, EXPERIMENT)
    return begin(settings)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "small_disk"
    folder.mkdir()
    if shutil.which("mount") is None:
        pytest.skip("a file system cannot be mounted here: there is no mount command")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"a file system cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)  # a store on it may still be open
