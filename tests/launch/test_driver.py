"""What a launch does under its lock, and with a root that was moved; without Ray."""

import io
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import pytest

from raytrain2p import train
from raytrain2p.config import InputError, Settings, load_settings
from raytrain2p.config.console import Console
from raytrain2p.launch import driver
from raytrain2p.launch.capacity import Capacity, Node
from raytrain2p.launch.ray_private import JOB_CONFIG
from raytrain2p.launch.resume import check_resumable, finished_outcome
from raytrain2p.launch.submission import launch_id_of_job
from raytrain2p.phases.registry import read_inputs
from raytrain2p.storage.files import write_json
from raytrain2p.tracking.create_run import get_or_create_run
from raytrain2p.tracking.mlflow_store import prepare_store
from raytrain2p.tracking.run import Run, launch_record
from raytrain2p.tracking.run_writer import describe_run, resolved_config
from raytrain2p.worker.job import Outcome


@pytest.fixture
def settings(tmp_path: Path, made_store: Path, tiny_config: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("RAYTRAIN2P_HOME", str(tmp_path))
    monkeypatch.setenv("RAYTRAIN2P_FEATURES", str(tmp_path / "features"))
    shutil.copy(made_store / "mlflow.db", tmp_path)
    return load_settings(1, tiny_config / "phase1.yaml", [])


def finished_run(settings: Settings, launch_id: str = "twice") -> Run:
    """What a launch leaves that trained to its end."""
    prepare_store(settings, "e")
    launch_record(settings.output.root, "any").parent.mkdir(parents=True, exist_ok=True)
    run = get_or_create_run(settings, "alignment", "e", launch_id)
    describe_run(run, resolved_config(settings, {}), "command", asdict(read_inputs(settings, 1).digests))
    write_json(run.files.result, asdict(Outcome(run.run_id, run.directory, None, None, f"{run.directory}/aligner.pt", {})))
    run.files.write_status("FINISHED")
    return run


@pytest.mark.parametrize(
    ("absent", "line"),
    [
        (["data.val=null"], "data.val is not set: no validation loss"),
        (["data.test={}"], "data.test is not set: nothing is evaluated after training"),
    ],
)
def test_what_is_absent_shortened_or_left_out_is_said_once_before_training(
    settings: Settings, tiny_config: Path, absent: list[str], line: str
) -> None:
    stream = io.StringIO()
    overrides = ["training.max_steps=3", "training.global_batch_size=20", "training.warmup_steps=2", *absent]
    driver.check(load_settings(1, tiny_config / "phase1.yaml", overrides), 1, Console(stream))
    assert stream.getvalue().splitlines()[-3:] == [
        line,
        "data.train: 8 of 48 records, others in each epoch, are left out: they fill no step of 20",
        "training.warmup_steps=2 is shortened to 1, since training has 3 steps",
    ]


def launch_after(
    settings: Settings, meanwhile: Callable[[], object], monkeypatch: pytest.MonkeyPatch, launch_id: str | None = "twice"
) -> Outcome:
    """A launch; after its checks, and before it has the lock, something else happens."""

    @contextmanager
    def connected(*_: object) -> Iterator[Capacity]:
        meanwhile()
        yield Capacity(nodes=(Node(2.0, 0.0),), started_here=True)

    def train(*_: object, **__: object) -> None:
        raise AssertionError("the finished run is trained again")

    monkeypatch.setattr(driver, "connected", connected)
    monkeypatch.setattr(driver, "check_nodes", train)
    return driver.launch(settings, 1, launch_id, True, Console())


def test_a_launch_that_waited_for_the_same_launch_gets_its_outcome(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Run] = []
    outcome = launch_after(settings, lambda: made.append(finished_run(settings)), monkeypatch)
    assert outcome.run_id == made[0].run_id


def test_a_job_that_is_submitted_again_gets_the_run_of_its_first_launch(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, tiny_config: Path
) -> None:
    monkeypatch.setenv(JOB_CONFIG, '{"metadata": {"job_submission_id": "mine"}}')
    launch_id = launch_id_of_job("phase1", settings.model_dump(mode="json"))
    assert launch_id is not None
    run = finished_run(settings, launch_id)
    assert driver.launch(settings, 1, None, True, Console()).run_id == run.run_id
    with pytest.raises(AssertionError, match="is trained again"):  # a launch of its own
        launch_after(load_settings(1, tiny_config / "phase1.yaml", ["seed=5"]), lambda: None, monkeypatch, None)


def test_a_launch_with_other_settings_that_waited_for_the_same_launch_is_refused(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, tiny_config: Path
) -> None:
    other = load_settings(1, tiny_config / "phase1.yaml", ["training.learning_rate=3e-4"])
    with pytest.raises(InputError, match=r"training.learning_rate=0.0003\n    cannot change"):
        launch_after(other, lambda: finished_run(settings), monkeypatch)


def test_a_launch_id_of_another_root_is_refused_before_any_worker_starts(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    first = finished_run(settings)
    other = settings.model_copy(update={"output": settings.output.model_copy(update={"root": f"{settings.output.root}2"})})
    with pytest.raises(InputError, match=f"output.root={settings.output.root}, and this is output.root={settings.output.root}2"):
        launch_after(other, lambda: None, monkeypatch)
    assert first.files.read_status()["status"] == "FINISHED"


def test_a_run_of_a_moved_root_is_resumed_where_it_is(settings: Settings, tmp_path: Path) -> None:
    run = finished_run(settings)
    config = json.loads(run.files.config.read_text())
    aligner = f"{settings.output.root}/alignment/x/aligner.pt"  # as phase 2 has one
    run.files.write_config(config | {"model": config["model"] | {"extra": aligner}})
    assert run.files.moved_settings() == []
    run.files.write_config(config)
    new = tmp_path / "moved"
    Path(settings.output.root).rename(new)
    resumed, launch_id = train.resumed(settings, 1, f"{new}/alignment/{run.path.name}", None, None, [])
    assert (resumed.output.root, launch_id) == (str(new), "twice")
    found = driver.run_to_resume(resumed, launch_id, 1)
    assert found is not None
    assert found.path == new / "alignment" / run.path.name
    inputs = read_inputs(resumed, 1)
    check_resumable(found, resumed, inputs.digests)
    outcome = finished_outcome(found, resumed, inputs.records)
    assert outcome is not None
    assert outcome.artifact == f"{found.directory}/aligner.pt"
    found.files.write_config(json.loads(found.files.config.read_text()) | {"extra": aligner})
    assert (found.files.read_config() or {})["extra"] == f"{new}/alignment/x/aligner.pt"
    assert not Path(settings.output.root).exists()


def test_a_store_that_was_moved_with_its_runs_can_be_named(settings: Settings, tmp_path: Path) -> None:
    run = finished_run(settings)
    (tmp_path / "mlflow.db").rename(tmp_path / "moved.db")
    moved = settings.model_copy(update={"tracking": settings.tracking.model_copy(update={"uri": f"sqlite:///{tmp_path}/moved.db"})})
    check_resumable(run, moved, None)
    with pytest.raises(InputError, match="there is no such store"):
        driver.check_store(settings, 1, Capacity(nodes=(Node(2.0, 0.0),), started_here=True), run, "twice")
    assert not (tmp_path / "mlflow.db").exists()
