"""Afterwards: what MLflow lacks is sent to a real SQLite store, the dead are told from the living, and nobody's run is touched."""

import os
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
from raytrain2p.runs.reconcile import is_store, reconcile, reconcile_unborn
from raytrain2p.runs.sync import is_alive, runs_to_look_at, sync, tracking_uri
from raytrain2p.storage.files import read_json, write_json
from raytrain2p.tracking.mlflow_store import client_of
from raytrain2p.tracking.mlflow_sync import MlflowSync
from raytrain2p.tracking.run import (
    LAUNCH_TAG,
    ROOT_TAG,
    SWEEP_TAG,
    Run,
    add_tags,
    describe_run,
    launch_lock,
    launch_record,
    read_status,
    resolved_config,
    run_lock,
    write_status,
)
from tests.tracking.stores import EXPERIMENT, NOBODY, away, create, fill, history, lock_holder, mlflow_run, note, settings_in


@pytest.fixture
def told() -> list[str]:
    return []


def left(settings: Settings, status: str | None, launch_id: str = "launch-1", phase: str = "phase2") -> Run:
    """A run whose process is gone, with a described directory, two points that nobody has sent, and perhaps a status."""
    run = create(settings, launch_id, phase)
    describe_run(run, resolved_config(settings, {}), "command", {})
    note(run, 1, 2)
    if status is not None:
        write_status(run.path, status)
    return run


def arrived(settings: Settings, run: Run) -> tuple[str, int]:
    """What MLflow has: the status, and how many points."""
    return mlflow_run(settings, run).info.status, len(history(settings, run))


def from_elsewhere(run: Run) -> None:
    """As if the run were on another machine."""
    write_json(run.path / "status.json", read_json(run.path / "status.json") | {"host": f"not-{socket.gethostname()}"})


# sync


@pytest.mark.parametrize("status", ["FINISHED", "FAILED", "KILLED"])
def test_what_mlflow_lacks_of_a_run_that_is_over_is_sent_once(settings: Settings, told: list[str], status: str) -> None:
    run = left(settings, status)
    assert sync(run, settings.output.root, None, told.append)
    assert arrived(settings, run) == (status, 2)
    assert mlflow_run(settings, run).data.params["seed"] == "0"
    (line,) = told
    assert run.run_id[:8] in line
    assert status in line
    assert sync(run, settings.output.root, None, told.append)
    assert len(told) == 1
    assert arrived(settings, run) == (status, 2)


def test_a_run_that_mlflow_has_whole_needs_no_mlflow(settings: Settings, told: list[str]) -> None:
    run = left(settings, "FINISHED")
    MlflowSync(run, settings.tracking.uri).send()
    assert sync(run, settings.output.root, NOBODY, told.append)
    assert told == []


@pytest.mark.parametrize("lock", ["of the launch", "of the run"])
@pytest.mark.parametrize("verb", [sync, reconcile])
def test_a_run_that_somebody_works_on_is_left_to_him(settings: Settings, told: list[str], verb: Callable[..., bool], lock: str) -> None:
    run = left(settings, "RUNNING")
    path = run_lock(run).path if lock == "of the run" else launch_lock(settings.output.root, run.launch_id).path
    with lock_holder(path):
        assert is_alive(run, settings.output.root)
        assert verb(run, settings.output.root, None, told.append)
    assert "under way" in told[0]
    assert read_status(run.path)["status"] == "RUNNING"
    assert arrived(settings, run) == ("RUNNING", 0)


def test_a_store_that_is_away_is_told_and_the_run_can_be_sent_later(settings: Settings, told: list[str]) -> None:
    run = left(settings, "FAILED")
    with away(settings):
        assert not sync(run, settings.output.root, None, told.append)
    assert not sync(run, settings.output.root, NOBODY.replace("//", "//me:hunter2@"), told.append)
    assert ["MLflow is away" in line for line in told] == [True, True]
    assert "hunter2" not in "".join(told)
    assert sync(run, settings.output.root, None, told.append)
    assert arrived(settings, run) == ("FAILED", 2)


def test_a_run_that_says_running_is_sent_but_never_whole(settings: Settings, told: list[str]) -> None:
    run = left(settings, "RUNNING")
    assert not sync(run, settings.output.root, None, told.append)
    assert arrived(settings, run) == ("RUNNING", 2)


# reconcile


@pytest.mark.parametrize("status", ["RUNNING", None])
def test_a_run_that_died_without_a_word_is_failed_on_disk_and_in_mlflow(settings: Settings, told: list[str], status: str | None) -> None:
    run = left(settings, status)
    assert reconcile(run, settings.output.root, None, told.append)
    assert read_status(run.path)["status"] == "FAILED"
    assert arrived(settings, run) == ("FAILED", 2)
    assert "died without a word" in told[0]
    before = len(told)
    assert reconcile(run, settings.output.root, None, told.append)
    assert len(told) == before


