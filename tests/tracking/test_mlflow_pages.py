"""What MLflow's pages show of a run: in a real SQLite store and in plain files, each thing once, whatever is killed."""

import json
from collections.abc import Callable
from typing import Any

import mlflow
import pytest
from mlflow.exceptions import MlflowException, RestException
from mlflow.protos import databricks_pb2

from raytrain2p.config import Settings
from raytrain2p.runs.sync import sync
from raytrain2p.storage.files import write_json
from raytrain2p.tracking.mlflow_pages import NOTE_TAG, run_description
from raytrain2p.tracking.mlflow_store import STORE_ERRORS, client_of
from raytrain2p.tracking.mlflow_sync import MODEL, MlflowSync
from raytrain2p.tracking.run import SWEEP_TAG, Run
from raytrain2p.tracking.run_writer import describe_run, resolved_config
from tests.tracking.stores import away, create, mlflow_run

TRAIN, VAL = "a" * 64, "b" * 64
FACTS: dict[str, Any] = {
    "train_records": 60,
    "train_digest": TRAIN,
    "inputs": {"data.val=/data/val.jsonl": {"records": VAL}, "data.test.hard=emoji:test": {"records": "c" * 64}, "model.x=y": {"f": "0"}},
    "split_records": {"data.train=/data/a.jsonl, /data/b.jsonl": 60, "data.val=/data/val.jsonl": 7, "data.test.hard=emoji:test": 9},
}


def described(settings: Settings, facts: dict[str, Any] = FACTS) -> Run:
    run = create(settings)
    describe_run(run, resolved_config(settings, {}), "python -m raytrain2p.train --phase 2", facts)
    return run


def finish(run: Run, steps: int = 200) -> None:
    (run.path / "model.pt").write_bytes(b"weights")
    write_json(run.files.result, {"steps": steps})
    run.files.write_status("FINISHED")


def send(settings: Settings, run: Run) -> MlflowSync:
    mlflow_sync = MlflowSync(run, settings.tracking.uri)
    mlflow_sync.send()
    return mlflow_sync


def data(settings: Settings, run: Run) -> list[tuple[str, str, str, int]]:
    """Name, digest, context and number of records of each data set of the run in MLflow."""
    inputs = mlflow_run(settings, run).inputs.dataset_inputs
    return sorted((one.dataset.name, one.dataset.digest, one.tags[0].value, json.loads(one.dataset.profile)["num_rows"]) for one in inputs)


def models(settings: Settings, run: Run) -> list[Any]:
    """The logged models of the run, each of which it has as an output exactly once."""
    found = mlflow_run(settings, run)
    logged = client_of(settings.tracking.uri).search_logged_models([found.info.experiment_id], f"source_run_id = '{run.run_id}'")
    outputs = found.outputs.model_outputs if found.outputs else []
    assert [output.model_id for output in outputs] == [model.model_id for model in logged]
    return list(logged)


def test_each_split_is_a_data_set_once_however_often_it_is_sent(each_store: Settings) -> None:
    run = described(each_store)
    send(each_store, run)
    run.add_tags({"again": "1"})
    send(each_store, run)
    assert data(each_store, run) == [
        ("hard: emoji:test", "c" * 16, "test", 9),
        ("train: a.jsonl, b.jsonl", "a" * 16, "train", 60),
        ("val: val.jsonl", "b" * 16, "val", 7),
    ]


def test_data_whose_content_changed_is_a_data_set_more(settings: Settings) -> None:
    run = described(settings)
    send(settings, run)
    describe_run(run, resolved_config(settings, {}), "again", FACTS | {"train_digest": "d" * 64}, launched=2e9)
    send(settings, run)
    assert [digest for name, digest, *_ in data(settings, run) if name.startswith("train: ")] == ["a" * 16, "d" * 16]


