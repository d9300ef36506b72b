"""One launch is one MLflow run and one directory, whenever it died and however often it is retried; in real stores."""

import json
import re
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

import mlflow
import pytest

from raytrain2p.config import Settings, flatten, load_settings
from raytrain2p.storage.errors import StorageError
from raytrain2p.storage.files import read_json, write_json
from raytrain2p.storage.locks import Lock
from raytrain2p.tracking import run as run_module
from raytrain2p.tracking.find import RUN_DIRECTORY
from raytrain2p.tracking.mlflow_store import STORE_ERRORS, client_of, prepare_store
from raytrain2p.tracking.mlflow_sync import MlflowSync
from raytrain2p.tracking.run import (
    DIRECTORY_TAG,
    LAUNCH_TAG,
    ROOT_TAG,
    RUN_ID_LENGTH,
    SWEEP_TAG,
    TIMESTAMP_TAG,
    Run,
    describe_run,
    get_or_create_run,
    launch_lock,
    launch_record,
    read_status,
    recorded_run,
    resolved_config,
    run_lock,
    run_of,
    run_tags,
    setting_changes,
    sole_writer,
    write_status,
)
from tests.tracking.stores import EXPERIMENT, NOBODY, away, create, lock_holder, mlflow_run, mlflow_runs, settings_in


def elsewhere(settings: Settings, uri: str) -> Settings:
    """The same settings with another store."""
    return settings.model_copy(update={"tracking": settings.tracking.model_copy(update={"uri": uri})})


def directories(settings: Settings) -> list[Path]:
    return sorted((Path(settings.output.root) / "phase2").iterdir())


def is_the_only_one(settings: Settings, run: Run) -> None:
    """The store and the disk have this run, whole, and no other."""
    (found,) = mlflow_runs(settings)
    assert found.info.run_id == run.run_id
    assert found.data.tags[LAUNCH_TAG] == run.launch_id
    assert found.data.tags[DIRECTORY_TAG] == run.directory
    assert found.data.tags[ROOT_TAG] == settings.output.root
    assert found.data.tags[TIMESTAMP_TAG] == run.timestamp
    assert directories(settings) == [run.path]
    assert run.checkpoints.is_dir()
    assert run_of(read_json(run.path / "run.json")) == run
    assert recorded_run(settings.output.root, run.launch_id) == run


# its identity


def test_the_same_launch_id_gives_one_run_and_one_directory(each_store: Settings) -> None:
    first, second = create(each_store), create(each_store)
    assert first == second
    is_the_only_one(each_store, first)


def test_a_run_is_not_begun_anew_where_the_disk_of_its_launch_is_gone(settings: Settings) -> None:
    run = create(settings)
    shutil.rmtree(settings.output.root)
    with pytest.raises(StorageError, match="is gone"):
        get_or_create_run(settings, run.phase, EXPERIMENT, run.launch_id)
    assert not Path(settings.output.root).exists()


def test_a_run_whose_directory_is_gone_is_not_begun_anew(settings: Settings) -> None:
    run = create(settings)
    shutil.rmtree(run.path)
    with pytest.raises(StorageError, match=f"{run.directory} is gone, where launch launch-1 has its run {run.run_id[:8]}: mount its disk"):
        create(settings)
    assert not run.path.exists()


def test_a_launch_that_is_repeated_before_its_disk_is_back_does_not_begin_its_run_anew(settings: Settings) -> None:
    run = create(settings)
    describe_run(run, resolved_config(settings, {}), "command", {})
    MlflowSync(run, settings.tracking.uri).send()
    shutil.rmtree(settings.output.root)  # what a driver finds, and makes its lock in the place of
    with pytest.raises(StorageError, match="is gone"):
        create(settings)
    assert not run.path.exists()


def test_another_launch_id_gives_another_run(each_store: Settings) -> None:
    first, second = create(each_store, "launch-1"), create(each_store, "launch-2")
    assert first.run_id != second.run_id
    assert {found.info.run_id for found in mlflow_runs(each_store)} == {first.run_id, second.run_id}
    assert directories(each_store) == sorted([first.path, second.path])


class OneSecond(datetime):
    """The clock stands still."""

    @classmethod
    def now(cls, tz: Any = None) -> "OneSecond":
        return cls(2026, 1, 1, 12, 0, 0)


