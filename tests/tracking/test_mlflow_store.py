"""The MLflow store is created, or refused within seconds, before anything starts."""

import http.server
import multiprocessing
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from sqlalchemy import event
from sqlalchemy.engine import Engine

from raytrain2p.config import InputError, Settings
from raytrain2p.tracking import mlflow_repair
from raytrain2p.tracking import mlflow_store as store_module
from raytrain2p.tracking.mlflow_repair import make_tables, migrate
from raytrain2p.tracking.mlflow_store import UnusableStoreError, check_server, check_store_is_shared, client_of, prepare_store, store_path
from tests.tracking.stores import EXPERIMENT, NOBODY, create, mlflow_runs, settings_in


def refused(settings: Settings) -> str:
    with pytest.raises(InputError) as caught:
        prepare_store(settings, EXPERIMENT)
    (problem,) = caught.value.problems
    return f"{problem.where}\n{problem.what}\n{problem.fix}"


def test_the_store_and_its_experiment_are_made_where_the_settings_say(made_store: Path) -> None:
    settings = settings_in(made_store)
    experiment = client_of(settings.tracking.uri).get_experiment_by_name(EXPERIMENT)
    assert experiment.artifact_location == (made_store / "mlruns" / EXPERIMENT).as_uri()
    assert (made_store / "mlflow.db").is_file()
    working = made_store.parents[1] / "working"
    assert list(working.iterdir()) == []


def test_a_plain_file_store_is_made_where_the_settings_say(tmp_path: Path) -> None:
    settings = settings_in(tmp_path / "new", store="file")
    prepare_store(settings, EXPERIMENT)
    experiment = client_of(settings.tracking.uri).get_experiment_by_name(EXPERIMENT)
    assert str(tmp_path / "new" / "mlruns" / experiment.experiment_id) in experiment.artifact_location


def test_preparing_a_store_twice_changes_nothing(each_store: Settings) -> None:
    client = client_of(each_store.tracking.uri)
    before = client.get_experiment_by_name(EXPERIMENT).experiment_id
    prepare_store(each_store, EXPERIMENT)
    assert client.get_experiment_by_name(EXPERIMENT).experiment_id == before
    assert len(client.search_experiments(filter_string=f"name = '{EXPERIMENT}'")) == 1


def test_the_experiment_is_one_of_model_training_unless_somebody_chose_another_kind(each_store: Settings) -> None:
    client = client_of(each_store.tracking.uri)
    number = client.get_experiment_by_name(EXPERIMENT).experiment_id

    def prepared() -> str:
        prepare_store(each_store, EXPERIMENT)
        return str(client.get_experiment(number).tags["mlflow.experimentKind"])

    assert prepared() == "custom_model_development"
    client.set_experiment_tag(number, "mlflow.experimentKind", "genai_development_inferred")
    assert prepared() == "custom_model_development", "nobody chose it: the UI guessed"
    client.set_experiment_tag(number, "mlflow.experimentKind", "genai_development")
    assert prepared() == "genai_development"
    client.create_experiment("made before")
    prepare_store(each_store, "made before")
    assert client.get_experiment_by_name("made before").tags["mlflow.experimentKind"] == "custom_model_development"


def test_a_store_that_cannot_be_opened_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"this is no database" * 100)
    refusal = refused(settings_in(tmp_path))
    assert refusal.startswith(f"tracking.uri=sqlite:///{tmp_path}/mlflow.db\nMLflow cannot use it: ")
    assert "not a database" in refusal


def test_a_store_of_an_unknown_driver_is_bad_input_and_its_password_is_not_shown(tmp_path: Path) -> None:
    refusal = refused(settings_in(tmp_path, "tracking.uri=mysql+nosuchdriver://me:hunter2@127.0.0.1:1/db"))
    assert "mysql+nosuchdriver://me:***@127.0.0.1:1/db" in refusal
    assert "hunter2" not in refusal


def test_a_deleted_experiment_is_refused_before_any_worker_starts(settings: Settings) -> None:
    client = client_of(settings.tracking.uri)
    number = client.get_experiment_by_name(EXPERIMENT).experiment_id
    client.delete_experiment(number)
    refusal = refused(settings)
    assert refusal.startswith(f"tracking.experiment={EXPERIMENT}\n")
    assert f"mlflow experiments restore -x {number}" in refusal
    client.restore_experiment(number)
    prepare_store(settings, EXPERIMENT)


# several launches at once, and kills

PROCESSES = multiprocessing.get_context("fork")
RUN_ID = "a1" * 16


def exit_codes(count: int, work: Callable[[int], object]) -> list[int | None]:
    """Run a function in so many processes at once."""
    started = [PROCESSES.Process(target=work, args=(number,)) for number in range(count)]
    for process in started:
        process.start()
    for process in started:
        process.join()
    return [process.exitcode for process in started]