def test_a_run_whose_process_was_killed_is_failed(settings: Settings, told: list[str]) -> None:
    run = left(settings, "RUNNING")
    with lock_holder(run_lock(run).path) as process:
        process.kill()
        process.wait()
        assert not is_alive(run, settings.output.root)
        assert reconcile(run, settings.output.root, None, told.append)
    assert arrived(settings, run) == ("FAILED", 2)


def test_a_run_that_died_before_it_said_what_it_is_is_failed(settings: Settings, told: list[str]) -> None:
    run = create(settings)
    assert reconcile(run, settings.output.root, None, told.append)
    assert arrived(settings, run) == ("FAILED", 0)


@pytest.mark.parametrize("status", ["FINISHED", "FAILED", "KILLED"])
def test_how_a_run_ended_is_not_changed(settings: Settings, told: list[str], status: str) -> None:
    run = left(settings, status)
    assert reconcile(run, settings.output.root, None, told.append)
    assert read_status(run.path)["status"] == status
    assert arrived(settings, run) == (status, 2)


def test_a_dead_run_is_failed_on_disk_though_mlflow_is_away(settings: Settings, told: list[str]) -> None:
    run = left(settings, "RUNNING")
    with away(settings):
        assert not reconcile(run, settings.output.root, None, told.append)
    assert read_status(run.path)["status"] == "FAILED"
    assert reconcile(run, settings.output.root, None, told.append)
    assert arrived(settings, run) == ("FAILED", 2)


def test_a_dead_run_whose_disk_is_full_is_told_with_a_line(small_disk: Path, settings: Settings, told: list[str], tmp_path: Path) -> None:
    settings = settings_in(tmp_path, f"output.root={small_disk}")
    run = left(settings, "RUNNING")
    fill(small_disk)
    assert not reconcile(run, settings.output.root, None, told.append)
    assert not sync(run, settings.output.root, None, told.append)
    assert len(told) == 2
    assert all("cannot be written: no space left" in line for line in told)


def test_a_dead_run_whose_disk_is_read_only_is_told_with_a_line(
    small_disk: Path, settings: Settings, told: list[str], tmp_path: Path
) -> None:
    settings = settings_in(tmp_path, f"output.root={small_disk}")
    run = left(settings, "FAILED")
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert not sync(run, settings.output.root, None, told.append)
    write = f"{run.path / '.lock'} cannot be written: [Errno 30] Read-only file system"
    assert [line.partition("  ")[2][: len(write)] for line in told] == [write]


def test_a_run_of_another_machine_that_gave_a_sign_of_life_lives(settings: Settings, told: list[str]) -> None:
    run = left(settings, "RUNNING")
    from_elsewhere(run)
    with run_lock(run).held():
        pass  # what is left of it: its lock file, just touched
    assert is_alive(run, settings.output.root)
    assert reconcile(run, settings.output.root, None, told.append)
    assert read_status(run.path)["status"] == "RUNNING"


def test_a_run_of_this_machine_needs_more_than_a_fresh_file_to_live(settings: Settings) -> None:
    run = left(settings, "RUNNING")
    with run_lock(run).held():
        pass
    os.utime(run_lock(run).path)
    assert not is_alive(run, settings.output.root)


# runs that never had a directory


def unborn(settings: Settings, launch_id: str = "launch-1", **tags: str) -> str:
    """A run that the store made, and whose launch died before it noted it."""
    client = client_of(settings.tracking.uri)
    experiment = client.get_experiment_by_name(EXPERIMENT).experiment_id
    made = client.create_run(experiment, tags={LAUNCH_TAG: launch_id, ROOT_TAG: settings.output.root} | tags)
    intent = {"launch_id": launch_id, "timestamp": "20260101_120000", "since": time.time()}
    write_json(launch_record(settings.output.root, launch_id), intent)
    return str(made.info.run_id)


def status_of(settings: Settings, run_id: str) -> str:
    return str(client_of(settings.tracking.uri).get_run(run_id).info.status)


def test_a_run_that_died_before_it_had_a_directory_is_failed(settings: Settings, told: list[str]) -> None:
    run_id = unborn(settings)
    reconcile_unborn(settings.output.root, settings.tracking.uri, told.append)
    assert status_of(settings, run_id) == "FAILED"
    (line,) = told
    assert run_id[:8] in line
    reconcile_unborn(settings.output.root, settings.tracking.uri, told.append)
    assert len(told) == 1


def test_a_run_that_is_about_to_have_a_directory_is_left_alone(settings: Settings, told: list[str]) -> None:
    run_id = unborn(settings)
    with lock_holder(launch_lock(settings.output.root, "launch-1").path):
        reconcile_unborn(settings.output.root, settings.tracking.uri, told.append)
    assert (status_of(settings, run_id), told) == ("RUNNING", [])


