"""Rank 0's hand on the run directory: what it notes is on disk at once, and in a real SQLite store in the end."""

from pathlib import Path
from typing import Any

import pytest

from raytrain2p.config import Settings
from raytrain2p.storage.errors import StorageError
from raytrain2p.storage.files import read_json
from raytrain2p.tracking import run_writer as writer_module
from raytrain2p.tracking.metrics_file import read_points
from raytrain2p.tracking.run import Run, read_status, resolved_config, run_lock, write_status
from raytrain2p.tracking.run_writer import end_run, end_unrecorded, open_run_writer, send_rest
from tests.tracking.stores import NOBODY, away, create, fill, history, mlflow_run, points, settings_in


@pytest.fixture
def told() -> list[str]:
    return []


def description(settings: Settings, **resolved: Any) -> dict[str, Any]:
    config = resolved_config(settings, {key.replace("__", "."): value for key, value in resolved.items()})
    return {"config": config, "command": "command", "facts": {"train_records": 3}}


def steps(run: Run, name: str = "train_loss") -> list[int]:
    return [point.step for point in read_points(run.path / "metrics.jsonl") if point.name == name]


def fail_after(run: Run, settings: Settings, told: list[str], *steps: int) -> None:
    """Note these steps, and fail while the writer is open."""
    with open_run_writer(run, settings.tracking.uri, description(settings), told.append) as writer:
        writer.write(points(*steps))
        raise ZeroDivisionError


def test_what_is_recorded_is_on_disk_at_once_and_in_mlflow_in_the_end(settings: Settings, told: list[str]) -> None:
    run = create(settings)
    with open_run_writer(run, settings.tracking.uri, description(settings), told.append) as writer:
        assert read_status(run.path)["status"] == "RUNNING"
        writer.write(points(1, 2))
        writer.write_metrics({"val/loss": 0.5}, 2)
        assert (steps(run), steps(run, "val/loss")) == ([1, 2], [2])
        assert writer.finish("FINISHED")
    assert len(history(settings, run)) == 2
    assert history(settings, run, "val/loss") == [(2, 0.5)]
    assert mlflow_run(settings, run).info.status == "FINISHED"
    assert read_json(run.path / "run.json")["train_records"] == 3
    assert told == []


def test_while_one_records_nobody_else_may(settings: Settings, told: list[str]) -> None:
    run = create(settings)
    with open_run_writer(run, settings.tracking.uri, description(settings), told.append):
        assert run_lock(run).is_held()
    assert not run_lock(run).is_held()


def test_an_error_lets_go_of_the_directory_sends_what_there_is_and_leaves_the_run_running(settings: Settings, told: list[str]) -> None:
    run = create(settings)
    with pytest.raises(ZeroDivisionError):
        fail_after(run, settings, told, 1, 2)
    assert not run_lock(run).is_held()
    assert len(history(settings, run)) == 2
    assert mlflow_run(settings, run).info.status == "RUNNING"  # Ray may start it again


