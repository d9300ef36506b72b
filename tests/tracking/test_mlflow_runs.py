"""Runs and registered versions that MLflow has, as plain data."""

from pathlib import Path

import pytest

from raytrain2p.config import Settings
from raytrain2p.storage.errors import StorageError
from raytrain2p.tracking import mlflow_runs
from raytrain2p.tracking.mlflow_runs import our_runs, registered_versions
from raytrain2p.tracking.mlflow_store import client_of
from raytrain2p.tracking.mlflow_sync import MlflowSync
from raytrain2p.tracking.run_writer import describe_run, resolved_config
from tests.tracking.stores import EXPERIMENT, NOBODY, create, note


def test_every_run_of_ours_is_found_whatever_its_lifecycle(each_store: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    uri, client = each_store.tracking.uri, client_of(each_store.tracking.uri)
    monkeypatch.setattr(mlflow_runs, "RUNS_PER_PAGE", 1)
    first, second = create(each_store, "a"), create(each_store, "b")
    describe_run(first, resolved_config(each_store, {}), "command", {})
    note(first, 1, 2)
    first.files.write_status("FINISHED")
    MlflowSync(first, uri).send()
    client.create_run(client.get_experiment_by_name(EXPERIMENT).experiment_id, run_name="somebody else's")
    client.delete_run(second.run_id)
    found = {run.run_id: run for run in our_runs(uri)}
    assert set(found) == {first.run_id, second.run_id}
    assert (found[first.run_id].status, found[first.run_id].lifecycle) == ("FINISHED", "active")
    assert found[first.run_id].metrics == {"train_loss": 1.0}
    assert found[first.run_id].params["training.max_steps"] == str(each_store.training.max_steps)
    assert found[first.run_id].tags["raytrain2p.directory"] == first.directory
    assert found[first.run_id].experiment == EXPERIMENT
    assert (found[second.run_id].lifecycle, found[second.run_id].end) == ("deleted", None)
    assert [run.run_id for run in our_runs(uri, f"attributes.run_id LIKE '{second.run_id[:6]}%'")] == [second.run_id]
    client.delete_experiment(found[first.run_id].experiment_id)
    assert len(list(our_runs(uri))) == 2


def test_registered_versions_are_those_of_their_run(settings: Settings) -> None:
    run, client = create(settings), client_of(settings.tracking.uri)
    client.create_registered_model("assistant")
    for _ in range(2):
        client.create_model_version("assistant", f"runs:/{run.run_id}/model", run.run_id)
    assert registered_versions(settings.tracking.uri) == {run.run_id: ["assistant/1", "assistant/2"]}


@pytest.mark.parametrize("uri", [NOBODY, "sqlite:///{}/nothing.db", "postgresql://me:***@127.0.0.1:1/db"])
def test_a_store_that_does_not_answer_is_one_line(tmp_path: Path, uri: str) -> None:
    for ask in (lambda uri: list(our_runs(uri)), registered_versions):
        with pytest.raises(StorageError, match=r"^tracking\.uri=[^\n]+$"):
            ask(uri.format(tmp_path))