def first_launch(settings: Settings, number: int) -> None:
    """What a driver and its rank 0 do with the store."""
    prepare_store(settings, EXPERIMENT)
    create(settings, f"launch-{number}")


@pytest.mark.parametrize("store", ["sqlite", "file"])
def test_any_number_of_first_launches_at_once_have_a_run(tmp_path: Path, store: str) -> None:
    settings = settings_in(tmp_path / "fresh", store=store)
    assert exit_codes(4, partial(first_launch, settings)) == [0] * 4
    assert len(mlflow_runs(settings)) == 4
    new = settings_in(tmp_path / "fresh", "tracking.experiment=new", store=store)  # a new experiment of an existing store
    assert exit_codes(4, partial(first_launch, new)) == [0] * 4
    assert len(client_of(settings.tracking.uri).search_experiments(filter_string="name = 'new'")) == 1


def test_a_kill_while_the_database_is_made_leaves_none(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    process = PROCESSES.Process(target=prepare_store, args=(settings, EXPERIMENT))
    process.start()
    while not any(path.stat().st_size for path in tmp_path.glob(".mlflow.db.aside-*")):
        time.sleep(0.01)
    process.kill()
    process.join()
    assert not (tmp_path / "mlflow.db").exists()
    prepare_store(settings, EXPERIMENT)
    assert not list(tmp_path.glob(".mlflow.db.aside-*"))


def killed_migration(path: Path, statement: str) -> None:
    """Migrate a database, and die before the first statement that begins like this."""

    def strike(connection: object, cursor: object, text: str, *_: object) -> None:
        if text.strip().startswith(statement):
            os.kill(os.getpid(), signal.SIGKILL)

    event.listen(Engine, "before_cursor_execute", strike)
    migrate(path, "heads")


def test_a_database_that_an_interrupted_migration_broke_is_repaired_by_the_command_that_is_printed(tmp_path: Path) -> None:
    settings, path = settings_in(tmp_path), tmp_path / "mlflow.db"
    make_tables(path, "181f10493468")
    with sqlite3.connect(path) as database:
        database.execute("INSERT INTO experiments VALUES (7, 'mine', 'file:///x', 'active')")
        database.execute(
            "INSERT INTO runs (run_uuid, experiment_id, status, lifecycle_stage, artifact_uri, start_time, source_type) "
            f"VALUES ('{RUN_ID}', 7, 'FINISHED', 'active', 'file:///x', 1, 'LOCAL')"
        )
        database.execute(f"INSERT INTO metrics VALUES ('train_loss', 1.5, 1, '{RUN_ID}', 3, 0)")
    database.close()
    assert exit_codes(1, lambda _: killed_migration(path, "ALTER TABLE _alembic_tmp_runs")) == [-signal.SIGKILL]  # `runs` was just dropped
    refusal = refused(settings)
    assert "a migration of its tables was interrupted" in refusal
    with pytest.raises(UnusableStoreError, match="was interrupted"):
        client_of(settings.tracking.uri)
    command = re.search(r"`python (.*)`", refusal)
    assert command is not None
    assert subprocess.run([sys.executable, *command[1].split()], check=False).returncode == 0
    repaired = shutil.copy(path, tmp_path / "copy.db")  # MLflow keeps the file of before open in this process
    (point,) = client_of(f"sqlite:///{repaired}").get_metric_history(RUN_ID, "train_loss")
    assert (point.step, point.value) == (3, 1.5)
    assert (tmp_path / "mlflow.db.broken").is_file()


def test_a_client_makes_no_store_where_there_is_none(tmp_path: Path) -> None:
    for uri in (f"sqlite:///{tmp_path}/old/mlflow.db", f"file:{tmp_path}/old/mlruns"):
        with pytest.raises(UnusableStoreError, match=r"if it was moved, set tracking\.uri"):
            client_of(uri)
    assert list(tmp_path.iterdir()) == []


# servers


@contextmanager
def listening() -> Iterator[str]:
    """A server that takes a connection and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@contextmanager
def answering(status: int, asked: list[str]) -> Iterator[str]:
    """A server that answers every request with this status, and notes what was asked."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_a_server_that_is_not_running_is_an_error() -> None:
    with pytest.raises(OSError, match="refused"):
        check_server(NOBODY)


@pytest.mark.timeout(60)
def test_a_server_that_takes_the_connection_and_never_answers_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "SECONDS_TO_ANSWER", 0.3)
    with listening() as uri, pytest.raises(OSError, match="timed out"):
        check_server(uri)