def test_a_run_that_goes_on_notes_and_sends_its_steps_once(settings: Settings, told: list[str]) -> None:
    run = create(settings)
    with pytest.raises(ZeroDivisionError):
        fail_after(run, settings, told, 1, 2, 3, 4)
    with (run.path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 5, "na')
    with open_run_writer(run, settings.tracking.uri, description(settings), told.append) as writer:
        writer.resume_from(2)
        writer.write(points(3, 4, 5))
        assert writer.finish("FINISHED")
    assert steps(run) == [1, 2, 3, 4, 5]
    assert [step for step, _ in history(settings, run)] == [1, 2, 3, 4, 5]
    assert mlflow_run(settings, run).info.status == "FINISHED"


def test_what_changed_since_the_run_began_is_told_before_it_goes_on(settings: Settings, told: list[str]) -> None:
    run = create(settings)
    for workers in (1, 2):
        with open_run_writer(run, settings.tracking.uri, description(settings, launch__num_workers=workers), told.append) as writer:
            writer.finish("FINISHED")
    assert told == ["changed since the run began: launch.num_workers: 1 -> 2"]
    assert mlflow_run(settings, run).data.tags["raytrain2p.changed.launch.num_workers"] == "2"


@pytest.mark.timeout(120)
def test_training_needs_no_mlflow(settings: Settings, told: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "SECONDS_TO_SEND", 0.0)
    run = create(settings)
    with open_run_writer(run, NOBODY, description(settings), told.append) as writer:
        writer.write(points(1, 2))
        assert not writer.finish("FINISHED")
    assert steps(run) == [1, 2]
    assert read_status(run.path)["status"] == "FINISHED"
    (line,) = told
    assert "training goes on" in line


def test_a_full_disk_is_told_with_the_path_and_what_was_noted_stays(
    small_disk: Path, settings: Settings, told: list[str], tmp_path: Path
) -> None:
    settings = settings_in(tmp_path, f"output.root={small_disk}")
    run = create(settings)
    filler = small_disk / "somebody elses"
    with open_run_writer(run, settings.tracking.uri, description(settings), told.append) as writer:
        writer.write(points(1))
        filler.write_bytes(bytes(940_000))
        with pytest.raises(StorageError) as caught:
            writer.write(points(*range(2, 3000)))
        filler.unlink()
    assert str(caught.value).startswith(f"{run.path / 'metrics.jsonl'} cannot be written: no space left; needed 0.6 MB, free ")
    assert steps(run)[0] == 1


def test_a_disk_that_is_full_from_the_start_is_told_as_such(small_disk: Path, settings: Settings, told: list[str], tmp_path: Path) -> None:
    settings = settings_in(tmp_path, f"output.root={small_disk}")
    run = create(settings)
    with run_lock(run).held():
        pass  # the lock file has its room already
    fill(small_disk)
    with (
        pytest.raises(StorageError, match=r"config\.json cannot be written: no space left"),
        open_run_writer(run, settings.tracking.uri, description(settings), told.append),
    ):
        pytest.fail("it was recorded")
    assert not run_lock(run).is_held()


@pytest.mark.parametrize("status", ["FAILED", "KILLED"])
def test_the_end_of_a_run_whose_workers_are_gone_is_on_disk_and_in_mlflow(settings: Settings, status: str) -> None:
    run = create(settings)
    assert end_run(run, settings.tracking.uri, status)
    assert read_status(run.path)["status"] == status
    assert mlflow_run(settings, run).info.status == status


def test_a_run_that_has_finished_stays_so_whatever_dies_afterwards(settings: Settings) -> None:
    run = create(settings)
    write_status(run.path, "FINISHED")
    assert end_run(run, settings.tracking.uri, "FAILED")
    assert read_status(run.path)["status"] == "FINISHED"
    assert mlflow_run(settings, run).info.status == "FINISHED"


def test_the_end_of_a_run_is_on_disk_though_mlflow_is_away(settings: Settings) -> None:
    run = create(settings)
    with away(settings):
        assert not end_run(run, settings.tracking.uri, "FAILED")
    assert not end_run(run, NOBODY, "FAILED")
    assert read_status(run.path)["status"] == "FAILED"


def test_an_end_that_a_process_noted_and_could_not_send_before_it_died_is_sent(settings: Settings) -> None:
    run = create(settings)
    write_status(run.path, "FINISHED")
    with away(settings):
        assert not send_rest(run, settings.tracking.uri)
    assert mlflow_run(settings, run).info.status == "RUNNING"
    assert send_rest(run, settings.tracking.uri)
    assert mlflow_run(settings, run).info.status == "FINISHED"


def test_mlflow_knows_the_end_of_a_run_whose_disk_is_full(small_disk: Path, settings: Settings, tmp_path: Path) -> None:
    settings = settings_in(tmp_path, f"output.root={small_disk}")
    run = create(settings)
    fill(small_disk)
    assert end_run(run, settings.tracking.uri, "FAILED")
    assert mlflow_run(settings, run).info.status == "FAILED"
    assert read_status(run.path)["status"] == "RUNNING"


def test_a_run_that_has_finished_is_so_in_mlflow_though_its_disk_is_full(small_disk: Path, settings: Settings, tmp_path: Path) -> None:
    settings = settings_in(tmp_path, f"output.root={small_disk}")
    run = create(settings)
    write_status(run.path, "FINISHED")
    fill(small_disk)
    assert end_run(run, settings.tracking.uri, "FAILED")
    assert mlflow_run(settings, run).info.status == "FINISHED"


def test_mlflow_knows_the_end_of_a_run_whose_disk_is_gone(settings: Settings) -> None:
    run, other = create(settings), create(settings, launch_id="launch-2")
    end_unrecorded(settings.tracking.uri, run.launch_id, "FAILED")
    assert mlflow_run(settings, run).info.status == "FAILED"
    assert mlflow_run(settings, other).info.status == "RUNNING"