def test_runs_with_a_directory_and_runs_of_others_are_left_alone(settings: Settings, told: list[str]) -> None:
    run = create(settings, "launch-2")
    theirs = unborn(settings, **{ROOT_TAG: "/elsewhere"})
    client = client_of(settings.tracking.uri)
    plain = client.create_run(client.get_experiment_by_name(EXPERIMENT).experiment_id).info.run_id
    ended = unborn(settings, "launch-3")
    client.set_terminated(ended, "KILLED")
    reconcile_unborn(settings.output.root, settings.tracking.uri, told.append)
    assert [status_of(settings, one) for one in (run.run_id, theirs, plain, ended)] == ["RUNNING", "RUNNING", "RUNNING", "KILLED"]
    assert told == []


def test_a_store_that_is_away_ends_the_search_for_unborn_runs_with_a_line(settings: Settings, told: list[str]) -> None:
    reconcile_unborn(settings.output.root, NOBODY, told.append)
    assert ["MLflow is away" in line for line in told] == [True]


# which runs, and where they are sent


def test_without_a_name_all_runs_are_looked_at_the_oldest_first(settings: Settings, tmp_path: Path) -> None:
    made = [left(settings, "FAILED", "launch-1"), left(settings, "FAILED", "launch-2", "alignment"), left(settings, None, "launch-3")]
    (Path(settings.output.root) / "phase2" / f"{'0' * 32}_20260101_120000").mkdir()  # of another version: it has no run.json
    found = runs_to_look_at(settings.output.root, [])
    assert sorted(found, key=lambda run: run.run_id) == sorted(made, key=lambda run: run.run_id)
    assert [run.timestamp for run in found] == sorted(run.timestamp for run in made)
    assert runs_to_look_at(str(tmp_path / "nowhere"), []) == []


def test_runs_are_named_by_id_its_start_or_directory(settings: Settings) -> None:
    first, second = left(settings, "FAILED", "launch-1"), left(settings, "FAILED", "launch-2", "alignment")
    names = [second.run_id, first.run_id[:12], first.directory]
    assert runs_to_look_at(settings.output.root, names) == [second, first, first]


def test_a_name_that_fits_no_run_is_bad_input(settings: Settings) -> None:
    left(settings, "FAILED")
    with pytest.raises(InputError, match="there is no such run"):
        runs_to_look_at(settings.output.root, ["nonsense"])


def test_a_given_uri_goes_before_the_recorded_one_and_a_masked_one_is_refused(settings: Settings) -> None:
    run = create(settings)
    assert tracking_uri(run, None) == settings.tracking.uri
    assert tracking_uri(run, NOBODY) == NOBODY
    masked = replace(run, tracking_uri="postgresql://me:***@db/mlflow")
    assert tracking_uri(masked, "postgresql://me:secret@db/mlflow") == "postgresql://me:secret@db/mlflow"
    with pytest.raises(InputError, match=r"password is not recorded"):
        tracking_uri(masked, None)


def test_a_store_that_does_not_exist_is_not_made_by_looking_at_it(tmp_path: Path, settings: Settings) -> None:
    assert not is_store(f"sqlite:///{tmp_path}/absent.db")
    assert is_store(settings.tracking.uri)
    assert is_store(NOBODY)
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
    assert "2 of 2 runs are whole in MLflow" in capsys.readouterr().out


def test_the_command_sends_each_run_where_it_was_sent_before(settings: Settings) -> None:
    run = left(settings, "FAILED")
    assert command(settings, "sync", run.run_id[:8]) == 0
    assert arrived(settings, run) == ("FAILED", 2)


def test_the_command_exits_with_1_while_mlflow_is_away_and_2_for_a_name_that_fits_nothing(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    left(settings, "FAILED")
    with away(settings):
        assert command(settings, "sync") == 1
    assert "0 of 1 runs are whole in MLflow" in capsys.readouterr().out
    assert command(settings, "sync", "nonsense") == 2
    assert "there is no such run" in capsys.readouterr().err


def test_a_trial_that_its_sweep_has_wait_is_alive(settings: Settings) -> None:
    sweep = create(settings, "sweep-1", SWEEPS)
    write_json(sweep.path / "run.json", asdict(sweep))
    trial = left(settings, "RUNNING", "sweep-1-000")
    add_tags(trial, {SWEEP_TAG: sweep.run_id})  # as a trial has it from its birth
    with lock_holder(launch_lock(settings.output.root, "sweep-1").path):
        assert is_alive(trial, settings.output.root)
        assert not is_alive(left(settings, "RUNNING", "launch-2"), settings.output.root), "another run"
    assert not is_alive(trial, settings.output.root), "dead with its sweep"
