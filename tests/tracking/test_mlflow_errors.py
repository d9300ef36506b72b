"""Errors of real stores, and of servers that answer as MLflow, its login page or a load balancer do, are reported as what they are."""

import http.server
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric, Param

from raytrain2p.config import Settings
from raytrain2p.tracking.mlflow_errors import Kind, StoreProblem, store_problem
from raytrain2p.tracking.mlflow_store import client_of
from tests.tracking.stores import NOBODY, create

FULL_DATABASE = b'{"error_code": "TEMPORARILY_UNAVAILABLE", "message": "(sqlite3.OperationalError) database or disk is full\\n[SQL: x]"}'


class Answering:
    """A server that answers every request alike."""

    status, body = 200, b""

    def __init__(self) -> None:
        answering = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def answer(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                self.send_response(answering.status)
                self.send_header("Content-Length", str(len(answering.body)))
                self.end_headers()
                self.wfile.write(answering.body)

            do_GET = do_POST = do_PUT = answer

            def log_message(self, *_: object) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.uri = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()


@pytest.fixture(scope="module")
def answering() -> Iterator[Answering]:
    answering = Answering()
    yield answering
    answering.http.shutdown()
    answering.http.server_close()


def problem_of(client: MlflowClient, run_id: str, name: str = "train_loss") -> StoreProblem:
    with pytest.raises(Exception) as caught:  # noqa: PT011 (any that MLflow raises)
        client.log_batch(run_id, metrics=[Metric(name, 1.0, 1, 1)])
    return store_problem(caught.value)


@pytest.mark.parametrize(
    ("status", "body", "kind", "words"),
    [
        (401, b"You are not authenticated.", Kind.NO_LOGIN, "MLFLOW_TRACKING_USERNAME"),
        (403, b"Permission denied", Kind.FORBIDDEN, "(Permission denied); ask its administrator"),
        (403, b'{"error_code": "PERMISSION_DENIED", "message": "no"}', Kind.FORBIDDEN, "ask its administrator"),
        (404, b'{"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no such run"}', Kind.GONE, "no such run"),
        (404, b"<html>nothing here</html>", Kind.FAILED, "check tracking.uri"),
        (400, b'{"error_code": "INVALID_PARAMETER_VALUE", "message": "what a name"}', Kind.REFUSED, "what a name"),
        (400, b"<html>400 Bad Request</html>", Kind.FAILED, "400 Bad Request"),
        (413, b"<html>too large</html>", Kind.FULL, "too large"),
        (429, b'{"error_code": "REQUEST_LIMIT_EXCEEDED", "message": "slow down"}', Kind.AWAY, "its server answers 429"),
        (429, b'{"error_code": "RESOURCE_EXHAUSTED", "message": "quota of runs"}', Kind.FULL, "quota of runs"),
        (500, b"Internal Server Error", Kind.AWAY, "its server answers 500"),
        (502, b"<html>bad gateway</html>", Kind.AWAY, "its server answers 502"),
        (503, b"", Kind.AWAY, "its server answers 503"),
        (503, FULL_DATABASE, Kind.FULL, "database or disk is full); free space there"),
        (504, b"", Kind.AWAY, "its server answers 504"),
        (507, b"Insufficient Storage", Kind.FULL, "free space there"),
        (200, b"<html>Log in</html>", Kind.FAILED, "check tracking.uri"),
    ],
)
def test_an_answer_is_reported_as_what_it_is(status: int, body: bytes, kind: Kind, words: str, answering: Answering) -> None:
    answering.status, answering.body = status, body
    problem = problem_of(client_of(answering.uri), "0" * 32)
    assert problem.kind is kind
    assert words in str(problem)
    assert ("away" in str(problem)) == (kind is Kind.AWAY)


@pytest.mark.parametrize(("status", "kind"), [(401, Kind.NO_LOGIN), (403, Kind.FORBIDDEN), (413, Kind.FULL), (500, Kind.AWAY)])
def test_an_answer_to_an_artifact_is_reported_as_what_it_is(status: int, kind: Kind, answering: Answering, tmp_path: Path) -> None:
    from mlflow.store.artifact.http_artifact_repo import HttpArtifactRepository

    answering.status, answering.body = status, b"words"
    (tmp_path / "model.pt").write_bytes(b"weights")
    with pytest.raises(Exception) as caught:  # noqa: PT011
        HttpArtifactRepository(f"{answering.uri}/api/2.0/mlflow-artifacts/artifacts/1").log_artifact(str(tmp_path / "model.pt"))
    assert store_problem(caught.value).kind is kind


def test_a_server_that_is_not_there_is_away_and_its_password_is_not_shown() -> None:
    for uri in (NOBODY, "http://no-such-host.invalid:5000"):
        problem = problem_of(client_of(uri.replace("//", "//me:hunter2@")), "0" * 32)
        assert problem.kind is Kind.AWAY
        assert "hunter2" not in str(problem)


def test_a_uri_that_is_not_valid_is_not_an_outage() -> None:
    assert problem_of(client_of("http://server:port"), "0" * 32).kind is Kind.FAILED


def test_a_deleted_run_and_one_of_a_deleted_experiment_are_reported_as_that(each_store: Settings) -> None:
    run, client = create(each_store), client_of(each_store.tracking.uri)
    experiment = client.get_run(run.run_id).info.experiment_id
    client.delete_run(run.run_id)
    assert problem_of(client, run.run_id).kind is Kind.DELETED
    client.restore_run(run.run_id)
    client.delete_experiment(experiment)
    problem = problem_of(client, run.run_id)
    assert problem.kind is Kind.DELETED
    assert "restore it" in problem.fix


def test_a_run_that_a_store_does_not_have_is_reported_as_that(each_store: Settings) -> None:
    assert problem_of(client_of(each_store.tracking.uri), "0" * 32).kind is Kind.GONE


def test_what_a_store_never_takes_is_refused(each_store: Settings) -> None:
    run, client = create(each_store), client_of(each_store.tracking.uri)
    assert problem_of(client, run.run_id, "what colour?").kind is Kind.REFUSED
    assert problem_of(client, run.run_id, "x" * 300).kind is Kind.REFUSED
    client.log_batch(run.run_id, params=[Param("a", "1")])
    with pytest.raises(Exception) as caught:  # noqa: PT011
        client.log_batch(run.run_id, params=[Param("a", "2")])
    assert store_problem(caught.value).kind is Kind.REFUSED


@pytest.mark.parametrize(
    ("text", "kind"),
    [("database or disk is full", Kind.FULL), ("database is locked", Kind.AWAY), ("attempt to write a readonly database", Kind.FAILED)],
)
def test_an_error_of_an_sqlite_database_is_reported_without_its_sql(
    text: str, kind: Kind, settings: Settings, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run, client = create(settings), client_of(settings.tracking.uri)

    def fail(*_: object) -> None:
        raise sqlite3.OperationalError(text)

    from sqlalchemy.engine.default import DefaultDialect

    with monkeypatch.context() as patch:
        patch.setattr(DefaultDialect, "do_execute", fail)
        patch.setattr(DefaultDialect, "do_executemany", fail)
        problem = problem_of(client, run.run_id)
    assert problem.kind is kind
    assert problem.reason == text
    assert "Traceback" not in capfd.readouterr().err
