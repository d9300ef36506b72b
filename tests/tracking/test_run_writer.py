"""The exclusive writer of a run directory: what it writes is on disk at once, and in a real SQLite store in the end."""

import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from raytrain2p.config import Settings, flatten, load_settings
from raytrain2p.runs.sync import sync
from raytrain2p.storage.errors import StorageError
from raytrain2p.storage.files import read_json, write_file, write_json
from raytrain2p.tracking import run_directory as run_directory_module
from raytrain2p.tracking import run_writer as writer_module
from raytrain2p.tracking.metrics_file import read_points
from raytrain2p.tracking.run import DIRECTORY_TAG, LAUNCH_TAG, ROOT_TAG, TIMESTAMP_TAG, Run
from raytrain2p.tracking.run_writer import (
    describe_run,
    end_run,
    end_unrecorded,
    input_changes,
    open_run_writer,
    resolved_config,
    send_rest,
    setting_changes,
    sole_writer,
)
from raytrain2p.tracking.source import version_tags
from tests.tracking.stores import NOBODY, away, create, elsewhere, fill, history, lock_holder, mlflow_run, points, settings_in


@pytest.fixture
def reported() -> list[str]:
    return []


def description(settings: Settings, **resolved: Any) -> dict[str, Any]:
    config = resolved_config(settings, {key.replace("__", "."): value for key, value in resolved.items()})
    return {"config": config, "command": "command", "facts": {"train_records": 3}}


def steps(run: Run, name: str = "train_loss") -> list[int]:
    return [point.step for point in read_points(run.path / "metrics.jsonl") if point.name == name]


def fail_after(run: Run, settings: Settings, reported: list[str], *steps: int) -> None:
    """Note these steps, and fail while the writer is open."""
    with open_run_writer(run, settings.tracking.uri, description(settings), reported.append) as writer:
        writer.write(points(*steps))
        raise ZeroDivisionError


# the only writer


def test_one_process_alone_writes_to_a_run_directory(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "SECONDS_TO_INHERIT", 0.0)
    run = create(settings)
    with lock_holder(run.path / ".lock") as process:
        with pytest.raises(RuntimeError, match=f"another process writes to {run.directory} .pid {process.pid} on "), sole_writer(run):
            pytest.fail("two processes write")
        process.kill()
        process.wait()
        with sole_writer(run):
            assert run.files.lock.is_held()
    assert not run.files.lock.is_held()


@pytest.mark.timeout(60)
def test_a_predecessor_that_is_about_to_end_is_waited_for(settings: Settings) -> None:
    run = create(settings)
    with lock_holder(run.path / ".lock") as process:
        threading.Timer(0.5, process.kill).start()
        with sole_writer(run):
            assert process.wait() != 0


def test_partial_files_of_a_killed_process_are_removed_by_the_next_writer(settings: Settings) -> None:
    run = create(settings)
    kept = [run.path / "config.json", run.checkpoints / "last.ckpt", run.path / ".mirror.json"]
    left = [run.path / ".config.json.aside-4711", run.checkpoints / ".last.ckpt.aside-4711", run.path / "plots" / ".a.png.aside-1"]
    (run.path / "plots").mkdir()
    for path in kept + left:
        path.write_bytes(b"{}")
    with sole_writer(run):
        assert [path for path in kept + left if path.exists()] == kept


def test_nothing_is_removed_while_another_process_writes(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "SECONDS_TO_INHERIT", 0.0)
    run = create(settings)
    (run.path / ".config.json.aside-4711").write_bytes(b"{}")
    with lock_holder(run.path / ".lock"), pytest.raises(RuntimeError), sole_writer(run):
        pytest.fail("two processes write")
    assert (run.path / ".config.json.aside-4711").exists()


# the description