def test_two_launches_of_one_second_are_two_runs(each_store: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "datetime", OneSecond)
    first, second = create(each_store, "launch-1"), create(each_store, "launch-2")
    assert first.timestamp == second.timestamp == "20260101_120000"
    assert first.run_id != second.run_id
    assert len(mlflow_runs(each_store)) == 2
    assert directories(each_store) == sorted([first.path, second.path])
    assert (create(each_store, "launch-1"), create(each_store, "launch-2")) == (first, second)


def test_an_experiment_of_ones_own_takes_the_place_of_the_default(tmp_path: Path, settings: Settings) -> None:
    mine = settings_in(tmp_path, "tracking.experiment=mine")
    prepare_store(mine, EXPERIMENT)
    run = create(mine)
    assert run.experiment == "mine"
    assert [found.info.run_id for found in mlflow_runs(mine, "mine")] == [run.run_id]
    assert mlflow_runs(mine) == []


@pytest.mark.parametrize("launch_id", ["trial_00003", "user@host 2026-01-01"])
def test_a_launch_id_of_the_users_own_is_taken(settings: Settings, launch_id: str) -> None:
    run = create(settings, launch_id)
    assert create(settings, launch_id) == run
    launch_record(settings.output.root, launch_id).unlink()
    assert create(settings, launch_id).run_id == run.run_id


def test_the_name_of_the_directory_starts_with_the_run_id(settings: Settings) -> None:
    run = create(settings)
    assert run.path.name[:RUN_ID_LENGTH] == run.run_id
    assert RUN_DIRECTORY.fullmatch(run.path.name)
    assert re.fullmatch(r"\d{8}_\d{6}", run.timestamp)
    assert run.path.name == f"{run.run_id}_{run.timestamp}"
    assert run.path.parent == Path(settings.output.root) / "phase2"


def test_the_mlflow_run_is_named_after_phase_and_time_and_runs(each_store: Settings) -> None:
    run = create(each_store)
    found = mlflow_run(each_store, run)
    assert found.info.run_name == f"phase2_{run.timestamp}"
    assert found.info.status == "RUNNING"


def test_a_run_keeps_no_password(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "client_of", lambda uri: client_of(settings.tracking.uri))  # no such database is here
    run = create(elsewhere(settings, "postgresql://me:hunter2@db/mlflow"))
    assert run.tracking_uri == "postgresql://me:***@db/mlflow"
    files = [path for path in Path(settings.output.root).rglob("*") if path.is_file()]
    assert {"run.json", "launch-1.json"} <= {path.name for path in files}
    assert not any(b"hunter2" in path.read_bytes() for path in files)


# whenever it died


def test_a_launch_that_made_no_run_has_no_record(tmp_path: Path) -> None:
    assert recorded_run(str(tmp_path), "launch-1") is None


def test_dead_before_the_run_was_asked_for_there_is_one_in_the_end(each_store: Settings) -> None:
    root = each_store.output.root
    intent = {"launch_id": "launch-1", "timestamp": "20260101_120000", "since": time.time()}
    write_json(launch_record(root, "launch-1"), intent)
    assert recorded_run(root, "launch-1") is None
    run = create(each_store)
    assert run.timestamp == "20260101_120000"
    is_the_only_one(each_store, run)


@pytest.mark.parametrize("dies_in", ["search_runs", "create_run", "set_tag"])
def test_whenever_rank_0_dies_at_the_store_its_successor_finds_the_same_run(
    each_store: Settings, monkeypatch: pytest.MonkeyPatch, dies_in: str
) -> None:
    whole, made = getattr(mlflow.MlflowClient, dies_in), []

    def die(*arguments: object, **options: object) -> None:
        made.append(whole(*arguments, **options))  # the store has done it, but nobody hears of it
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(mlflow.MlflowClient, dies_in, die)
        with pytest.raises(KeyboardInterrupt):
            create(each_store)
    run = create(each_store)
    if dies_in == "create_run":
        assert run.run_id == made[0].info.run_id
    is_the_only_one(each_store, run)


@pytest.mark.parametrize("dies_before", ["run.json", "launch-1.json"])
def test_dead_before_it_was_noted_the_same_run_is_noted(each_store: Settings, monkeypatch: pytest.MonkeyPatch, dies_before: str) -> None:
    def die(path: Path, value: Any) -> None:
        if path.name == dies_before and "run_id" in value:
            raise KeyboardInterrupt
        write_json(path, value)

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "write_json", die)
        with pytest.raises(KeyboardInterrupt):
            create(each_store)
    (found,) = mlflow_runs(each_store)
    run = create(each_store)
    assert run.run_id == found.info.run_id
    is_the_only_one(each_store, run)