@pytest.mark.timeout(60)
def test_a_server_that_does_not_answer_is_bad_input_and_its_password_is_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "SECONDS_TO_ANSWER", 0.3)
    with listening() as uri:
        for away in (uri, NOBODY):
            refusal = refused(settings_in(tmp_path, f"tracking.uri={away.replace('//', '//me:hunter2@')}"))
            assert "me:***@127.0.0.1" in refusal
            assert "MLflow cannot use it" in refusal
            assert "hunter2" not in refusal


@pytest.mark.parametrize("status", [200, 404, 401])
def test_a_server_that_gives_any_answer_passes(status: int) -> None:
    asked: list[str] = []
    with answering(status, asked) as uri:
        check_server(uri)
        check_server(f"{uri}/mlflow/")
        check_server(uri.replace("//", "//me:hunter2@"))
    assert asked == ["/health", "/mlflow/health", "/health"]


@pytest.mark.parametrize("uri", ["sqlite:////nowhere/mlflow.db", "file:///nowhere", "databricks"])
def test_a_store_that_is_not_a_server_is_not_checked_as_one(uri: str) -> None:
    check_server(uri)


# on whose disk


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        ("sqlite:////data/runs/mlflow.db", "/data/runs/mlflow.db"),
        ("sqlite:///mlflow.db", "mlflow.db"),
        ("sqlite:///here/mlflow.db", "here/mlflow.db"),
        ("file:///data/mlruns", "/data/mlruns"),
        ("file:/data/mlruns", "/data/mlruns"),
        ("file:///data/my%20runs", "/data/my runs"),
        ("/data/mlruns", "/data/mlruns"),
        ("./mlruns", "mlruns"),
    ],
)
def test_a_store_in_files_has_a_path(uri: str, path: str) -> None:
    assert store_path(uri) == Path(path)


@pytest.mark.parametrize(
    "uri", ["http://server:5000", "https://server/mlflow", "postgresql://me:secret@db:5432/mlflow", "mysql://db/mlflow"]
)
def test_a_server_has_no_path_and_serves_many_machines(uri: str) -> None:
    assert store_path(uri) is None
    assert check_store_is_shared(uri, 2) == []


@pytest.mark.parametrize("uri", ["sqlite:////data/mlflow.db", "file:///data/mlruns", "./mlruns"])
def test_a_store_in_files_serves_one_machine_alone(uri: str) -> None:
    assert check_store_is_shared(uri, 1) == []
    (problem,) = check_store_is_shared(uri, 2)
    assert problem.where == f"tracking.uri={uri}"
    assert "2 machines" in problem.what
    assert "mlflow server" in problem.fix


def test_a_slash_at_the_end_of_a_servers_uri_does_not_double_in_requests() -> None:
    asked: list[str] = []
    with answering(404, asked) as uri, pytest.raises(store_module.STORE_ERRORS):
        client_of(f"{uri}/").get_experiment_by_name(EXPERIMENT)
    assert len(asked) == 1
    assert asked[0].startswith("/api/")


def test_a_database_that_is_not_running_is_an_error_at_once() -> None:
    with pytest.raises(OSError, match="refused"):
        check_server("postgresql+psycopg2://me:hunter2@127.0.0.1:1/mlflow")


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
def test_an_invalid_uri_is_bad_input(tmp_path: Path, uri: str) -> None:
    with pytest.raises(InputError):
        prepare_store(settings_in(tmp_path, f"tracking.uri={uri}"), "e")


def test_databricks_serves_many_machines() -> None:
    assert check_store_is_shared("databricks", 2) == []


@pytest.mark.parametrize("module", ["run", "mlflow_sync"])
def test_telemetry_of_mlflow_is_off_whichever_module_is_imported_first(module: str) -> None:
    code = f"import raytrain2p.tracking.{module}; from mlflow.telemetry import get_telemetry_client; print(get_telemetry_client())"
    environment = {name: value for name, value in os.environ.items() if name not in ("CI", "DO_NOT_TRACK") and "MLFLOW" not in name}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "None\n"


@pytest.mark.parametrize("content", [None, b"not a database"])
def test_only_a_database_can_be_repaired(tmp_path: Path, content: bytes | None, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mlflow.db"
    if content is None:
        with pytest.raises(SystemExit, match="2"):
            mlflow_repair.main([str(path)])
    else:
        path.write_bytes(content)
        assert mlflow_repair.main([str(path)]) == 1
        assert "is unchanged: file is not a database" in capsys.readouterr().err
        assert path.read_bytes() == content
    assert [one.name for one in tmp_path.iterdir() if one != path and one.suffix != ".lock"] == []


def test_a_driver_that_is_not_installed_is_said_without_the_password() -> None:
    with pytest.raises(UnusableStoreError, match=r"mssql\+pymssql://me:\*\*\*@db/x: needs pymssql, which is not installed"):
        client_of("mssql+pymssql://me:hunter2@db/x")
