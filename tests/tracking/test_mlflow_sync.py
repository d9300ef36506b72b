"""A run directory is sent to a real SQLite store and to real plain files: everything arrives, and each point once."""

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow.exceptions import MlflowException

from raytrain2p.config import Settings, flatten_tree
from raytrain2p.runs.sync import sync
from raytrain2p.storage.files import read_json, write_json
from raytrain2p.tracking import mlflow_sync as sync_module
from raytrain2p.tracking.metrics_file import MetricPoint, MetricsFile
from raytrain2p.tracking.mlflow_store import STORE_ERRORS, client_of
from raytrain2p.tracking.mlflow_sync import PARAM_LENGTH, POINTS_PER_BATCH, MlflowSync, MlflowSyncThread, RunDirectoryError
from raytrain2p.tracking.run import Run
from raytrain2p.tracking.run_writer import describe_run, resolved_config, sole_writer
from tests.tracking.stores import NOBODY, away, begin, create, fill, history, mlflow_run, note, points, settings_in
from tests.waiting import until


def sync_of(settings: Settings, run: Run) -> MlflowSync:
    return MlflowSync(run, settings.tracking.uri)


def describe(run: Run, settings: Settings, command: str = "python -m raytrain2p.train --phase 2") -> dict[str, Any]:
    config = resolved_config(settings, {})
    describe_run(run, config, command, {"train_records": 3})
    return config


def values(*steps: int) -> list[tuple[int, float]]:
    """What `history` says once the `points` of these steps have arrived."""
    return [(point.step, point.value) for point in points(*steps)]


def artifacts(settings: Settings, run: Run, folder: str | None = None) -> list[str]:
    """Paths of all files among the run's artifacts."""
    client = client_of(settings.tracking.uri)
    found = client.list_artifacts(run.run_id, folder)
    return sorted(path for entry in found for path in (artifacts(settings, run, entry.path) if entry.is_dir else [entry.path]))


# points


def test_every_point_arrives_once_however_often_it_is_sent(each_store: Settings) -> None:
    run = create(each_store)
    note(run, 1, 2, 3)
    mlflow_sync = sync_of(each_store, run)
    mlflow_sync.send()
    mlflow_sync.send()
    note(run, 4, 5)
    mlflow_sync.send()
    sync_of(each_store, run).send()
    assert history(each_store, run) == values(1, 2, 3, 4, 5)


def test_points_of_all_names_arrive_with_their_time(each_store: Settings) -> None:
    run = create(each_store)
    MetricsFile(run.path / "metrics.jsonl").append([MetricPoint("val/loss", 0.25, 7, 1_700_000_000.1234), *points(7, name="learning_rate")])
    sync_of(each_store, run).send()
    (point,) = client_of(each_store.tracking.uri).get_metric_history(run.run_id, "val/loss")
    assert (point.step, point.value, point.timestamp) == (7, 0.25, 1_700_000_000_123)
    assert history(each_store, run, "learning_rate") == values(7)


def test_more_points_than_one_request_takes_all_arrive_in_one_call(each_store: Settings) -> None:
    run = create(each_store)
    steps = range(1, POINTS_PER_BATCH + 2)
    note(run, *steps)
    sync_of(each_store, run).send()
    assert history(each_store, run) == values(*steps)


def test_nan_is_sent_once(each_store: Settings) -> None:
    run = create(each_store)
    MetricsFile(run.path / "metrics.jsonl").append(
        [MetricPoint("train_loss", math.nan, 1, 1.0), MetricPoint("train_loss", math.nan, 2, 2.0)]
    )
    mlflow_sync = sync_of(each_store, run)
    mlflow_sync.send()
    write_json(mlflow_sync.state_path, mlflow_sync.state | {"sent": 0, "sending": mlflow_sync.state["sent"]})
    sync_of(each_store, run).send()
    assert [(step, math.isnan(value)) for step, value in history(each_store, run)] == [(1, True), (2, True)]


