"""One launch is one MLflow run and one directory, after any kill and any number of retries; in real stores."""

import re
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import mlflow
import pytest

from raytrain2p.config import InputError, Settings
from raytrain2p.storage.errors import StorageError
from raytrain2p.storage.files import read_json, write_json
from raytrain2p.storage.locks import Lock
from raytrain2p.tracking import create_run as create_module
from raytrain2p.tracking import run_directory as run_directory_module
from raytrain2p.tracking.create_run import check_launch_is_free, get_or_create_run
from raytrain2p.tracking.find import RUN_DIRECTORY, find_run, run_directories
from raytrain2p.tracking.mlflow_store import STORE_ERRORS, client_of, prepare_store, running_runs
from raytrain2p.tracking.mlflow_sync import MlflowSync
from raytrain2p.tracking.run import (
    DIRECTORY_TAG,
    LAUNCH_TAG,
    ROOT_TAG,
    SWEEP_TAG,
    TIMESTAMP_TAG,
    Run,
    launch_lock,
    launch_record,
    recorded_run,
)
from raytrain2p.tracking.run_directory import RUN_ID_LENGTH
from raytrain2p.tracking.run_writer import describe_run, end_unrecorded, resolved_config
from tests.tracking.stores import EXPERIMENT, NOBODY, away, create, elsewhere, mlflow_run, mlflow_runs, settings_in


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
    assert Run.from_record(read_json(run.path / "run.json"), run.path) == run
    assert recorded_run(settings.output.root, run.launch_id) == run


# its identity


def test_the_same_launch_id_gives_one_run_and_one_directory(each_store: Settings) -> None:
    first, second = create(each_store), create(each_store)
    assert first == second
    is_the_only_one(each_store, first)


def test_a_run_is_not_created_again_where_the_disk_of_its_launch_is_gone(settings: Settings) -> None:
    run = create(settings)
    shutil.rmtree(settings.output.root)
    with pytest.raises(StorageError, match="is gone"):
        get_or_create_run(settings, run.phase, EXPERIMENT, run.launch_id)
    assert not Path(settings.output.root).exists()


def test_a_run_whose_directory_is_gone_is_not_created_again(settings: Settings) -> None:
    run = create(settings)
    shutil.rmtree(run.path)
    with pytest.raises(StorageError, match=f"{run.directory} is gone, where launch launch-1 has its run {run.run_id[:8]}: mount its disk"):
        create(settings)
    assert not run.path.exists()


def test_a_launch_repeated_before_its_disk_is_back_does_not_create_its_run_again(settings: Settings) -> None:
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
    monkeypatch.setattr(create_module, "datetime", OneSecond)
    first, second = create(each_store, "launch-1"), create(each_store, "launch-2")
    assert first.timestamp == second.timestamp == "20260101_120000"
    assert first.run_id != second.run_id
    assert len(mlflow_runs(each_store)) == 2
    assert directories(each_store) == sorted([first.path, second.path])
    assert (create(each_store, "launch-1"), create(each_store, "launch-2")) == (first, second)


class ClockThatRunsBack(datetime):
    """An hour earlier at each look: as when summer time ends, or a container's clock is wrong."""

    hour = 12

    @classmethod
    def now(cls, tz: Any = None) -> "ClockThatRunsBack":
        cls.hour -= 1
        return cls(2026, 10, 25, cls.hour, 0, 0)