def test_of_two_runs_that_send_the_same_data_at_once_both_have_it(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """A database refuses one of them: sent again, it finds the data set of the other."""
    whole = mlflow.MlflowClient.log_inputs
    refusals = [MlflowException("(sqlite3.IntegrityError) UNIQUE constraint failed: datasets.name", databricks_pb2.BAD_REQUEST)]

    def log_inputs(client: mlflow.MlflowClient, *arguments: Any) -> None:
        if refusals:
            raise refusals.pop()
        whole(client, *arguments)

    monkeypatch.setattr(mlflow.MlflowClient, "log_inputs", log_inputs)
    run = described(settings)
    assert send(settings, run).refusals() == {}
    assert len(data(settings, run)) == 3


def test_a_description_says_what_the_run_is_and_cannot_become_other_markdown(settings: Settings) -> None:
    run = create(settings)
    describe_run(run, resolved_config(settings, {}), "python -m raytrain2p.train 'x=\n# a `heading`'", {})
    text = run_description(run, run.files.tags() | {SWEEP_TAG: "0123456789abcdef"})
    assert text.startswith(f"Phase 2: instruction-tunes a language model, a trial of sweep `01234567`, in `{run.directory}`\n")
    assert "\n    python -m raytrain2p.train 'x=\n    # a `heading`'\n" in text
    assert f"    python -m raytrain2p.predict --run {run.run_id[:8]}" in text


def test_a_description_that_a_user_wrote_in_the_ui_stays(each_store: Settings) -> None:
    run = described(each_store)
    send(each_store, run)
    assert mlflow_run(each_store, run).data.tags[NOTE_TAG] == run_description(run, run.files.tags())
    run.add_tags({"raytrain2p.directory": "/moved"})
    send(each_store, run)
    assert "`/moved`" in mlflow_run(each_store, run).data.tags[NOTE_TAG]
    client_of(each_store.tracking.uri).set_tag(run.run_id, NOTE_TAG, "my best run")
    run.add_tags({"raytrain2p.directory": "/moved/again"})
    send(each_store, run)
    assert mlflow_run(each_store, run).data.tags[NOTE_TAG] == "my best run"


def test_a_finished_run_has_its_artifact_as_one_logged_model(each_store: Settings) -> None:
    run = described(each_store)
    send(each_store, run)
    assert models(each_store, run) == [], "it is still running"
    finish(run)
    send(each_store, run)
    assert send(each_store, run).complete()
    (model,) = models(each_store, run)
    assert (model.name, model.status, model.model_type) == (f"phase2_{run.timestamp}", "READY", "model")
    assert model.tags["raytrain2p.artifact"] == f"runs:/{run.run_id}/model/model.pt"
    assert model.tags["raytrain2p.steps"] == "200"
    finish(run, steps=300)
    send(each_store, run)
    (model,) = models(each_store, run)
    assert model.tags["raytrain2p.steps"] == "300", "it was trained for longer"


@pytest.mark.parametrize("status", ["FAILED", "KILLED"])
def test_a_run_that_did_not_finish_has_no_logged_model(settings: Settings, status: str) -> None:
    run = described(settings)
    (run.path / "model.pt").write_bytes(b"of an earlier end")
    run.files.write_status(status)
    assert send(settings, run).complete()
    assert models(settings, run) == []


@pytest.mark.parametrize("request_name", ["create_logged_model", "log_outputs", "finalize_logged_model", "set_terminated"])
@pytest.mark.parametrize("arrived", [True, False])
def test_a_kill_at_any_request_leaves_one_logged_model(
    each_store: Settings, monkeypatch: pytest.MonkeyPatch, request_name: str, arrived: bool
) -> None:
    whole: Callable[..., Any] = getattr(mlflow.MlflowClient, request_name)

    def die(*arguments: Any, **options: Any) -> None:
        if arrived:
            whole(*arguments, **options)
        raise KeyboardInterrupt

    run = described(each_store)
    finish(run)
    with monkeypatch.context() as patch:
        patch.setattr(mlflow.MlflowClient, request_name, die)
        with pytest.raises(KeyboardInterrupt):
            send(each_store, run)
    assert send(each_store, run).complete()
    assert [model.status for model in models(each_store, run)] == ["READY"]


def test_what_an_outage_kept_back_is_sent_by_sync(settings: Settings) -> None:
    run = described(settings)
    finish(run)
    with away(settings), pytest.raises(STORE_ERRORS):
        send(settings, run)
    lines: list[str] = []
    assert sync(run, settings.output.root, None, lines.append), lines
    assert len(data(settings, run)) == 3
    assert len(models(settings, run)) == 1
    assert NOTE_TAG in mlflow_run(settings, run).data.tags


def test_a_model_that_is_not_taken_now_is_sent_later_and_the_status_at_once(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise OSError("no answer")

    run = described(settings)
    finish(run)
    with monkeypatch.context() as patch:
        patch.setattr(mlflow.MlflowClient, "create_logged_model", fail)
        with pytest.raises(OSError, match="no answer"):
            send(settings, run)
    assert mlflow_run(settings, run).info.status == "FINISHED"
    assert not MlflowSync(run, settings.tracking.uri).complete()
    assert send(settings, run).complete()
    assert len(models(settings, run)) == 1


def test_a_server_that_has_no_logged_models_gets_everything_else(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*arguments: Any, **options: Any) -> None:
        raise RestException({"error_code": "ENDPOINT_NOT_FOUND", "message": "No API found for 'POST /mlflow/logged-models/search'"})

    run = described(settings)
    finish(run)
    monkeypatch.setattr(mlflow.MlflowClient, "search_logged_models", unknown)
    mlflow_sync = send(settings, run)
    assert mlflow_sync.complete()
    assert set(mlflow_sync.refusals()) == {MODEL}
    assert mlflow_run(settings, run).info.status == "FINISHED"


def test_a_finished_run_of_an_earlier_version_is_complete(settings: Settings) -> None:
    run = described(settings, {"train_records": 60})
    finish(run)
    mlflow_sync = send(settings, run)
    write_json(mlflow_sync.state_path, {key: value for key, value in mlflow_sync.state.items() if key not in ("model", "note")})
    assert MlflowSync(run, settings.tracking.uri).complete()
    assert data(settings, run) == [], "its record has no splits"
