"""One launch is one MLflow run and one directory, whenever it died and however often it is retried; in a real SQLite store."""

import json
import re
from pathlib import Path

import mlflow
import pytest

from raytrain2p.config import InputError, Settings, flatten, load_settings
from raytrain2p.tracking.lookup import RUN_DIRECTORY
from raytrain2p.tracking.run import (
    DIRECTORY_TAG,
    LAUNCH_TAG,
    RUN_ID_LENGTH,
    Run,
    describe_run,
    finish_run,
    get_or_create_run,
    launch_record,
    masked,
    prepare_store,
    recorded_run,
)

EXPERIMENT = "phase2_training"


def settings_in(folder: Path, *overrides: str, phase: int = 2) -> Settings:
    return load_settings(phase, None, [f"output.root={folder}/checkpoints", f"tracking.uri=sqlite:///{folder}/mlflow.db", *overrides])


def create(settings: Settings, launch_id: str = "launch-1", phase: str = "phase2") -> Run:
    return get_or_create_run(settings, phase, EXPERIMENT, launch_id)


def mlflow_runs(run: Run) -> list[mlflow.entities.Run]:
    experiment = run.client.get_experiment_by_name(run.experiment)
    return run.client.search_runs([experiment.experiment_id])


def directories(settings: Settings) -> list[Path]:
    return sorted((Path(settings.output.root) / "phase2").iterdir())


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A made SQLite store, to be copied: MLflow takes seconds to make one."""
    folder = tmp_path_factory.mktemp("store")
    prepare_store(settings_in(folder), EXPERIMENT)
    return folder / "mlflow.db"


@pytest.fixture
def settings(tmp_path: Path, store: Path) -> Settings:
    (tmp_path / "mlflow.db").write_bytes(store.read_bytes())
    return settings_in(tmp_path)


def test_the_store_and_its_experiment_are_made_where_the_settings_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    working = tmp_path / "working"
    working.mkdir()
    monkeypatch.chdir(working)
    settings = settings_in(tmp_path / "new" / "folder")
    prepare_store(settings, EXPERIMENT)
    experiment = mlflow.MlflowClient(settings.tracking.uri).get_experiment_by_name(EXPERIMENT)
    assert experiment.artifact_location == (tmp_path / "new" / "folder" / "mlruns" / EXPERIMENT).as_uri()
    assert (tmp_path / "new" / "folder" / "mlflow.db").is_file()
    assert list(working.iterdir()) == []


def test_preparing_a_store_twice_changes_nothing(settings: Settings) -> None:
    prepare_store(settings, EXPERIMENT)
    client = mlflow.MlflowClient(settings.tracking.uri)
    before = client.get_experiment_by_name(EXPERIMENT).experiment_id
    prepare_store(settings, EXPERIMENT)
    assert client.get_experiment_by_name(EXPERIMENT).experiment_id == before


def test_an_experiment_of_ones_own_takes_the_place_of_the_default(tmp_path: Path, settings: Settings) -> None:
    mine = settings_in(tmp_path, "tracking.experiment=mine")
    prepare_store(mine, EXPERIMENT)
    run = create(mine)
    assert run.experiment == "mine"
    assert [found.info.run_id for found in mlflow_runs(run)] == [run.run_id]


def test_a_store_that_cannot_be_opened_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"this is no database" * 100)
    with pytest.raises(InputError, match=r"tracking\.uri=sqlite:///.*\n    MLflow cannot use it"):
        prepare_store(settings_in(tmp_path), EXPERIMENT)


def test_a_store_of_an_unknown_driver_is_bad_input_and_its_password_is_not_shown(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        prepare_store(settings_in(tmp_path, "tracking.uri=mysql+nosuchdriver://me:hunter2@127.0.0.1:1/db"), EXPERIMENT)
    assert "mysql+nosuchdriver://me:***@127.0.0.1:1/db" in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_an_experiment_in_the_bin_is_refused_before_any_worker_starts(settings: Settings) -> None:
    client = mlflow.MlflowClient(settings.tracking.uri)
    client.delete_experiment(client.get_experiment_by_name(EXPERIMENT).experiment_id)
    with pytest.raises(InputError, match=EXPERIMENT):
        prepare_store(settings, EXPERIMENT)


def test_the_same_launch_id_gives_one_run_and_one_directory(settings: Settings) -> None:
    first, second = create(settings), create(settings)
    assert first == second
    assert [found.info.run_id for found in mlflow_runs(first)] == [first.run_id]
    assert directories(settings) == [first.path]


def test_another_launch_id_gives_another_run(settings: Settings) -> None:
    first, second = create(settings, "launch-1"), create(settings, "launch-2")
    assert first.run_id != second.run_id
    assert {found.info.run_id for found in mlflow_runs(first)} == {first.run_id, second.run_id}
    assert directories(settings) == sorted([first.path, second.path])


def test_if_the_record_on_disk_is_gone_the_tag_still_finds_the_run(settings: Settings) -> None:
    first = create(settings)
    launch_record(settings.output.root, "launch-1").unlink()
    second = create(settings)
    assert first == second
    assert len(mlflow_runs(first)) == 1
    assert directories(settings) == [first.path]
    assert recorded_run(settings.output.root, "launch-1") == first


@pytest.mark.parametrize("dies_in", ["create_run", "set_tag"])
def test_whenever_rank_0_dies_its_successor_finds_the_same_run_with_its_tag(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, dies_in: str
) -> None:
    whole = getattr(mlflow.MlflowClient, dies_in)

    def die(*arguments: object, **options: object) -> None:
        if dies_in == "create_run":
            whole(*arguments, **options)  # the store has made the run, but nobody hears of it
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(mlflow.MlflowClient, dies_in, die)
        with pytest.raises(KeyboardInterrupt):
            create(settings)
    run = create(settings)
    (found,) = mlflow_runs(run)
    assert found.info.run_id == run.run_id
    assert directories(settings) == [run.path]
    assert found.data.tags[DIRECTORY_TAG] == run.directory


@pytest.mark.parametrize("launch_id", ["trial_00003", "user@host 2026-01-01"])
def test_a_launch_id_of_the_users_own_is_taken(settings: Settings, launch_id: str) -> None:
    run = create(settings, launch_id)
    launch_record(settings.output.root, launch_id).unlink()
    assert create(settings, launch_id) == run


def test_a_launch_that_made_no_run_has_no_record(tmp_path: Path) -> None:
    assert recorded_run(str(tmp_path), "launch-1") is None


def test_the_name_of_the_directory_starts_with_the_run_id(settings: Settings) -> None:
    run = create(settings)
    assert run.path.name[:RUN_ID_LENGTH] == run.run_id
    assert RUN_DIRECTORY.fullmatch(run.path.name)
    assert re.fullmatch(r"\d{8}_\d{6}", run.timestamp)
    assert run.path.name == f"{run.run_id}_{run.timestamp}"
    assert run.path.parent == Path(settings.output.root) / "phase2"
    assert run.checkpoints.is_dir()


def test_the_mlflow_run_carries_launch_directory_and_name(settings: Settings) -> None:
    run = create(settings)
    (found,) = mlflow_runs(run)
    assert found.info.run_name == f"phase2_{run.timestamp}"
    assert found.info.status == "RUNNING"
    assert found.data.tags[LAUNCH_TAG] == "launch-1"
    assert found.data.tags[DIRECTORY_TAG] == run.directory


def test_a_finished_or_failed_run_is_running_again_when_its_launch_is_retried(settings: Settings) -> None:
    run = create(settings)
    finish_run(run, "FAILED")
    assert mlflow_runs(run)[0].info.status == "FAILED"
    create(settings)
    assert mlflow_runs(run)[0].info.status == "RUNNING"
    finish_run(run, "FINISHED")
    assert mlflow_runs(run)[0].info.status == "FINISHED"


@pytest.mark.parametrize("phase", [1, 2])
def test_parameters_and_config_json_carry_every_setting(tmp_path: Path, settings: Settings, phase: int) -> None:
    settings = settings_in(tmp_path, phase=phase)
    name = "alignment" if phase == 1 else "phase2"
    run = create(settings, phase=name)
    resolved = {"training.precision": "float32", "launch.cpus_per_worker": 3}
    describe_run(run, settings, resolved, "python -m raytrain2p.train --phase N")
    expected = flatten(settings) | resolved
    (found,) = mlflow_runs(run)
    assert found.data.params == {key: str(value) for key, value in expected.items()}
    config = json.loads((run.path / "config.json").read_text())
    assert flatten(type(settings).model_validate(config)) == expected
    assert found.data.tags["raytrain2p.command"] == "python -m raytrain2p.train --phase N"


def test_config_json_is_enough_to_load_the_same_settings_again(settings: Settings) -> None:
    run = create(settings)
    describe_run(run, settings, {}, "command")
    assert load_settings(2, run.path / "config.json") == settings  # JSON is YAML


def test_config_json_is_an_artifact_of_the_mlflow_run(settings: Settings) -> None:
    run = create(settings)
    describe_run(run, settings, {}, "command")
    assert [entry.path for entry in run.client.list_artifacts(run.run_id, "config")] == ["config/config.json"]
    sent = Path(run.client.download_artifacts(run.run_id, "config/config.json"))
    assert sent.read_bytes() == (run.path / "config.json").read_bytes()


def test_a_run_directory_says_what_it_is(settings: Settings) -> None:
    run = create(settings)
    describe_run(run, settings, {}, "python -m raytrain2p.train --phase 2 seed=3")
    lines = dict(line.split(": ", 1) for line in (run.path / "MLFLOW_RUN_ID.txt").read_text().splitlines())
    assert lines == {"run_id": run.run_id, "directory": run.directory, "experiment": run.experiment, "timestamp": run.timestamp}
    readme = (run.path / "README.md").read_text()
    assert run.run_id in readme
    assert "model.pt" in readme
    assert "    python -m raytrain2p.train --phase 2 seed=3\n" in readme


def test_describing_a_run_leaves_no_file_half_written(settings: Settings) -> None:
    run = create(settings)
    describe_run(run, settings, {}, "command")
    assert {path.name for path in run.path.iterdir()} == {"lightning_checkpoints", "config.json", "MLFLOW_RUN_ID.txt", "README.md"}


def test_a_retried_run_is_described_again_though_its_machine_has_other_threads(settings: Settings) -> None:
    run = create(settings)
    describe_run(run, settings, {"launch.cpus_per_worker": 4}, "command")
    describe_run(run, settings, {"launch.cpus_per_worker": 4}, "command")
    describe_run(create(settings), settings, {"launch.cpus_per_worker": 2}, "command")
    assert json.loads((run.path / "config.json").read_text())["launch"]["cpus_per_worker"] == 2


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("postgresql://me:secret@db:5432/mlflow", "postgresql://me:***@db:5432/mlflow"),
        ("postgresql://me:se:secret@db/mlflow", "postgresql://me:***@db/mlflow"),
        ("postgresql://me:secret@secret@db/mlflow", "postgresql://me:***@db/mlflow"),
        ("https://:secret@server/path?a=b", "https://:***@server/path?a=b"),
    ],
)
def test_masking_hides_the_whole_password_and_nothing_else(uri: str, shown: str) -> None:
    assert masked(uri) == shown


@pytest.mark.parametrize(
    "uri", ["sqlite:////data/a:b@c.db", "http://server:5000", "https://me@server/path", "file:///data/mlruns", "databricks"]
)
def test_a_uri_without_a_password_is_shown_as_it_is(uri: str) -> None:
    assert masked(uri) == uri


def test_the_password_of_the_store_is_in_no_file_or_parameter_of_the_run(settings: Settings) -> None:
    run = create(settings)
    secret = settings.model_copy(update={"tracking": settings.tracking.model_copy(update={"uri": "postgresql://me:hunter2@db/mlflow"})})
    describe_run(run, secret, {}, "command")
    files = [path for path in run.path.rglob("*") if path.is_file()]
    assert files
    assert not any(b"hunter2" in path.read_bytes() for path in files)
    (found,) = mlflow_runs(run)
    assert found.data.params["tracking.uri"] == "postgresql://me:***@db/mlflow"
