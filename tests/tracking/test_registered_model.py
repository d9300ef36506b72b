"""From the name of a registered model to its model.pt."""

from pathlib import Path

import pytest

from raytrain2p.config import InputError, Settings
from raytrain2p.tracking.mlflow_store import client_of
from raytrain2p.tracking.registered_model import registered_artifact
from raytrain2p.tracking.run import DIRECTORY_TAG, Run
from tests.tracking.stores import NOBODY, create


@pytest.fixture
def run(settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """A run with a model.pt, which MLflow has too, registered twice: as it is, and with the folder of a registered model."""
    monkeypatch.setenv("RAYTRAIN2P_CACHE", str(tmp_path / "cache"))
    run, client = create(settings), client_of(settings.tracking.uri)
    (run.path / "model.pt").write_bytes(b"the run's")
    client.log_artifact(run.run_id, str(run.path / "model.pt"), "model")
    (tmp_path / "model.pt").write_bytes(b"the registered one")
    client.log_artifact(run.run_id, str(tmp_path / "model.pt"), "registered/one/artifacts")
    root = client.get_run(run.run_id).info.artifact_uri
    client.create_registered_model("assistant")
    client.create_model_version("assistant", f"{root}/model", run.run_id)
    tags = {"raytrain2p.digest": "of the registered one", DIRECTORY_TAG: str(run.path)}
    client.create_model_version("assistant", f"{root}/registered/one", run.run_id, tags)
    client.set_registered_model_alias("assistant", "champion", "1")
    return run


def found(settings: Settings, reference: str) -> Path:
    name, path = registered_artifact(reference, settings.tracking.uri)
    assert name == "assistant"
    return path


def test_it_is_the_one_in_the_directory_of_its_run(settings: Settings, run: Run) -> None:
    assert found(settings, "models:/assistant@champion") == run.path / "model.pt"
    assert found(settings, "models:/assistant/1") == run.path / "model.pt"


def test_it_is_downloaded_where_the_directory_is_not(settings: Settings, run: Run) -> None:
    (run.path / "model.pt").unlink()
    path = found(settings, "models:/assistant@champion")
    assert path.read_bytes() == b"the run's"
    path.write_bytes(b"downloaded once")
    assert found(settings, "models:/assistant/1").read_bytes() == b"downloaded once"
    assert [entry.name for entry in path.parent.iterdir()] == ["model.pt"]


def test_it_is_downloaded_where_the_run_has_another_model_by_now(settings: Settings, run: Run) -> None:
    assert found(settings, "models:/assistant/2").read_bytes() == b"the registered one"


@pytest.mark.parametrize("reference", ["models:/", "models:/a", "models:/a/b", "models:/a@", "models:/../x@y"])
def test_what_is_no_reference_is_bad_input(settings: Settings, reference: str) -> None:
    with pytest.raises(InputError, match="models:/NAME@ALIAS"):
        registered_artifact(reference, settings.tracking.uri)


def test_what_is_not_there_is_one_line(settings: Settings, run: Run) -> None:
    for reference in ("models:/assistant@challenger", "models:/assistant/9", "models:/another@champion"):
        with pytest.raises(InputError, match="check the name and the alias, or give --tracking-uri"):
            registered_artifact(reference, settings.tracking.uri)
    with pytest.raises(InputError, match="Connection refused"):
        registered_artifact("models:/assistant@champion", NOBODY)