def test_a_run_directory_describes_its_run(settings: Settings) -> None:
    run = create(settings)
    describe_run(run, resolved_config(settings, {}), "python -m raytrain2p.train --phase 2 seed=3", {"train_records": 60})
    lines = (run.path / "MLFLOW_RUN_ID.txt").read_text().splitlines()
    assert dict(line.split(": ", 1) for line in lines[:4]) == {
        "MLflow Run ID": run.run_id,
        "Checkpoint Dir": run.directory,
        "Experiment": run.experiment,
        "Timestamp": run.timestamp,
    }
    name, run_id, timestamp = lines[-3:]
    assert name.endswith(f" {run.path.name}")
    assert name.index(run.run_id) == run_id.index(run.run_id), "one stands below the other"
    assert name.index(run.timestamp) == timestamp.index(run.timestamp)
    noted = read_json(run.path / "run.json")
    assert Run.from_record(noted, run.files.record) == run
    assert noted["train_records"] == 60
    assert (
        noted["tags"]
        == {
            LAUNCH_TAG: "launch-1",
            DIRECTORY_TAG: run.directory,
            TIMESTAMP_TAG: run.timestamp,
            ROOT_TAG: settings.output.root,
            "raytrain2p.command": "python -m raytrain2p.train --phase 2 seed=3",
        }
        | version_tags()
    )
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
        ("phase2", ["model.pt", 'raytrain2p.predict --run {} --audio FILE "What\'s said?"\n', "raytrain2p.train --phase 2 --resume {}"]),
    ],
)
def test_the_readme_has_the_command_and_the_next_steps(settings: Settings, phase: str, lines: list[str]) -> None:
    run = create(settings, phase=phase)
    facts = {"use": ["--audio", "FILE", "What's said?"] if phase == "phase2" else []}
    describe_run(run, resolved_config(settings, {}), "python -m raytrain2p.train seed=3", facts)
    page = (run.path / "README.md").read_text()
    assert "\n    python -m raytrain2p.train seed=3\n" in page
    assert f"Use it, in `{run.path.parent.parent.parent}`:" in page, "where the commands find it without its root"
    assert run.run_id in page
    for line in lines:
        assert line.format(run.run_id[:8]) in page


def test_the_readme_holds_text_as_text(settings: Settings) -> None:
    run = replace(create(settings), experiment="`<img src=x>")
    describe_run(run, resolved_config(settings, {}), "python -m raytrain2p.train 'x=\n# heading\x1b[31m\n<script>'", {})
    page = (run.path / "README.md").read_text()
    assert "`` `<img src=x> ``" in page
    assert "\n    # heading\\x1b[31m\n    <script>'\n" in page


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
    for _ in range(2):  # workers that are restarted
        assert describe_run(run, resolved_config(settings, {}), "command", {}, launched=1.0) == []
    assert not (run.path / "changes.jsonl").exists()


def test_changed_settings_are_reported_and_kept_for_each_resume(settings: Settings) -> None:
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


def test_a_resumed_run_keeps_its_first_command_and_lists_each_resume(settings: Settings) -> None:
    run, launches = create(settings), ["first seed=3", "second --resume latest training.max_steps=65", "third --resume latest"]
    for number, command in enumerate(launches):
        for _ in range(2):  # the workers fail once, and are restarted
            resolved = {"training.max_steps": 65} if number else {}
            describe_run(run, resolved_config(settings, resolved), command, {}, launched=1_800_000_000.0 + 60 * number)
    rows = [json.loads(line) for line in run.files.changes.read_text().splitlines()]
    assert [(row["at"], row["command"]) for row in rows] == [(1_800_000_060.0, launches[1]), (1_800_000_120.0, launches[2])]
    assert [list(row["changes"]) for row in rows] == [["training.max_steps"], []]
    page = run.files.readme.read_text()
    assert (
        page.index("Trained with\n\n    first seed=3\n")
        < page.index("with\n\n    second --resume")
        < page.index("with\n\n    third --resume")
    )
    assert f"- `training.max_steps`: `{settings.training.max_steps}` -> `65`" in page
    assert page.count("Resumed at 2027-01-15") == 2
    assert run.files.tags()["raytrain2p.command"] == "first seed=3"
    assert run.files.tags()["raytrain2p.resumed"].startswith("2 times, the last at 2027-01-15")
    assert run.files.tags()["raytrain2p.resumed"].endswith(launches[2])