def test_a_line_that_is_still_being_written_is_sent_when_it_is_complete(each_store: Settings) -> None:
    run = create(each_store)
    note(run, 1)
    whole = (run.path / "metrics.jsonl").read_bytes()
    note(run, 2)
    both = (run.path / "metrics.jsonl").read_bytes()
    (run.path / "metrics.jsonl").write_bytes(both[:-5])
    mlflow_sync = sync_of(each_store, run)
    mlflow_sync.send()
    assert history(each_store, run) == values(1)
    assert mlflow_sync.state["sent"] == len(whole)
    (run.path / "metrics.jsonl").write_bytes(both)
    mlflow_sync.send()
    assert history(each_store, run) == values(1, 2)


@pytest.mark.parametrize("arrived", [0, 3, 5], ids=["nothing", "a part", "all"])
def test_a_kill_in_the_middle_of_a_batch_leaves_each_point_once(
    each_store: Settings, monkeypatch: pytest.MonkeyPatch, arrived: int
) -> None:
    run = create(each_store)
    note(run, 1, 2)
    sync_of(each_store, run).send()
    note(run, 3, 4, 5, 6, 7)
    whole = mlflow.MlflowClient.log_batch

    def die(client: mlflow.MlflowClient, run_id: str, metrics: list[Any]) -> None:
        if arrived:
            whole(client, run_id, metrics=metrics[:arrived])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(mlflow.MlflowClient, "log_batch", die)
        with pytest.raises(KeyboardInterrupt):
            sync_of(each_store, run).send()
    assert history(each_store, run) == values(*range(1, 3 + arrived))
    note(run, 8, 9)  # the next one trains on before it sends
    successor = sync_of(each_store, run)
    assert successor.state["sending"] is not None
    successor.send()
    assert history(each_store, run) == values(*range(1, 10))
    assert successor.state["sending"] is None


