"""What happens rarely and all at once: full disks under locks, databases that are gone, deaths while a run describes itself."""

import os
import shutil
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from raytrain2p.config import InputError, load_settings
from raytrain2p.runs.sync import sync
from raytrain2p.storage.errors import StorageError
from raytrain2p.storage.files import read_json, write_file, write_json
from raytrain2p.tracking import run_directory as run_directory_module
from raytrain2p.tracking import run_writer as writer_module
from raytrain2p.tracking.checkpoints import write_checkpoint
from raytrain2p.tracking.find import find_runs, is_alive
from raytrain2p.tracking.mlflow_store import check_store_is_shared, prepare_store
from raytrain2p.tracking.run import launch_record
from raytrain2p.tracking.run_writer import describe_run, end_run, open_run_writer, resolved_config
from tests.tracking.stores import create, fill, mlflow_run, note, settings_in


@pytest.mark.parametrize(
    "overrides",
    [
        ["tracking.uri=http://server:5000", "tracking.experiment=me@lab"],
        ['model.system_prompt="say token=abcd\\"x"'],
        ["model.system_prompt='the secret: giraffes'"],
    ],
)
def test_settings_without_a_password_are_recorded_as_they_are(tmp_path: Path, overrides: list[str]) -> None:
    settings = load_settings(2, None, [f"output.root={tmp_path}", *overrides])
    assert resolved_config(settings, {}) == settings.model_dump(mode="json")


@pytest.mark.parametrize("dies_at", ["MLFLOW_RUN_ID.txt", "README.md", "run.json"])
def test_a_run_that_died_while_it_described_itself_can_be_sent(settings: Any, monkeypatch: pytest.MonkeyPatch, dies_at: str) -> None:
    run = create(settings)

    def die(path: Path, content: Any) -> None:
        if path.name == dies_at:
            raise KeyboardInterrupt
        (write_file if isinstance(content, str) else write_json)(path, content)

    with monkeypatch.context() as patch:
        for module in (run_directory_module, writer_module):
            patch.setattr(module, "write_file", die)
        patch.setattr(run_directory_module, "write_json", die)
        with pytest.raises(KeyboardInterrupt):
            describe_run(run, resolved_config(settings, {}), "command", {})
    assert end_run(run, settings.tracking.uri, "FAILED")
    assert sync(run, settings.output.root, None, lambda line: None)


def test_a_run_of_another_machine_that_gave_no_sign_of_life_is_dead(settings: Any) -> None:
    run = create(settings)
    with run.files.lock.held():
        pass
    run.files.write_status("RUNNING")
    write_json(run.path / "status.json", read_json(run.path / "status.json") | {"host": "another"})
    os.utime(run.files.lock.path, (1, 1))
    assert not is_alive(run, settings.output.root)


def test_training_needs_no_mlflow_even_if_it_is_a_database(settings: Any, tmp_path: Path) -> None:
    run = create(settings)
    (tmp_path / "broken.db").write_bytes(b"no database" * 1000)
    description = {"config": resolved_config(settings, {}), "command": "command", "facts": {}}
    with open_run_writer(run, f"sqlite:///{tmp_path}/broken.db", description, lambda line: None) as writer:
        assert not writer.mlflow_sync.close(0)


def test_a_database_that_cannot_be_opened_is_away(settings: Any, tmp_path: Path) -> None:
    run = create(settings)
    run.files.write_status("FAILED")
    (tmp_path / "broken.db").write_bytes(b"no database" * 1000)
    assert not sync(run, settings.output.root, f"sqlite:///{tmp_path}/broken.db", lambda line: None)


def test_a_disk_that_is_full_before_the_lock_is_told_as_such(small_disk: Path, settings: Any, tmp_path: Path) -> None:
    settings = settings_in(tmp_path, f"output.root={small_disk}")
    run = create(settings)
    fill(small_disk)
    description = {"config": resolved_config(settings, {}), "command": "command", "facts": {}}
    with pytest.raises(StorageError), open_run_writer(run, settings.tracking.uri, description, lambda line: None):
        pass


def test_whether_a_run_is_alive_can_be_asked_on_a_full_disk(small_disk: Path, settings: Any, tmp_path: Path) -> None:
    settings = settings_in(tmp_path, f"output.root={small_disk}")
    run = create(settings)
    run.files.lock.path.touch()
    fill(small_disk)
    assert not run.files.lock.is_held()


def test_a_launch_whose_record_is_gone_keeps_its_directory(settings: Any) -> None:
    first = create(settings)
    path = launch_record(settings.output.root, "launch-1")
    path.unlink()
    write_json(path, {"launch_id": "launch-1", "timestamp": "20260101_120000", "since": 0.0})  # a second later, that is
    assert create(settings) == first


def answering_nonsense() -> socket.socket:
    server = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        connection, _ = server.accept()
        with connection:
            connection.recv(1000)
            connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")

    threading.Thread(target=answer, daemon=True).start()
    return server


def test_a_port_where_something_else_listens_is_bad_input(tmp_path: Path) -> None:
    with answering_nonsense() as server, pytest.raises(InputError):
        prepare_store(settings_in(tmp_path, f"tracking.uri=http://127.0.0.1:{server.getsockname()[1]}"), "e")


@pytest.mark.parametrize("uri", ["http://server:port", "http://[::1"])
def test_a_uri_that_is_none_is_bad_input(tmp_path: Path, uri: str) -> None:
    with pytest.raises(InputError):
        prepare_store(settings_in(tmp_path, f"tracking.uri={uri}"), "e")


def test_a_directory_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "run").write_bytes(b"no directory")
    with pytest.raises(StorageError):
        write_checkpoint({}, tmp_path / "run" / "checkpoints" / "last.ckpt", None)


def test_databricks_serves_many_machines() -> None:
    assert check_store_is_shared("databricks", 2) == []


def test_a_run_directory_that_was_moved_is_looked_at_where_it_is(settings: Any, tmp_path: Path) -> None:
    run = create(settings)
    moved = tmp_path / "moved" / run.path.name
    shutil.copytree(run.path, moved)
    (found,) = find_runs(settings.output.root, [str(moved)])
    assert found.path == moved


def test_a_run_whose_password_is_not_recorded_does_not_keep_the_others_from_being_sent(settings: Any, capsys: Any) -> None:
    from raytrain2p.runs import __main__ as runs

    first, second = create(settings, "launch-1"), create(settings, "launch-2")
    for run in (first, second):
        run.files.write_status("FAILED")
        note(run, 1)
    write_json(first.path / "run.json", read_json(first.path / "run.json") | {"tracking_uri": "postgresql://me:***@db/mlflow"})
    runs.main(["sync", f"output.root={settings.output.root}", first.run_id, second.run_id])
    assert mlflow_run(settings, second).info.status == "FAILED"