def test_the_history_of_an_earlier_version_is_kept_and_a_torn_line_of_it_is_left_out(settings: Settings) -> None:
    run = create(settings)
    describe_run(run, resolved_config(settings, {}), "first", {})
    run.files.write_record({key: value for key, value in (run.files.read_record() or {}).items() if key != "launched"})
    run.files.changes.write_text('{"at": 1.0, "changes": {"launch.num_workers": [2, 1]}}\n{"at": 2.0, "cha')
    describe_run(run, resolved_config(settings, {}), "second", {})
    assert [(row["command"], row["changes"]) for row in run.files.read_changes()] == [("", {"launch.num_workers": [2, 1]}), ("second", {})]


def test_changed_content_of_an_input_is_named_by_its_parts() -> None:
    before = {"train_records": 3, "train_digest": "a", "inputs": {"model": {"w": "1", "gone": "2"}, "old=1": {"x": "1"}}}
    now = {"train_records": 3, "train_digest": "b", "inputs": {"model": {"w": "2", "new": "3"}, "old=2": {"x": "2"}}}
    assert input_changes(before, before) == {}
    assert input_changes(before, now) == {"data.train": ["records"], "model": ["w", "gone", "new"]}
    assert input_changes({"train_records": 3}, now) == {}, "an earlier version recorded no digests"


def test_new_and_removed_settings_are_changes() -> None:
    before = {"a": {"same": 1, "gone": 2}, "whole": {"b": 3}}
    after = {"a": {"same": 1, "new": 4}, "whole": None}
    assert setting_changes(before, after) == {"a.gone": (2, None), "a.new": (None, 4), "whole": ({"b": 3}, None)}


# metrics, and the end of a run


def test_metrics_are_on_disk_at_once_and_in_mlflow_in_the_end(settings: Settings, reported: list[str]) -> None:
    run = create(settings)
    with open_run_writer(run, settings.tracking.uri, description(settings), reported.append) as writer:
        assert run.files.read_status()["status"] == "RUNNING"
        writer.write(points(1, 2))
        writer.write_metrics({"val/loss": 0.5}, 2)
        assert (steps(run), steps(run, "val/loss")) == ([1, 2], [2])
        assert writer.finish("FINISHED")
    assert len(history(settings, run)) == 2
    assert history(settings, run, "val/loss") == [(2, 0.5)]
    assert mlflow_run(settings, run).info.status == "FINISHED"
    assert read_json(run.path / "run.json")["train_records"] == 3
    assert reported == []


def test_an_open_writer_holds_the_lock(settings: Settings, reported: list[str]) -> None:
    run = create(settings)
    with open_run_writer(run, settings.tracking.uri, description(settings), reported.append):
        assert run.files.lock.is_held()
    assert not run.files.lock.is_held()


def test_an_error_releases_the_directory_sends_the_metrics_and_leaves_the_run_running(settings: Settings, reported: list[str]) -> None:
    run = create(settings)
    with pytest.raises(ZeroDivisionError):
        fail_after(run, settings, reported, 1, 2)
    assert not run.files.lock.is_held()
    assert len(history(settings, run)) == 2
    assert mlflow_run(settings, run).info.status == "RUNNING"  # Ray may start it again