def test_two_rank_0s_of_one_launch_that_ask_at_once_have_one_run(each_store: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = mlflow.MlflowClient.create_run

    def slowly(*arguments: object, **options: object) -> Any:
        time.sleep(0.5)  # the other one has long asked by now
        return whole(*arguments, **options)

    monkeypatch.setattr(mlflow.MlflowClient, "create_run", slowly)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(create, [each_store] * 2)
    assert first == second
    is_the_only_one(each_store, first)


def test_if_the_record_on_disk_is_gone_the_tag_still_finds_the_run(each_store: Settings) -> None:
    first = create(each_store)
    launch_record(each_store.output.root, "launch-1").unlink()
    assert create(each_store).run_id == first.run_id
    assert len(mlflow_runs(each_store)) == 1


@pytest.mark.parametrize("left", [[], ["mlflow.user"], ["mlflow.user", "mlflow.runName"], [LAUNCH_TAG]], ids=str)
def test_a_file_store_that_had_not_written_the_tags_gives_the_run_that_it_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: list[str]
) -> None:
    settings = settings_in(tmp_path, store="file")
    prepare_store(settings, EXPERIMENT)
    whole = mlflow.MlflowClient.create_run

    def die(*arguments: object, **options: object) -> None:
        made = whole(*arguments, **options)
        (tags,) = (tmp_path / "mlruns").glob(f"*/{made.info.run_id}/tags")
        for tag in tags.iterdir():
            if tag.name not in left:
                tag.unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(mlflow.MlflowClient, "create_run", die)
        with pytest.raises(KeyboardInterrupt):
            create(settings)
    (made,) = mlflow_runs(settings)
    run = create(settings)
    assert run.run_id == made.info.run_id
    assert len(mlflow_runs(settings)) == 1
    tags = mlflow_run(settings, run).data.tags
    assert (tags[LAUNCH_TAG], tags[DIRECTORY_TAG]) == ("launch-1", run.directory)


def test_a_file_store_that_had_not_even_made_the_folder_of_tags_gives_the_run_that_it_made(tmp_path: Path) -> None:
    settings = settings_in(tmp_path, store="file")
    prepare_store(settings, EXPERIMENT)
    first = create(settings)
    (folder,) = (tmp_path / "mlruns").glob(f"*/{first.run_id}")
    shutil.rmtree(folder / "tags")
    shutil.rmtree(first.path)
    noted = {"launch_id": "launch-1", "timestamp": first.timestamp, "since": mlflow_run(settings, first).info.start_time / 1000}
    write_json(launch_record(settings.output.root, "launch-1"), noted)
    assert create(settings) == first
    is_the_only_one(settings, first)


@pytest.mark.parametrize("other", ["older", "of another launch"])
def test_a_run_of_the_same_name_that_is_not_ours_is_left_alone(each_store: Settings, other: str) -> None:
    client = client_of(each_store.tracking.uri)
    experiment = client.get_experiment_by_name(EXPERIMENT).experiment_id
    since = time.time()
    tags = {} if other == "older" else {LAUNCH_TAG: "launch-2"}
    start = round(1000 * since) - (60_000 if other == "older" else 0)
    theirs = client.create_run(experiment, start_time=start, tags=tags, run_name="phase2_20260101_120000")
    intent = {"launch_id": "launch-1", "timestamp": "20260101_120000", "since": since}
    write_json(launch_record(each_store.output.root, "launch-1"), intent)
    run = create(each_store)
    assert run.run_id != theirs.info.run_id
    assert client.get_run(theirs.info.run_id).data.tags.get(LAUNCH_TAG) == tags.get(LAUNCH_TAG)