def test_latest_is_the_run_that_was_made_last_whatever_the_clock_showed(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(create_module, "datetime", ClockThatRunsBack)
    older = Path(settings.output.root) / "phase2" / f"{'f' * 32}_20991231_235959"  # of a version that did not number its runs
    older.mkdir(parents=True)
    write_json(older / "run.json", {"tags": {}})
    made = [create(settings, f"launch-{number}") for number in range(3)]
    assert [run.timestamp for run in made] == sorted((run.timestamp for run in made), reverse=True)
    describe_run(made[0], resolved_config(settings, {}), "command", {})  # a resumed run keeps its place
    assert run_directories(settings.output.root, ["phase2"]) == [older, *(run.path for run in made)]
    assert find_run(settings.output.root, ["phase2"], "latest", "--resume") == made[-1]


def test_a_configured_experiment_replaces_the_default(tmp_path: Path, settings: Settings) -> None:
    mine = settings_in(tmp_path, "tracking.experiment=mine")
    prepare_store(mine, EXPERIMENT)
    run = create(mine)
    assert run.experiment == "mine"
    assert [found.info.run_id for found in mlflow_runs(mine, "mine")] == [run.run_id]
    assert mlflow_runs(mine) == []


@pytest.mark.parametrize("launch_id", ["trial_00003", "user@host 2026-01-01"])
def test_a_launch_id_may_be_chosen_by_the_user(settings: Settings, launch_id: str) -> None:
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
    monkeypatch.setattr(create_module, "client_of", lambda uri: client_of(settings.tracking.uri))  # no such database is here
    run = create(elsewhere(settings, "postgresql://me:hunter2@db/mlflow"))
    assert run.tracking_uri == "postgresql://me:***@db/mlflow"
    files = [path for path in Path(settings.output.root).rglob("*") if path.is_file()]
    assert {"run.json", "launch-1.json"} <= {path.name for path in files}
    assert not any(b"hunter2" in path.read_bytes() for path in files)


# another output root


def test_a_launch_id_of_another_root_is_refused_and_the_first_run_is_left_alone(each_store: Settings, tmp_path: Path) -> None:
    first = create(each_store)
    other = rooted(each_store, tmp_path / "other")
    with pytest.raises(InputError, match=f"output.root={each_store.output.root}, and this is output.root={tmp_path}/other"):
        create(other)
    with pytest.raises(InputError, match="take another launch ID"):
        check_launch_is_free(other, "phase2", "launch-1")
    check_launch_is_free(other, "phase2", "launch-2")
    check_launch_is_free(each_store, "phase2", "launch-1")
    end_unrecorded(other.tracking.uri, other.output.root, "launch-1", "FAILED")  # what the refused launch does at its end
    assert mlflow_run(each_store, first).info.status == "RUNNING"
    is_the_only_one(each_store, first)


def test_a_root_that_was_moved_is_the_same_root(each_store: Settings, tmp_path: Path) -> None:
    first = create(each_store)
    Path(each_store.output.root).rename(tmp_path / "moved")
    moved = rooted(each_store, tmp_path / "moved")
    assert create(moved) == replace(first, directory=str(tmp_path / "moved" / "phase2" / first.path.name))
    launch_record(moved.output.root, "launch-1").unlink()
    assert create(moved).run_id == first.run_id
    assert len(mlflow_runs(moved)) == 1
    assert not Path(each_store.output.root).exists()


def test_a_root_by_another_path_is_the_same_root(settings: Settings, tmp_path: Path) -> None:
    first = create(settings)
    (tmp_path / "link").symlink_to(settings.output.root)
    launch_record(settings.output.root, "launch-1").unlink()
    assert create(rooted(settings, tmp_path / "link")).run_id == first.run_id


def rooted(settings: Settings, root: Path) -> Settings:
    return settings.model_copy(update={"output": settings.output.model_copy(update={"root": str(root)})})


# after a kill


def test_a_launch_that_made_no_run_has_no_record(tmp_path: Path) -> None:
    assert recorded_run(str(tmp_path), "launch-1") is None


def test_a_kill_before_the_run_was_created_leaves_one_run_in_the_end(each_store: Settings) -> None:
    root = each_store.output.root
    intent = {"launch_id": "launch-1", "timestamp": "20260101_120000", "since": time.time()}
    write_json(launch_record(root, "launch-1"), intent)
    assert recorded_run(root, "launch-1") is None
    run = create(each_store)
    assert run.timestamp == "20260101_120000"
    is_the_only_one(each_store, run)


@pytest.mark.parametrize("dies_in", ["search_runs", "create_run", "set_tag"])
def test_after_a_kill_during_any_request_the_next_rank_0_finds_the_same_run(
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
def test_after_a_kill_before_its_record_the_same_run_is_recorded(
    each_store: Settings, monkeypatch: pytest.MonkeyPatch, dies_before: str
) -> None:
    def die(path: Path, value: Any) -> None:
        if path.name == dies_before and "run_id" in value:
            raise KeyboardInterrupt
        write_json(path, value)

    with monkeypatch.context() as patch:
        for module in (create_module, run_directory_module):
            patch.setattr(module, "write_json", die)
        with pytest.raises(KeyboardInterrupt):
            create(each_store)
    (found,) = mlflow_runs(each_store)
    run = create(each_store)
    assert run.run_id == found.info.run_id
    is_the_only_one(each_store, run)


def test_two_rank_0s_of_one_launch_at_once_have_one_run(each_store: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = mlflow.MlflowClient.create_run

    def slowly(*arguments: object, **options: object) -> Any:
        time.sleep(0.5)  # the other one has long asked by now
        return whole(*arguments, **options)

    monkeypatch.setattr(mlflow.MlflowClient, "create_run", slowly)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(create, [each_store] * 2)
    assert first == second
    is_the_only_one(each_store, first)


def test_without_its_record_on_disk_a_run_is_found_by_its_tag(each_store: Settings) -> None:
    first = create(each_store)
    launch_record(each_store.output.root, "launch-1").unlink()
    assert create(each_store).run_id == first.run_id
    assert len(mlflow_runs(each_store)) == 1


@pytest.mark.parametrize("left", [[], ["mlflow.user"], ["mlflow.user", "mlflow.runName"], [LAUNCH_TAG]], ids=str)
def test_a_run_of_the_file_store_is_found_without_its_tags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: list[str]) -> None:
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


def test_a_run_of_the_file_store_is_found_without_its_folder_of_tags(tmp_path: Path) -> None:
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


def test_a_recorded_run_is_found_without_the_store(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    run = create(settings)
    monkeypatch.setattr(create_module, "SECONDS_TO_CREATE", 0.0)
    assert create(elsewhere(settings, NOBODY)) == run


def test_a_store_that_stays_away_is_an_error_and_the_launch_can_be_tried_again(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(create_module, "SECONDS_TO_CREATE", 0.0)
        with pytest.raises(StorageError, match=r"MLflow is away .*refused"):
            create(elsewhere(settings, NOBODY))
    assert recorded_run(settings.output.root, "launch-1") is None
    is_the_only_one(settings, create(settings))


@pytest.mark.timeout(60)
def test_a_request_is_sent_again_after_a_short_outage(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    failed, whole = threading.Event(), create_module._find_or_make

    def noted(*arguments: Any) -> tuple[str, str, bool]:
        try:
            return whole(*arguments)
        except STORE_ERRORS:
            failed.set()
            raise

    monkeypatch.setattr(create_module, "_find_or_make", noted)
    made: list[Run] = []
    thread = threading.Thread(target=lambda: made.append(create(settings)))
    with away(settings):
        thread.start()
        failed.wait()
    thread.join()
    is_the_only_one(settings, made[0])


def test_a_launch_and_its_run_have_locks_of_their_own(settings: Settings) -> None:
    run = create(settings)
    with run.files.lock.held():
        assert not launch_lock(settings.output.root, run.launch_id).is_held()
    with launch_lock(settings.output.root, "launch-2").held():
        assert not launch_lock(settings.output.root, "launch-1").is_held()
        assert Lock(Path(settings.output.root) / ".launches" / "launch-2.lock").is_held()


def test_an_experiment_that_was_not_prepared_is_an_assertion_error(settings: Settings) -> None:
    with pytest.raises(AssertionError, match="prepare_store"):
        get_or_create_run(settings, "alignment", "never prepared", "launch-1")


def test_tags_of_a_new_run_are_in_its_directory_and_stay_there(settings: Settings) -> None:
    run = get_or_create_run(settings, "phase2", EXPERIMENT, "launch-1", {SWEEP_TAG: "a1" * 16})
    assert run.files.tags()[SWEEP_TAG] == "a1" * 16
    describe_run(run, resolved_config(settings, {}), "command", {})
    assert run.files.tags()[SWEEP_TAG] == "a1" * 16
    assert mlflow_run(settings, run).data.tags[SWEEP_TAG] == "a1" * 16


def test_a_launch_whose_record_is_gone_keeps_its_directory(settings: Settings) -> None:
    first = create(settings)
    path = launch_record(settings.output.root, "launch-1")
    path.unlink()
    write_json(path, {"launch_id": "launch-1", "timestamp": "20260101_120000", "since": 0.0})  # a second later, that is
    assert create(settings) == first


def test_a_launch_of_another_machine_is_refused_though_its_root_has_the_same_path(settings: Settings, tmp_path: Path) -> None:
    """Each machine has a disk of its own under that path, and both send to one server."""
    run = create(settings)
    describe_run(run, resolved_config(settings, {}), "command", {})
    MlflowSync(run, settings.tracking.uri).send()
    Path(settings.output.root).rename(tmp_path / "the other machine's")
    with pytest.raises(InputError, match="is not here"):
        check_launch_is_free(settings, "phase2", run.launch_id)


def test_an_output_root_may_have_a_quotation_mark_in_its_name(settings: Settings, tmp_path: Path) -> None:
    quoted = settings.model_copy(update={"output": settings.output.model_copy(update={"root": str(tmp_path / "it's")})})
    Path(quoted.output.root, ".launches").mkdir(parents=True)
    run = create(quoted)
    assert [found.info.run_id for found in running_runs(client_of(settings.tracking.uri), ROOT_TAG, quoted.output.root)] == [run.run_id]


def test_a_damaged_record_of_a_run_is_written_anew_with_a_number_that_can_be_read(settings: Settings) -> None:
    run = create(settings)
    run.files.record.write_bytes(bytes(100))
    path = launch_record(settings.output.root, "launch-1")
    write_json(path, {"launch_id": "launch-1", "timestamp": run.timestamp, "since": 0.0})
    assert create(settings) == run
    assert run.files.sequence() == 2