def test_a_resumed_run_writes_and_sends_each_step_once(settings: Settings, reported: list[str]) -> None:
    run = create(settings)
    with pytest.raises(ZeroDivisionError):
        fail_after(run, settings, reported, 1, 2, 3, 4)
    with (run.path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 5, "na')
    with open_run_writer(run, settings.tracking.uri, description(settings), reported.append) as writer:
        writer.resume_from(2)
        writer.write(points(3, 4, 5))
        assert writer.finish("FINISHED")
    assert steps(run) == [1, 2, 3, 4, 5]
    assert [step for step, _ in history(settings, run)] == [1, 2, 3, 4, 5]
    assert mlflow_run(settings, run).info.status == "FINISHED"


def test_changed_settings_are_reported_before_the_run_resumes(settings: Settings, reported: list[str]) -> None:
    run = create(settings)
    for workers in (1, 2):
        with open_run_writer(run, settings.tracking.uri, description(settings, launch__num_workers=workers), reported.append) as writer:
            writer.finish("FINISHED")
    assert reported == ["changed since the run began: launch.num_workers: 1 -> 2"]
    assert mlflow_run(settings, run).data.tags["raytrain2p.changed.launch.num_workers"] == "2"


@pytest.mark.timeout(120)
def test_training_needs_no_mlflow(settings: Settings, reported: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "SECONDS_TO_SEND", 0.0)
    run = create(settings)
    with open_run_writer(run, NOBODY, description(settings), reported.append) as writer:
        writer.write(points(1, 2))
        assert not writer.finish("FINISHED")
    assert steps(run) == [1, 2]
    assert run.files.read_status()["status"] == "FINISHED"
    (line,) = reported
    assert "training continues" in line


def test_a_full_disk_is_reported_with_the_path_and_written_points_stay(
    small_disk: Path, settings: Settings, reported: list[str], tmp_path: Path
) -> None:
    settings = settings_in(tmp_path, f"output.root={small_disk}")
    run = create(settings)
    filler = small_disk / "somebody elses"
    with open_run_writer(run, settings.tracking.uri, description(settings), reported.append) as writer:
        writer.write(points(1))
        filler.write_bytes(bytes(940_000))
        with pytest.raises(StorageError) as caught:
            writer.write(points(*range(2, 3000)))
        filler.unlink()
    assert str(caught.value).startswith(f"{run.path / 'metrics.jsonl'} cannot be written: no space left; needed 0.6 MB, free ")
    assert steps(run)[0] == 1


def test_a_disk_that_is_full_from_the_start_is_reported(small_disk: Path, settings: Settings, reported: list[str], tmp_path: Path) -> None:
    settings = settings_in(tmp_path, f"output.root={small_disk}")
    run = create(settings)
    with run.files.lock.held():
        pass  # the lock file has its room already
    fill(small_disk)
    with (
        pytest.raises(StorageError, match=r"config\.json cannot be written: no space left"),
        open_run_writer(run, settings.tracking.uri, description(settings), reported.append),
    ):
        pytest.fail("it was recorded")
    assert not run.files.lock.is_held()


@pytest.mark.parametrize("status", ["FAILED", "KILLED"])
def test_the_end_of_a_run_whose_workers_are_gone_is_on_disk_and_in_mlflow(settings: Settings, status: str) -> None:
    run = create(settings)
    assert end_run(run, settings.tracking.uri, status)
    assert run.files.read_status()["status"] == status
    assert mlflow_run(settings, run).info.status == status


def test_a_finished_run_stays_finished(settings: Settings) -> None:
    run = create(settings)
    run.files.write_status("FINISHED")
    assert end_run(run, settings.tracking.uri, "FAILED")
    assert run.files.read_status()["status"] == "FINISHED"
    assert mlflow_run(settings, run).info.status == "FINISHED"


def test_the_end_of_a_run_is_on_disk_while_mlflow_is_away(settings: Settings) -> None:
    run = create(settings)
    with away(settings):
        assert not end_run(run, settings.tracking.uri, "FAILED")
    assert not end_run(run, NOBODY, "FAILED")
    assert run.files.read_status()["status"] == "FAILED"


def test_a_status_that_a_killed_process_did_not_send_is_sent(settings: Settings) -> None:
    run = create(settings)
    run.files.write_status("FINISHED")
    with away(settings):
        assert not send_rest(run, settings.tracking.uri)
    assert mlflow_run(settings, run).info.status == "RUNNING"
    assert send_rest(run, settings.tracking.uri)
    assert mlflow_run(settings, run).info.status == "FINISHED"


def test_the_end_of_a_run_whose_disk_is_full_is_sent_to_mlflow(small_disk: Path, settings: Settings, tmp_path: Path) -> None:
    settings = settings_in(tmp_path, f"output.root={small_disk}")
    run = create(settings)
    fill(small_disk)
    assert end_run(run, settings.tracking.uri, "FAILED")
    assert mlflow_run(settings, run).info.status == "FAILED"
    assert run.files.read_status()["status"] == "RUNNING"


def test_a_finished_run_whose_disk_is_full_is_finished_in_mlflow(small_disk: Path, settings: Settings, tmp_path: Path) -> None:
    settings = settings_in(tmp_path, f"output.root={small_disk}")
    run = create(settings)
    run.files.write_status("FINISHED")
    fill(small_disk)
    assert end_run(run, settings.tracking.uri, "FAILED")
    assert mlflow_run(settings, run).info.status == "FINISHED"


def test_the_end_of_a_run_whose_disk_is_gone_is_sent_to_mlflow(settings: Settings) -> None:
    run, other = create(settings), create(settings, launch_id="launch-2")
    end_unrecorded(settings.tracking.uri, settings.output.root, run.launch_id, "FAILED")
    assert mlflow_run(settings, run).info.status == "FAILED"
    assert mlflow_run(settings, other).info.status == "RUNNING"


@pytest.mark.parametrize(
    "overrides",
    [
        ["tracking.uri=http://server:5000", "tracking.experiment=me@lab"],
        ['model.system_prompt="say token=abcd\\"x"'],
        ["model.system_prompt='the secret: giraffes'"],
    ],
)
def test_settings_without_a_password_are_recorded_unchanged(tmp_path: Path, overrides: list[str]) -> None:
    settings = load_settings(2, None, [f"output.root={tmp_path}", *overrides])
    assert resolved_config(settings, {}) == settings.model_dump(mode="json")


@pytest.mark.parametrize("dies_at", ["MLFLOW_RUN_ID.txt", "README.md", "run.json"])
def test_a_run_that_was_killed_while_it_was_described_can_be_sent(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, dies_at: str
) -> None:
    run = create(settings)

    def die(path: Path, content: Any) -> None:
        if path.name == dies_at:
            raise KeyboardInterrupt
        (write_file if isinstance(content, str) else write_json)(path, content)

    with monkeypatch.context() as patch:
        for module in (run_directory_module, writer_module):
            patch.setattr(module, "write_file", die)
        patch.setattr(run_directory_module, "write_json", die)
        with pytest.raises(KeyboardInterrupt):
            describe_run(run, resolved_config(settings, {}), "command", {})
    assert end_run(run, settings.tracking.uri, "FAILED")
    assert sync(run, settings.output.root, None, lambda line: None)


def test_training_needs_no_database(settings: Settings, tmp_path: Path) -> None:
    run = create(settings)
    (tmp_path / "broken.db").write_bytes(b"no database" * 1000)
    description = {"config": resolved_config(settings, {}), "command": "command", "facts": {}}
    with open_run_writer(run, f"sqlite:///{tmp_path}/broken.db", description, lambda line: None) as writer:
        assert not writer.mlflow_sync.close(0)


def test_a_disk_that_is_full_before_the_lock_is_reported(small_disk: Path, settings: Settings, tmp_path: Path) -> None:
    settings = settings_in(tmp_path, f"output.root={small_disk}")
    run = create(settings)
    fill(small_disk)
    description = {"config": resolved_config(settings, {}), "command": "command", "facts": {}}
    with pytest.raises(StorageError), open_run_writer(run, settings.tracking.uri, description, lambda line: None):
        pass


def test_a_lock_can_be_checked_on_a_full_disk(small_disk: Path, settings: Settings, tmp_path: Path) -> None:
    settings = settings_in(tmp_path, f"output.root={small_disk}")
    run = create(settings)
    run.files.lock.path.touch()
    fill(small_disk)
    assert not run.files.lock.is_held()