def test_a_recorded_run_is_known_without_asking_the_store(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    run = create(settings)
    monkeypatch.setattr(run_module, "SECONDS_TO_CREATE", 0.0)
    assert create(elsewhere(settings, NOBODY)) == run


def test_a_store_that_stays_away_is_an_error_and_the_launch_can_be_tried_again(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "SECONDS_TO_CREATE", 0.0)
        with pytest.raises(STORE_ERRORS):
            create(elsewhere(settings, NOBODY))
    assert recorded_run(settings.output.root, "launch-1") is None
    is_the_only_one(settings, create(settings))


@pytest.mark.timeout(60)
def test_a_store_that_is_away_for_a_moment_is_asked_again(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    failed, whole = threading.Event(), run_module._find_or_make

    def noted(*arguments: Any) -> tuple[str, str, bool]:
        try:
            return whole(*arguments)
        except STORE_ERRORS:
            failed.set()
            raise

    monkeypatch.setattr(run_module, "_find_or_make", noted)
    made: list[Run] = []
    thread = threading.Thread(target=lambda: made.append(create(settings)))
    with away(settings):
        thread.start()
        failed.wait()
    thread.join()
    is_the_only_one(settings, made[0])


# who writes to it


def test_one_process_alone_writes_to_a_run_directory(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "SECONDS_TO_INHERIT", 0.0)
    run = create(settings)
    with lock_holder(run.path / ".lock") as process:
        with pytest.raises(RuntimeError, match=f"another process writes to {run.directory} .pid {process.pid} on "), sole_writer(run):
            pytest.fail("two processes write")
        process.kill()
        process.wait()
        with sole_writer(run):
            assert run_lock(run).is_held()
    assert not run_lock(run).is_held()


@pytest.mark.timeout(60)
def test_a_predecessor_that_is_about_to_die_is_waited_for(settings: Settings) -> None:
    run = create(settings)
    with lock_holder(run.path / ".lock") as process:
        threading.Timer(0.5, process.kill).start()
        with sole_writer(run):
            assert process.wait() != 0


def test_what_a_kill_left_half_written_is_removed_by_the_next_writer(settings: Settings) -> None:
    run = create(settings)
    kept = [run.path / "config.json", run.checkpoints / "last.ckpt", run.path / ".mirror.json"]
    left = [run.path / ".config.json.aside-4711", run.checkpoints / ".last.ckpt.aside-4711", run.path / "plots" / ".a.png.aside-1"]
    (run.path / "plots").mkdir()
    for path in kept + left:
        path.write_bytes(b"{}")
    with sole_writer(run):
        assert [path for path in kept + left if path.exists()] == kept


def test_nothing_is_removed_while_another_process_writes(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "SECONDS_TO_INHERIT", 0.0)
    run = create(settings)
    (run.path / ".config.json.aside-4711").write_bytes(b"{}")
    with lock_holder(run.path / ".lock"), pytest.raises(RuntimeError), sole_writer(run):
        pytest.fail("two processes write")
    assert (run.path / ".config.json.aside-4711").exists()


def test_a_launch_and_its_run_have_locks_of_their_own(settings: Settings) -> None:
    run = create(settings)
    with run_lock(run).held():
        assert not launch_lock(settings.output.root, run.launch_id).is_held()
    with launch_lock(settings.output.root, "launch-2").held():
        assert not launch_lock(settings.output.root, "launch-1").is_held()
        assert Lock(Path(settings.output.root) / ".launches" / "launch-2.lock").is_held()


# what it says of itself


def test_a_run_directory_says_what_it_is(settings: Settings) -> None:
    run = create(settings)
    describe_run(run, resolved_config(settings, {}), "python -m raytrain2p.train --phase 2 seed=3", {"train_records": 60})
    lines = dict(line.split(": ", 1) for line in (run.path / "MLFLOW_RUN_ID.txt").read_text().splitlines())
    assert lines == {"run_id": run.run_id, "directory": run.directory, "experiment": run.experiment, "timestamp": run.timestamp}
    noted = read_json(run.path / "run.json")
    assert run_of(noted) == run
    assert noted["train_records"] == 60
    assert noted["tags"] == {
        LAUNCH_TAG: "launch-1",
        DIRECTORY_TAG: run.directory,
        TIMESTAMP_TAG: run.timestamp,
        "raytrain2p.command": "python -m raytrain2p.train --phase 2 seed=3",
    }
    assert {path.name for path in run.path.iterdir()} == {
        "lightning_checkpoints",
        "config.json",
        "MLFLOW_RUN_ID.txt",
        "README.md",
        "run.json",
    }


@pytest.mark.parametrize(
    ("phase", "lines"),
    [
        ("alignment", ["aligner.pt", "raytrain2p.train --phase 2 --aligner {}", "raytrain2p.train --phase 1 --resume {}"]),
        ("phase2", ["model.pt", "raytrain2p.predict --run {}", "raytrain2p.train --phase 2 --resume {}"]),
    ],
)
def test_the_page_of_a_run_says_how_it_was_made_and_what_to_do_with_it(settings: Settings, phase: str, lines: list[str]) -> None:
    run = create(settings, phase=phase)
    describe_run(run, resolved_config(settings, {}), "python -m raytrain2p.train seed=3", {})
    page = (run.path / "README.md").read_text()
    assert "\n    python -m raytrain2p.train seed=3\n" in page
    assert run.run_id in page
    for line in lines:
        assert line.format(run.run_id[:8]) in page


@pytest.mark.parametrize("phase", [1, 2])
def test_config_json_has_every_setting_and_what_the_worker_found(tmp_path: Path, settings: Settings, phase: int) -> None:
    settings = settings_in(tmp_path, phase=phase)
    run = create(settings, phase="alignment" if phase == 1 else "phase2")
    resolved = {"training.precision": "float32", "launch.cpus_per_worker": 3}
    describe_run(run, resolved_config(settings, resolved), "command", {})
    config = json.loads((run.path / "config.json").read_text())
    assert flatten(type(settings).model_validate(config)) == flatten(settings) | resolved


def test_config_json_is_enough_to_load_the_same_settings_again(settings: Settings) -> None:
    run = create(settings)
    describe_run(run, resolved_config(settings, {}), "command", {})
    assert load_settings(2, run.path / "config.json") == settings  # JSON is YAML


def test_the_password_of_the_store_is_in_no_file_of_the_run(settings: Settings) -> None:
    run = create(settings)
    secret = elsewhere(settings, "postgresql://me:hunter2@db/mlflow")
    describe_run(run, resolved_config(secret, {}), "python -m raytrain2p.train tracking.uri=postgresql://me:hunter2@db/mlflow", {})
    assert read_json(run.path / "config.json")["tracking"]["uri"] == "postgresql://me:***@db/mlflow"
    for name in ("README.md", "run.json"):
        assert "tracking.uri=postgresql://me:***@db/mlflow" in (run.path / name).read_text()
    files = [path for path in run.path.rglob("*") if path.is_file()]
    assert len(files) == 4
    assert not any(b"hunter2" in path.read_bytes() for path in files)


def test_a_run_that_is_described_again_with_the_same_settings_has_no_changes(settings: Settings) -> None:
    run = create(settings)
    for _ in range(2):
        assert describe_run(run, resolved_config(settings, {}), "command", {}) == []
    assert not (run.path / "changes.jsonl").exists()


def test_what_a_resumed_run_has_otherwise_is_told_and_kept_for_each_time(settings: Settings) -> None:
    run = create(settings)
    size = settings.training.global_batch_size
    describe_run(run, resolved_config(settings, {}), "command", {})
    assert describe_run(run, resolved_config(settings, {"launch.num_workers": 2}), "command", {}) == ["launch.num_workers: 1 -> 2"]
    last = resolved_config(settings, {"training.global_batch_size": 2 * size})
    assert describe_run(run, last, "command", {}) == [f"training.global_batch_size: {size} -> {2 * size}", "launch.num_workers: 2 -> 1"]
    rows = [json.loads(line) for line in (run.path / "changes.jsonl").read_text().splitlines()]
    assert [row["changes"] for row in rows] == [
        {"launch.num_workers": [1, 2]},
        {"training.global_batch_size": [size, 2 * size], "launch.num_workers": [2, 1]},
    ]
    assert read_json(run.path / "config.json") == last


def test_settings_that_are_new_or_gone_are_changes_as_well() -> None:
    before = {"a": {"same": 1, "gone": 2}, "whole": {"b": 3}}
    after = {"a": {"same": 1, "new": 4}, "whole": None}
    assert setting_changes(before, after) == {"a.gone": (2, None), "a.new": (None, 4), "whole": ({"b": 3}, None)}


def test_a_status_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert read_status(tmp_path)["status"] == "RUNNING"
    for status in ("RUNNING", "FAILED", "FINISHED"):
        write_status(tmp_path, status)
        assert read_status(tmp_path)["status"] == status


def test_an_experiment_that_nobody_prepared_is_a_developers_error(settings: Settings) -> None:
    with pytest.raises(AssertionError, match="prepare_store"):
        get_or_create_run(settings, "alignment", "never prepared", "launch-1")


def test_tags_of_a_new_run_are_in_its_directory_too_and_stay_there(settings: Settings) -> None:
    run = get_or_create_run(settings, "phase2", EXPERIMENT, "launch-1", {SWEEP_TAG: "a1" * 16})
    assert run_tags(run.path)[SWEEP_TAG] == "a1" * 16
    describe_run(run, resolved_config(settings, {}), "command", {})
    assert run_tags(run.path)[SWEEP_TAG] == "a1" * 16
    assert mlflow_run(settings, run).data.tags[SWEEP_TAG] == "a1" * 16
