"""What MLflow lacks is sent to a real SQLite store, orphaned runs are set FAILED, and other runs are left alone."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from raytrain2p.config import InputError, Settings
from raytrain2p.config.phases import SWEEPS
from raytrain2p.runs import __main__ as runs
from raytrain2p.runs.reconcile import reconcile, reconcile_unborn
from raytrain2p.runs.sync import sync, tracking_uri
from raytrain2p.storage.files import read_json, write_json
from raytrain2p.tracking.find import find_runs, is_alive
from raytrain2p.tracking.mlflow_store import client_of, store_exists
from raytrain2p.tracking.mlflow_sync import MlflowSync
from raytrain2p.tracking.run import (
    DIRECTORY_TAG,
    LAUNCH_TAG,
    ROOT_TAG,
    SWEEP_TAG,
    Run,
    launch_lock,
    launch_record,
)
from raytrain2p.tracking.run_writer import describe_run, resolved_config
from tests.tracking.stores import EXPERIMENT, NOBODY, away, create, fill, history, lock_holder, mlflow_run, note, settings_in


@pytest.fixture
def reported() -> list[str]:
    return []


def left(settings: Settings, status: str | None, launch_id: str = "launch-1", phase: str = "phase2") -> Run:
    """A run whose process has ended, with a described directory, two points that were not sent, and perhaps a status."""
    run = create(settings, launch_id, phase)
    describe_run(run, resolved_config(settings, {}), "command", {})
    note(run, 1, 2)
    if status is not None:
        run.files.write_status(status)
    return run


def arrived(settings: Settings, run: Run) -> tuple[str, int]:
    """What MLflow has: the status, and how many points."""
    return mlflow_run(settings, run).info.status, len(history(settings, run))


def from_elsewhere(run: Run) -> None:
    """As if the run were on another machine."""
    write_json(run.path / "status.json", read_json(run.path / "status.json") | {"host": f"not-{socket.gethostname()}"})


# sync


@pytest.mark.parametrize("status", ["FINISHED", "FAILED", "KILLED"])
def test_what_mlflow_lacks_of_a_run_that_is_over_is_sent_once(settings: Settings, reported: list[str], status: str) -> None:
    run = left(settings, status)
    assert sync(run, settings.output.root, None, reported.append)
    assert arrived(settings, run) == (status, 2)
    assert mlflow_run(settings, run).data.params["seed"] == "0"
    (line,) = reported
    assert run.run_id[:8] in line
    assert status in line
    assert sync(run, settings.output.root, None, reported.append)
    assert len(reported) == 1
    assert arrived(settings, run) == (status, 2)


def test_a_run_that_is_complete_needs_no_mlflow(settings: Settings, reported: list[str]) -> None:
    run = left(settings, "FINISHED")
    MlflowSync(run, settings.tracking.uri).send()
    assert sync(run, settings.output.root, NOBODY, reported.append)
    assert reported == []


@pytest.mark.parametrize("lock", ["of the launch", "of the run"])
@pytest.mark.parametrize("verb", [sync, reconcile])
def test_a_run_under_way_is_left_alone(settings: Settings, reported: list[str], verb: Callable[..., bool], lock: str) -> None:
    run = left(settings, "RUNNING")
    path = run.files.lock.path if lock == "of the run" else launch_lock(settings.output.root, run.launch_id).path
    with lock_holder(path):
        assert is_alive(run, settings.output.root)
        assert verb(run, settings.output.root, None, reported.append)
    assert "under way" in reported[0]
    assert run.files.read_status()["status"] == "RUNNING"
    assert arrived(settings, run) == ("RUNNING", 0)


def test_an_outage_is_reported_and_the_run_can_be_sent_later(settings: Settings, reported: list[str]) -> None:
    run = left(settings, "FAILED")
    with away(settings):
        assert not sync(run, settings.output.root, None, reported.append)
    assert not sync(run, settings.output.root, NOBODY.replace("//", "//me:hunter2@"), reported.append)
    assert ["MLflow fails (no such table: runs)" in reported[0], "MLflow is away" in reported[1]] == [True, True]
    assert "hunter2" not in "".join(reported)
    assert sync(run, settings.output.root, None, reported.append)
    assert arrived(settings, run) == ("FAILED", 2)


def test_a_running_run_is_sent_but_never_complete(settings: Settings, reported: list[str]) -> None:
    run = left(settings, "RUNNING")
    assert not sync(run, settings.output.root, None, reported.append)
    assert arrived(settings, run) == ("RUNNING", 2)


# reconcile


@pytest.mark.parametrize("status", ["RUNNING", None])
def test_an_orphaned_run_is_failed_on_disk_and_in_mlflow(settings: Settings, reported: list[str], status: str | None) -> None:
    run = left(settings, status)
    assert reconcile(run, settings.output.root, None, reported.append)
    assert run.files.read_status()["status"] == "FAILED"
    assert arrived(settings, run) == ("FAILED", 2)
    assert "orphaned, no process works on it: FAILED" in reported[0]
    before = len(reported)
    assert reconcile(run, settings.output.root, None, reported.append)
    assert len(reported) == before


def test_a_run_whose_process_was_killed_is_failed(settings: Settings, reported: list[str]) -> None:
    run = left(settings, "RUNNING")
    with lock_holder(run.files.lock.path) as process:
        process.kill()
        process.wait()
        assert not is_alive(run, settings.output.root)
        assert reconcile(run, settings.output.root, None, reported.append)
    assert arrived(settings, run) == ("FAILED", 2)


def test_a_run_that_was_killed_before_it_was_described_is_failed(settings: Settings, reported: list[str]) -> None:
    run = create(settings)
    assert reconcile(run, settings.output.root, None, reported.append)
    assert arrived(settings, run) == ("FAILED", 0)


@pytest.mark.parametrize("status", ["FINISHED", "FAILED", "KILLED"])
def test_the_status_of_a_run_that_has_ended_is_not_changed(settings: Settings, reported: list[str], status: str) -> None:
    run = left(settings, status)
    assert reconcile(run, settings.output.root, None, reported.append)
    assert run.files.read_status()["status"] == status
    assert arrived(settings, run) == (status, 2)


def test_an_orphaned_run_is_failed_on_disk_while_mlflow_is_away(settings: Settings, reported: list[str]) -> None:
    run = left(settings, "RUNNING")
    with away(settings):
        assert not reconcile(run, settings.output.root, None, reported.append)
    assert run.files.read_status()["status"] == "FAILED"
    assert reconcile(run, settings.output.root, None, reported.append)
    assert arrived(settings, run) == ("FAILED", 2)


def test_a_full_disk_is_reported_with_a_line(small_disk: Path, settings: Settings, reported: list[str], tmp_path: Path) -> None:
    settings = settings_in(tmp_path, f"output.root={small_disk}")
    run = left(settings, "RUNNING")
    fill(small_disk)
    assert not reconcile(run, settings.output.root, None, reported.append)
    assert not sync(run, settings.output.root, None, reported.append)
    assert len(reported) == 2
    assert all("cannot be written: no space left" in line for line in reported)


def test_a_read_only_disk_is_reported_with_a_line(small_disk: Path, settings: Settings, reported: list[str], tmp_path: Path) -> None:
    settings = settings_in(tmp_path, f"output.root={small_disk}")
    run = left(settings, "FAILED")
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert not sync(run, settings.output.root, None, reported.append)
    write = f"{run.path / '.lock'} cannot be written: [Errno 30] Read-only file system"
    assert [line.partition("  ")[2][: len(write)] for line in reported] == [write]


def test_a_run_of_another_machine_that_touched_its_lock_is_alive(settings: Settings, reported: list[str]) -> None:
    run = left(settings, "RUNNING")
    from_elsewhere(run)
    with run.files.lock.held():
        pass  # its lock file was just touched
    assert is_alive(run, settings.output.root)
    assert reconcile(run, settings.output.root, None, reported.append)
    assert run.files.read_status()["status"] == "RUNNING"


def test_a_run_of_this_machine_is_not_alive_by_a_touched_lock_alone(settings: Settings) -> None:
    run = left(settings, "RUNNING")
    with run.files.lock.held():
        pass
    os.utime(run.files.lock.path)
    assert not is_alive(run, settings.output.root)


# runs without a directory


def unborn(settings: Settings, launch_id: str = "launch-1", **tags: str) -> str:
    """A run that MLflow has, and whose launch was killed before it recorded it."""
    client = client_of(settings.tracking.uri)
    experiment = client.get_experiment_by_name(EXPERIMENT).experiment_id
    made = client.create_run(experiment, tags={LAUNCH_TAG: launch_id, ROOT_TAG: settings.output.root} | tags)
    intent = {"launch_id": launch_id, "timestamp": "20260101_120000", "since": time.time()}
    write_json(launch_record(settings.output.root, launch_id), intent)
    return str(made.info.run_id)


def status_of(settings: Settings, run_id: str) -> str:
    return str(client_of(settings.tracking.uri).get_run(run_id).info.status)


def test_a_run_that_was_killed_before_it_had_a_directory_is_failed(settings: Settings, reported: list[str]) -> None:
    run_id = unborn(settings)
    reconcile_unborn(settings.output.root, settings.tracking.uri, reported.append)
    assert status_of(settings, run_id) == "FAILED"
    (line,) = reported
    assert run_id[:8] in line
    reconcile_unborn(settings.output.root, settings.tracking.uri, reported.append)
    assert len(reported) == 1


def test_a_run_that_is_about_to_have_a_directory_is_left_alone(settings: Settings, reported: list[str]) -> None:
    run_id = unborn(settings)
    with lock_holder(launch_lock(settings.output.root, "launch-1").path):
        reconcile_unborn(settings.output.root, settings.tracking.uri, reported.append)
    assert (status_of(settings, run_id), reported) == ("RUNNING", [])


def test_runs_with_a_directory_and_runs_of_others_are_left_alone(settings: Settings, reported: list[str]) -> None:
    run = create(settings, "launch-2")
    theirs = unborn(settings, **{ROOT_TAG: "/elsewhere"})
    client = client_of(settings.tracking.uri)
    plain = client.create_run(client.get_experiment_by_name(EXPERIMENT).experiment_id).info.run_id
    ended = unborn(settings, "launch-3")
    client.set_terminated(ended, "KILLED")
    reconcile_unborn(settings.output.root, settings.tracking.uri, reported.append)
    assert [status_of(settings, one) for one in (run.run_id, theirs, plain, ended)] == ["RUNNING", "RUNNING", "RUNNING", "KILLED"]
    assert reported == []


def test_an_outage_ends_the_search_for_unborn_runs_with_a_line(settings: Settings, reported: list[str]) -> None:
    reconcile_unborn(settings.output.root, NOBODY, reported.append)
    assert ["MLflow is away" in line for line in reported] == [True]


# roots that were moved or copied


def test_a_run_of_a_moved_root_is_what_is_found_there(settings: Settings, tmp_path: Path) -> None:
    finished, orphan = left(settings, "FINISHED", "launch-1"), left(settings, "RUNNING", "launch-2")
    MlflowSync(finished, settings.tracking.uri).send()
    old, new = Path(settings.output.root), tmp_path / "moved"
    old.rename(new)
    moved = settings.model_copy(update={"output": settings.output.model_copy(update={"root": str(new)})})
    assert command(moved, "reconcile") == 0
    assert not old.exists(), "nothing is made at the recorded path"
    assert arrived(settings, finished) == ("FINISHED", 2)
    assert arrived(settings, orphan) == ("FAILED", 2)
    for run in (finished, orphan):
        tags = mlflow_run(settings, run).data.tags
        assert (tags[DIRECTORY_TAG], tags[ROOT_TAG]) == (str(new / "phase2" / run.path.name), str(new))
    assert command(settings, "reconcile") == 2  # of the old root, where there are no runs now
    assert arrived(settings, finished)[0] == "FINISHED"


@pytest.mark.parametrize("original", ["is beside it", "is out of sight"])
def test_a_copy_that_is_behind_never_takes_a_finished_run_back(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str], original: str
) -> None:
    run = left(settings, "RUNNING")
    root, copy = Path(settings.output.root), tmp_path / "copy"
    shutil.copytree(root, copy)
    run.files.write_status("FINISHED")
    MlflowSync(run, settings.tracking.uri).send()
    if original == "is out of sight":
        root.rename(tmp_path / "elsewhere")
    copied = settings.model_copy(update={"output": settings.output.model_copy(update={"root": str(copy)})})
    assert command(copied, "reconcile") == 0
    assert command(copied, "sync") == 0
    assert arrived(settings, run) == ("FINISHED", 2)
    printed = capsys.readouterr().out
    if original == "is beside it":
        assert f"{copy}/phase2/{run.path.name} is a copy; the run itself is {run.directory}" in printed
        assert read_json(copy / "phase2" / run.path.name / "status.json")["status"] == "RUNNING", "nothing is written to a copy"
    else:
        assert "MLflow has FINISHED from another copy of it, which stays" in printed


def test_a_copy_that_is_behind_does_not_set_a_run_that_has_ended_running(settings: Settings, tmp_path: Path, reported: list[str]) -> None:
    run = left(settings, "RUNNING")
    from_elsewhere(run)
    copy = tmp_path / "copy"
    shutil.copytree(settings.output.root, copy)
    run.files.write_status("KILLED")
    MlflowSync(run, settings.tracking.uri).send()
    Path(settings.output.root).rename(tmp_path / "elsewhere")
    (behind,) = find_runs(str(copy), [])
    sync(behind, str(copy), None, reported.append)
    assert arrived(settings, run)[0] == "KILLED"


def test_a_store_that_is_not_where_it_was_is_reported_and_not_made(settings: Settings, tmp_path: Path, reported: list[str]) -> None:
    run = left(settings, "FAILED")
    (tmp_path / "mlflow.db").rename(tmp_path / "moved.db")
    assert not sync(run, settings.output.root, None, reported.append)
    assert "there is no such store; if it was moved, set tracking.uri" in reported[0]
    assert not (tmp_path / "mlflow.db").exists()
    assert sync(run, settings.output.root, f"sqlite:///{tmp_path}/moved.db", reported.append)


# where they are sent


def test_without_a_name_all_runs_are_looked_at_the_oldest_first(settings: Settings, tmp_path: Path) -> None:
    made = [left(settings, "FAILED", "launch-1"), left(settings, "FAILED", "launch-2", "alignment"), left(settings, None, "launch-3")]
    (Path(settings.output.root) / "phase2" / f"{'0' * 32}_20260101_120000").mkdir()  # of another version: it has no run.json
    found = find_runs(settings.output.root, [])
    assert sorted(found, key=lambda run: run.run_id) == sorted(made, key=lambda run: run.run_id)
    assert [run.timestamp for run in found] == sorted(run.timestamp for run in made)
    assert find_runs(str(tmp_path / "nowhere"), []) == []


def test_runs_are_named_by_id_its_start_or_directory(settings: Settings) -> None:
    first, second = left(settings, "FAILED", "launch-1"), left(settings, "FAILED", "launch-2", "alignment")
    names = [second.run_id, first.run_id[:12], first.directory]
    assert find_runs(settings.output.root, names) == [second, first, first]


def test_a_name_that_fits_no_run_is_bad_input(settings: Settings) -> None:
    left(settings, "FAILED")
    with pytest.raises(InputError, match="there is no such run"):
        find_runs(settings.output.root, ["nonsense"])


def test_a_given_uri_replaces_the_recorded_one_and_a_masked_one_is_refused(settings: Settings) -> None:
    run = create(settings)
    assert tracking_uri(run, None) == settings.tracking.uri
    assert tracking_uri(run, NOBODY) == NOBODY
    masked = replace(run, tracking_uri="postgresql://me:***@db/mlflow")
    assert tracking_uri(masked, "postgresql://me:secret@db/mlflow") == "postgresql://me:secret@db/mlflow"
    with pytest.raises(InputError, match=r"password is not recorded"):
        tracking_uri(masked, None)


def test_a_store_that_does_not_exist_is_not_created_by_the_check(tmp_path: Path, settings: Settings) -> None:
    assert not store_exists(f"sqlite:///{tmp_path}/absent.db")
    assert store_exists(settings.tracking.uri)
    assert store_exists(NOBODY)
    assert not (tmp_path / "absent.db").exists()


# the command


def command(settings: Settings, verb: str, *words: str) -> int:
    return runs.main([verb, f"output.root={settings.output.root}", *words])


def test_the_command_sends_all_runs_and_exits_with_0(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    finished, dead = left(settings, "FINISHED", "launch-1"), left(settings, "RUNNING", "launch-2")
    run_id = unborn(settings, "launch-3")
    assert command(settings, "reconcile", f"tracking.uri={settings.tracking.uri}") == 0
    assert arrived(settings, finished) == ("FINISHED", 2)
    assert arrived(settings, dead) == ("FAILED", 2)
    assert status_of(settings, run_id) == "FAILED"
    assert "2 of 2 runs are complete in MLflow" in capsys.readouterr().out


def test_the_command_sends_each_run_where_it_was_sent_before(settings: Settings) -> None:
    run = left(settings, "FAILED")
    assert command(settings, "sync", run.run_id[:8]) == 0
    assert arrived(settings, run) == ("FAILED", 2)


def test_the_command_exits_with_1_while_mlflow_is_away_and_with_2_for_a_name_that_fits_no_run(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    left(settings, "FAILED")
    with away(settings):
        assert command(settings, "sync") == 1
    assert "0 of 1 runs are complete in MLflow" in capsys.readouterr().out
    assert command(settings, "sync", "nonsense") == 2
    assert "there is no such run" in capsys.readouterr().err


def test_a_trial_that_its_sweep_has_paused_is_alive(settings: Settings) -> None:
    sweep = create(settings, "sweep-1", SWEEPS)
    write_json(sweep.path / "run.json", asdict(sweep))
    trial = left(settings, "RUNNING", "sweep-1-000")
    trial.add_tags({SWEEP_TAG: sweep.run_id})  # as a trial has it from the start
    with lock_holder(launch_lock(settings.output.root, "sweep-1").path):
        assert is_alive(trial, settings.output.root)
        assert not is_alive(left(settings, "RUNNING", "launch-2"), settings.output.root), "another run"
    assert not is_alive(trial, settings.output.root), "its sweep has ended"


def test_a_database_that_cannot_be_opened_is_an_outage(settings: Settings, tmp_path: Path) -> None:
    run = create(settings)
    run.files.write_status("FAILED")
    (tmp_path / "broken.db").write_bytes(b"no database" * 1000)
    assert not sync(run, settings.output.root, f"sqlite:///{tmp_path}/broken.db", lambda line: None)


def test_the_other_runs_are_sent_if_the_password_of_one_is_not_recorded(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = create(settings, "launch-1"), create(settings, "launch-2")
    for run in (first, second):
        run.files.write_status("FAILED")
        note(run, 1)
    write_json(first.path / "run.json", read_json(first.path / "run.json") | {"tracking_uri": "postgresql://me:***@db/mlflow"})
    runs.main(["sync", f"output.root={settings.output.root}", first.run_id, second.run_id])
    assert mlflow_run(settings, second).info.status == "FAILED"