def test_a_kill_between_two_batches_leaves_each_point_once(each_store: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    run = create(each_store)
    monkeypatch.setattr(sync_module, "POINTS_PER_BATCH", 2)
    note(run, *range(1, 8))
    whole, batches = mlflow.MlflowClient.log_batch, []

    def die(client: mlflow.MlflowClient, run_id: str, metrics: list[Any]) -> None:
        batches.append(len(metrics))
        whole(client, run_id, metrics=metrics)
        if len(batches) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(mlflow.MlflowClient, "log_batch", die)
        with pytest.raises(KeyboardInterrupt):
            sync_of(each_store, run).send()
    sync_of(each_store, run).send()
    assert batches == [2, 2]
    assert history(each_store, run) == values(*range(1, 8))


def test_a_request_whose_answer_is_lost_leaves_each_point_once(each_store: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    run = create(each_store)
    note(run, 1, 2)
    mlflow_sync = sync_of(each_store, run)
    whole = mlflow.MlflowClient.log_batch

    def lose(client: mlflow.MlflowClient, run_id: str, metrics: list[Any]) -> None:
        whole(client, run_id, metrics=metrics)
        raise MlflowException("API request failed: timed out")

    with monkeypatch.context() as patch:
        patch.setattr(mlflow.MlflowClient, "log_batch", lose)
        with pytest.raises(STORE_ERRORS):
            mlflow_sync.send()
    note(run, 3)
    mlflow_sync.send()
    assert history(each_store, run) == values(1, 2, 3)


def test_a_request_that_fails_is_sent_again(settings: Settings) -> None:
    run = create(settings)
    mlflow_sync = sync_of(settings, run)
    note(run, 1, 2)
    with away(settings), pytest.raises(STORE_ERRORS):
        mlflow_sync.send()
    mlflow_sync.send()
    assert history(settings, run) == values(1, 2)


# what the run is


def test_every_setting_is_a_parameter_under_its_dotted_path(each_store: Settings) -> None:
    run = create(each_store)
    config = describe(run, each_store)
    sync_of(each_store, run).send()
    found = mlflow_run(each_store, run).data.params
    assert found == {key: str(value) for key, value in flatten_tree(config).items()}
    assert found["model.lora.rank"] == "16"
    assert found["data.train"] == "emoji:train"


def test_a_value_that_is_too_long_for_mlflow_is_cut_and_does_not_count_as_a_change(each_store: Settings) -> None:
    run = create(each_store)
    config = resolved_config(each_store, {"model.system_prompt": "long " * 2000})
    for _ in range(2):
        describe_run(run, config, "command", {})
        sync_of(each_store, run).send()
    data = mlflow_run(each_store, run).data
    assert data.params["model.system_prompt"] == ("long " * 2000)[:PARAM_LENGTH]
    assert not any(key.startswith("raytrain2p.changed.") for key in data.tags)


def test_tags_and_the_config_file_are_sent_with_the_parameters(each_store: Settings) -> None:
    run = create(each_store)
    describe(run, each_store, "python -m raytrain2p.train --phase 2 seed=3")
    sync_of(each_store, run).send()
    tags = mlflow_run(each_store, run).data.tags
    assert tags["raytrain2p.command"] == "python -m raytrain2p.train --phase 2 seed=3"
    assert tags["raytrain2p.directory"] == run.directory
    assert artifacts(each_store, run) == ["config/config.json"]
    sent = Path(client_of(each_store.tracking.uri).download_artifacts(run.run_id, "config/config.json"))
    assert sent.read_bytes() == (run.path / "config.json").read_bytes()


def test_no_password_reaches_mlflow(settings: Settings) -> None:
    run = create(settings)
    secret = settings.model_copy(update={"tracking": settings.tracking.model_copy(update={"uri": "postgresql://me:hunter2@db/mlflow"})})
    describe(run, secret, "python -m raytrain2p.train tracking.uri=postgresql://me:hunter2@db/mlflow")
    sync_of(settings, run).send()
    data = mlflow_run(settings, run).data
    assert data.params["tracking.uri"] == "postgresql://me:***@db/mlflow"
    assert data.tags["raytrain2p.command"].endswith("postgresql://me:***@db/mlflow")
    assert "hunter2" not in json.dumps(data.to_dictionary())


def test_a_setting_that_a_resumed_run_changed_is_a_tag_beside_its_parameter(each_store: Settings) -> None:
    run = create(each_store)
    describe(run, each_store)
    sync_of(each_store, run).send()
    config = resolved_config(each_store, {"training.global_batch_size": 7, "launch.num_workers": 3})
    describe_run(run, config, "command", {})
    sync_of(each_store, run).send()
    data = mlflow_run(each_store, run).data
    assert data.params["training.global_batch_size"] == str(each_store.training.global_batch_size)
    changed = {key: value for key, value in data.tags.items() if key.startswith("raytrain2p.changed.")}
    assert changed == {"raytrain2p.changed.training.global_batch_size": "7", "raytrain2p.changed.launch.num_workers": "3"}
    assert data.tags["raytrain2p.command"] == "python -m raytrain2p.train --phase 2", "the first one"
    assert data.tags["raytrain2p.resumed"].endswith(": command")


def test_a_setting_that_was_changed_back_or_removed_is_shown_as_it_is_now(each_store: Settings) -> None:
    run = create(each_store)
    for steps, splits in ((60, ["b.jsonl"]), (65, []), (60, [])):
        config = resolved_config(each_store, {"training.max_steps": steps, "data.test": {"b": splits} if splits else {}})
        describe_run(run, config, "command", {})
        sync_of(each_store, run).send()
    data = mlflow_run(each_store, run).data
    assert data.params["training.max_steps"] == data.tags["raytrain2p.changed.training.max_steps"] == "60"
    assert data.params["data.test.b"] == "['b.jsonl']"
    assert data.tags["raytrain2p.changed.data.test.b"] == "not set"


def test_after_a_kill_between_the_parameters_and_the_tags_both_are_complete(each_store: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    run = create(each_store)
    config = describe(run, each_store)
    whole = mlflow.MlflowClient.log_batch

    def die(client: mlflow.MlflowClient, run_id: str, params: list[Any]) -> None:
        whole(client, run_id, params=params[: len(params) // 2])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(mlflow.MlflowClient, "log_batch", die)
        with pytest.raises(KeyboardInterrupt):
            sync_of(each_store, run).send()
    sync_of(each_store, run).send()
    data = mlflow_run(each_store, run).data
    assert len(data.params) == len(flatten_tree(config))
    assert "raytrain2p.command" in data.tags
    assert not any(key.startswith("raytrain2p.changed.") for key in data.tags)


def test_the_points_of_a_run_that_is_not_described_yet_are_sent(each_store: Settings) -> None:
    run = create(each_store)
    note(run, 1)
    sync_of(each_store, run).send()
    assert history(each_store, run) == values(1)
    assert mlflow_run(each_store, run).data.params == {}


# how it ends


@pytest.mark.parametrize("status", ["FINISHED", "FAILED", "KILLED"])
def test_the_status_on_disk_is_sent(each_store: Settings, status: str) -> None:
    run = create(each_store)
    mlflow_sync = sync_of(each_store, run)
    for step in (status, "RUNNING", status):
        run.files.write_status(step)
        mlflow_sync.send()
        assert mlflow_run(each_store, run).info.status == step
    at = read_json(run.path / "status.json")["at"]
    assert mlflow_run(each_store, run).info.end_time == round(at * 1000)


def test_a_run_that_was_ended_in_mlflow_is_running_when_it_is_resumed(each_store: Settings) -> None:
    run = create(each_store)
    client_of(each_store.tracking.uri).set_terminated(run.run_id, "FAILED")
    run.files.write_status("RUNNING")
    sync_of(each_store, run).send()
    assert mlflow_run(each_store, run).info.status == "RUNNING"


def test_results_are_sent_when_the_run_has_ended_and_checkpoints_never(each_store: Settings) -> None:
    run = create(each_store)
    (run.path / "plots").mkdir()
    files = {"model.pt": b"weights", "plots/training_curve.png": b"image", "answers.jsonl": b"{}\n"}
    for name, content in files.items():
        (run.path / name).write_bytes(content)
    (run.checkpoints / "last.ckpt").write_bytes(b"checkpoint")
    run.files.write_status("RUNNING")
    mlflow_sync = sync_of(each_store, run)
    mlflow_sync.send()
    assert artifacts(each_store, run) == []
    run.files.write_status("FINISHED")
    mlflow_sync.send()
    sent = {"model/model.pt": b"weights", "plots/training_curve.png": b"image", "answers.jsonl": b"{}\n"}
    assert artifacts(each_store, run) == sorted(sent)
    client = client_of(each_store.tracking.uri)
    assert {path: Path(client.download_artifacts(run.run_id, path)).read_bytes() for path in sent} == sent


def test_a_run_is_complete_once_it_has_ended_and_everything_was_sent(each_store: Settings) -> None:
    run = create(each_store)
    mlflow_sync = sync_of(each_store, run)
    note(run, 1)
    mlflow_sync.send()
    assert not mlflow_sync.complete()  # it is RUNNING
    run.files.write_status("FINISHED")
    assert not mlflow_sync.complete()
    mlflow_sync.send()
    assert mlflow_sync.complete()
    assert sync_of(each_store, run).complete()
    note(run, 2)
    assert not mlflow_sync.complete()
    mlflow_sync.send()
    run.files.write_status("FAILED")
    assert not mlflow_sync.complete()


def test_a_run_with_an_incomplete_last_line_is_complete_without_it(settings: Settings) -> None:
    run = create(settings)
    mlflow_sync = sync_of(settings, run)
    note(run, 1)
    with (run.path / "metrics.jsonl").open("ab") as stream:
        stream.write(b'{"step": 2, "na')
    run.files.write_status("FAILED")
    mlflow_sync.send()
    assert mlflow_sync.complete()
    assert history(settings, run) == values(1)


def test_a_run_whose_metrics_file_has_lost_sent_points_is_not_complete(settings: Settings) -> None:
    run = create(settings)
    mlflow_sync = sync_of(settings, run)
    note(run, 1, 2)
    run.files.write_status("FAILED")
    mlflow_sync.send()
    assert mlflow_sync.complete()
    (run.path / "metrics.jsonl").write_bytes(b"")
    assert not mlflow_sync.complete()


# while training continues


class Counted(MlflowSync):
    """Counts how often it has tried."""

    tries = 0

    def send(self) -> None:
        self.tries += 1
        super().send()


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that send do not wait for seconds."""
    monkeypatch.setattr(sync_module, "SEND_SECONDS", 0.02)
    monkeypatch.setattr(sync_module, "LONGEST_WAIT", 0.05)


@pytest.fixture
def reported() -> list[str]:
    return []


@pytest.fixture
def started(reported: list[str]) -> Iterator[Callable[[MlflowSync], MlflowSyncThread]]:
    """Starts threads that send, and ends those that a failed test leaves."""
    threads: list[MlflowSyncThread] = []

    def start(mlflow_sync: MlflowSync) -> MlflowSyncThread:
        threads.append(MlflowSyncThread(mlflow_sync, reported.append))
        return threads[-1]

    yield start
    for thread in threads:
        thread.close(0)


Start = Callable[[MlflowSync], MlflowSyncThread]


@pytest.mark.usefixtures("hasty")
def test_points_are_sent_during_training(each_store: Settings, started: Start, reported: list[str]) -> None:
    run = create(each_store)
    with sole_writer(run):
        thread = started(sync_of(each_store, run))
        for steps in ([1, 2], [3], [4, 5]):
            note(run, *steps)
            until(lambda: history(each_store, run)[-1:] == values(steps[-1]), 60)  # noqa: B023
        run.files.write_status("FINISHED")
        assert thread.close(60)
    assert history(each_store, run) == values(1, 2, 3, 4, 5)
    assert mlflow_run(each_store, run).info.status == "FINISHED"
    assert reported == []


def test_closing_sends_the_rest_at_once(each_store: Settings, started: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sync_module, "SEND_SECONDS", 1000.0)
    run = create(each_store)
    with sole_writer(run):
        thread = started(sync_of(each_store, run))
        note(run, *range(1, POINTS_PER_BATCH + 2))
        run.files.write_status("FINISHED")
        assert thread.close(60)
    assert history(each_store, run) == values(*range(1, POINTS_PER_BATCH + 2))


@pytest.mark.timeout(60)
@pytest.mark.usefixtures("hasty")
def test_an_outage_is_reported_once_and_training_continues(settings: Settings, started: Start, reported: list[str]) -> None:
    run = create(settings)
    with sole_writer(run):
        mlflow_sync = Counted(run, NOBODY.replace("//", "//me:hunter2@"))
        thread = started(mlflow_sync)
        note(run, 1)
        until(lambda: mlflow_sync.tries > 3, 60)
        run.files.write_status("FINISHED")
        assert not thread.close(0)
    (line,) = reported
    assert "training continues" in line
    assert "hunter2" not in line
    assert not mlflow_sync.complete()
    assert sync_of(settings, run).state["sent"] == 0


@pytest.mark.timeout(60)
@pytest.mark.usefixtures("hasty")
def test_a_store_that_stays_away_is_given_up_at_the_end_before_the_deadline(
    settings: Settings, started: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sync_module, "TRIES_AT_THE_END", 1)
    run = create(settings)
    with sole_writer(run):
        note(run, 1)
        assert not started(MlflowSync(run, NOBODY)).close(100_000)


@pytest.mark.usefixtures("hasty")
def test_an_error_of_an_unknown_type_does_not_end_the_thread(
    settings: Settings, started: Start, reported: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = create(settings)

    def fail(*_: object, **__: object) -> None:
        raise KeyError("of a plugin")

    with sole_writer(run):
        note(run, 1)
        mlflow_sync = Counted(run, settings.tracking.uri)
        with monkeypatch.context() as patch:
            patch.setattr(mlflow.MlflowClient, "log_batch", fail)
            thread = started(mlflow_sync)
            until(lambda: mlflow_sync.tries > 2, 60)
        run.files.write_status("FINISHED")
        assert thread.close(60)
    assert history(settings, run) == values(1)
    assert len(reported) == 2


@pytest.mark.usefixtures("hasty")
def test_everything_is_sent_when_a_store_is_back(settings: Settings, started: Start, reported: list[str]) -> None:
    run = create(settings)
    describe(run, settings)
    with sole_writer(run):
        mlflow_sync = Counted(run, settings.tracking.uri)
        thread = started(mlflow_sync)
        note(run, 1, 2)
        until(lambda: len(history(settings, run)) == 2, 60)
        with away(settings):
            tries = mlflow_sync.tries
            note(run, 3, 4)
            until(lambda: mlflow_sync.tries > tries + 3, 60)
            note(run, 5)
        until(lambda: len(history(settings, run)) == 5, 60)
        run.files.write_status("FINISHED")
        assert thread.close(60)
    assert history(settings, run) == values(1, 2, 3, 4, 5)
    away_line, back_line = reported
    assert "training continues" in away_line
    assert "MLflow is back" in back_line
    assert mlflow_run(settings, run).info.status == "FINISHED"


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("disaster", ["full", "gone"])
def test_a_failed_disk_is_not_reported_as_an_outage_of_mlflow(
    disaster: str, small_disk: Path, settings: Settings, started: Start, reported: list[str], tmp_path: Path
) -> None:
    settings = settings_in(tmp_path, f"output.root={small_disk}/checkpoints")
    run = create(begin(settings))
    note(run, 1)
    mlflow_sync = Counted(run, settings.tracking.uri)
    mlflow_sync.send()
    note(run, 2)
    if disaster == "full":
        fill(small_disk)
    else:
        shutil.rmtree(run.path)
    with pytest.raises(RunDirectoryError, match="no space left" if disaster == "full" else "is gone"):
        mlflow_sync.send()
    thread = started(mlflow_sync)
    until(lambda: mlflow_sync.tries > 4, 60)
    assert not thread.close(1)
    assert reported == []


@pytest.mark.usefixtures("hasty")
def test_what_was_not_sent_at_the_end_is_sent_by_the_next_sync(settings: Settings, started: Start) -> None:
    run = create(settings)
    with sole_writer(run), away(settings):
        thread = started(Counted(run, settings.tracking.uri))
        note(run, 1, 2)
        run.files.write_status("FAILED")
        assert not thread.close(0.5)
        until(lambda: not thread.thread.is_alive(), 60)
    sync_of(settings, run).send()
    assert history(settings, run) == values(1, 2)
    assert mlflow_run(settings, run).info.status == "FAILED"


@pytest.mark.usefixtures("hasty")
def test_a_working_thread_touches_the_lock(settings: Settings, started: Start) -> None:
    run = create(settings)
    with sole_writer(run):
        lock = run.path / ".lock"
        before = lock.stat().st_mtime_ns
        thread = started(sync_of(settings, run))
        until(lambda: lock.stat().st_mtime_ns > before, 60)
        thread.close(0)


def test_a_tree_is_flattened_by_dotted_paths() -> None:
    assert flatten_tree({"a": {"b": {"c": 1}, "d": [2]}, "e": {}}) == {"a.b.c": 1, "a.d": [2], "e": {}}


def test_two_runs_of_one_store_do_not_mix(each_store: Settings) -> None:
    first, second = create(each_store), create(each_store, "launch-2")
    note(first, 1)
    note(second, 2)
    for run in (first, second):
        sync_of(each_store, replace(run)).send()
    assert (history(each_store, first), history(each_store, second)) == (values(1), values(2))


# what MLflow refuses


def test_a_metric_that_mlflow_never_takes_does_not_block_the_rest_and_is_reported_by_name_once(
    each_store: Settings, started: Start, reported: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sync_module, "SEND_SECONDS", 0.02)
    run = create(each_store)
    describe(run, each_store)
    metrics_file = MetricsFile(run.path / "metrics.jsonl")
    with sole_writer(run):
        thread = started(sync_of(each_store, run))
        for step in range(1, 21):
            metrics_file.append([*points(step, name="accuracy of what colour?"), *points(step)])
            time.sleep(0.01)
        run.files.write_status("FINISHED")
        assert thread.close(60)
    assert history(each_store, run) == values(*range(1, 21))
    assert mlflow_run(each_store, run).info.status == "FINISHED"
    assert "config/config.json" in artifacts(each_store, run)
    (line,) = reported
    assert line.startswith("MLflow will never take metric `accuracy of what colour?`")


def test_what_was_refused_is_not_tried_again(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    run = create(settings)
    bad = [MetricPoint("what colour?", 1.0, step, 1.0 + step) for step in range(1, 101)]
    MetricsFile(run.path / "metrics.jsonl").append([*bad, *points(1)])
    requests, whole = [], mlflow.MlflowClient.log_batch

    def count(client: mlflow.MlflowClient, run_id: str, **items: Any) -> None:
        requests.append(items)
        whole(client, run_id, **items)

    monkeypatch.setattr(mlflow.MlflowClient, "log_batch", count)
    sync_of(settings, run).send()
    assert len(requests) < 20  # a batch is split, and a name of which 3 points were refused is given up
    requests.clear()
    MetricsFile(run.path / "metrics.jsonl").append([MetricPoint("what colour?", 1.0, 101, 200.0), *points(2)])
    sync_of(settings, run).send()
    assert len(requests) == 1
    assert history(settings, run) == values(1, 2)


def test_parameters_and_tags_that_mlflow_never_takes_do_not_block_the_rest(each_store: Settings) -> None:
    run = create(each_store)
    config = resolved_config(each_store, {}) | {"what colour?": 1, "x" * 300: 2, "after": 3}
    describe_run(run, config, "command", {})
    run.add_tags({"what colour?": "1", "good": "2"})
    note(run, 1)
    run.files.write_status("FINISHED")
    mlflow_sync = sync_of(each_store, run)
    mlflow_sync.send()
    assert mlflow_sync.complete()
    data = mlflow_run(each_store, run).data
    assert (data.params["after"], data.params["seed"], data.tags["good"]) == ("3", str(each_store.seed), "2")
    assert set(mlflow_sync.refusals()) == {"param `what colour?`", f"param `{'x' * 300}`", "tag `what colour?`"}
    assert history(each_store, run) == values(1)


def test_artifacts_that_cannot_be_sent_block_neither_points_nor_status_and_arrive_later(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = create(settings)
    describe(run, settings)
    note(run, 1)
    run.files.write_status("FINISHED")
    mlflow_sync = sync_of(settings, run)

    def fail(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(mlflow.MlflowClient, "log_artifact", fail)
        with pytest.raises(PermissionError):
            mlflow_sync.send()
    assert history(settings, run) == values(1)
    assert mlflow_run(settings, run).info.status == "FINISHED"
    assert not mlflow_sync.complete()
    mlflow_sync.send()
    assert mlflow_sync.complete()
    assert artifacts(settings, run) == ["config/config.json"]


def test_the_sync_command_names_what_mlflow_never_takes(settings: Settings, reported: list[str]) -> None:
    run = create(settings)
    MetricsFile(run.path / "metrics.jsonl").append([MetricPoint("what colour?", 1.0, 1, 1.0), *points(1)])
    run.files.write_status("FAILED")
    for done in ("sent, FAILED", "complete"):
        assert sync(run, settings.output.root, None, reported.append)
        assert f"{done}; without metric `what colour?`, which MLflow does not take (" in reported[-1]
    assert history(settings, run) == values(1)


def test_a_run_that_an_earlier_version_sent_is_complete(settings: Settings) -> None:
    """It did not record each artifact, and sent them before the status."""
    run = create(settings)
    (run.path / "model.pt").write_bytes(b"model")
    run.files.write_status("FINISHED")
    mlflow_sync = sync_of(settings, run)
    mlflow_sync.send()
    write_json(run.files.sync_state, {key: mlflow_sync.state[key] for key in ("sent", "sending", "described", "status")})
    assert sync_of(settings, run).complete()
    run.files.write_status("FAILED")
    assert not sync_of(settings, run).complete()
