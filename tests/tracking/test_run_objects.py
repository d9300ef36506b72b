"""A run whose output root is an object storage: from creation to its end, killed in between, and resumed on a fresh host. Real S3 server,
real MLflow store; what trains is played by calls of the writer.
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from raytrain2p.config import InputError, Settings, load_settings
from raytrain2p.config.phases import ALIGNMENT
from raytrain2p.config.scratch import local_path, public
from raytrain2p.storage import lease as leases
from raytrain2p.storage.lease import LostLeaseError
from raytrain2p.storage.objects import ObjectStore
from raytrain2p.storage.remote import fetch
from raytrain2p.tracking import create_run, run_objects
from raytrain2p.tracking.create_run import get_or_create_run
from raytrain2p.tracking.find import find_artifact, find_run
from raytrain2p.tracking.metrics_file import MetricPoint, read_points
from raytrain2p.tracking.mlflow_store import client_of, prepare_store
from raytrain2p.tracking.run import Run
from raytrain2p.tracking.run_objects import only_driver, open_root, own_objects
from raytrain2p.tracking.run_writer import RunWriter, open_run_writer, resolved_config
from tests.storage.s3_server import BUCKET, S3Server


class Killed(Exception):
    """In place of SIGKILL: nothing of a run is finished, released or uploaded after it."""


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture
def url(s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(leases, "SECONDS", 1.0)
    return f"s3://{BUCKET}/{tmp_path.name}"


def settings_in(url: str, database: str) -> Settings:
    settings = load_settings(1, None, [f"output.root={url}", f"tracking.uri={database}"])
    prepare_store(settings, ALIGNMENT.experiment)
    return settings


def on_host(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """From here on, this is a machine with a disk of its own, which is empty at first."""
    monkeypatch.setenv("RAYTRAIN2P_SCRATCH", str(tmp_path / name))


@contextmanager
def writer_of(settings: Settings) -> Iterator[tuple[Run, RunWriter]]:
    """As rank 0 has it."""
    launch = Path(settings.output.root).name  # in MLflow, a launch ID belongs to one output root
    with own_objects(settings.output.root, launch) as lease:
        run = get_or_create_run(settings, ALIGNMENT.name, ALIGNMENT.experiment, launch)
        describe: dict[str, Any] = {"config": resolved_config(settings, {}), "command": "python -m raytrain2p.train", "facts": {}}
        with open_run_writer(run, settings.tracking.uri, describe, print, lease) as writer:
            yield run, writer


def points(*steps: int, time: float) -> list[MetricPoint]:
    return [MetricPoint("train_loss", 1.0 / step, step, time) for step in steps]


def save(run: Run, writer: RunWriter, step: int) -> None:
    """A checkpoint, as the callback writes it."""
    (run.checkpoints / "last.ckpt").write_text(f"step {step}")
    writer.upload()


def mlflow_steps(settings: Settings, run: Run) -> list[int]:
    return [point.step for point in client_of(settings.tracking.uri).get_metric_history(run.run_id, "train_loss")]


def runs_in_mlflow(database: str, url: str) -> list[str]:
    client = client_of(database)
    experiments = [one.experiment_id for one in client.search_experiments()]
    return [run.info.run_id for run in client.search_runs(experiments, f"tags.`raytrain2p.root` = '{url}'")]


def kill(writer: RunWriter) -> None:
    """End here, once MLflow has what it may have."""
    writer.mlflow_sync.mlflow_sync.send()
    raise Killed


def test_a_run_that_was_killed_is_resumed_on_a_fresh_host_as_one_run_and_mlflow_has_each_step_once(
    url: str, database: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = settings_in(url, database)
    with suppress(Killed), writer_of(settings) as (first, writer):
        writer.write(points(1, 2, time=1e9))
        save(first, writer, 2)
        assert writer.objects is not None
        writer.objects.next_push = math.inf
        writer.write(points(3, time=1e9))  # on the disk alone when the host is lost
        kill(writer)
    assert mlflow_steps(settings, first) == [1, 2]

    on_host("second", monkeypatch, tmp_path)
    settings = settings_in(url, database)
    with writer_of(settings) as (run, writer):
        assert (run.run_id, public(run.directory)) == (first.run_id, f"{url}/alignment/{first.path.name}")
        assert (run.checkpoints / "last.ckpt").read_text() == "step 2"
        writer.resume_from(2)
        writer.write(points(3, 4, time=2e9))
        save(run, writer, 4)
        assert writer.finish("FINISHED")
    assert mlflow_steps(settings, run) == [1, 2, 3, 4]

    on_host("third", monkeypatch, tmp_path)
    root = local_path(url)
    open_root(root)
    found = find_run(root, [ALIGNMENT.name], "latest", "RUN")
    assert [point.step for point in read_points(found.files.metrics)] == [1, 2, 3, 4]
    assert found.files.read_status()["status"] == "FINISHED"
    assert len(list((Path(root) / "alignment").iterdir())) == 1
    assert runs_in_mlflow(database, url) == [run.run_id]


def test_what_is_written_down_names_the_url_and_not_the_place_on_a_disk(url: str, database: str, tmp_path: Path) -> None:
    settings = settings_in(url, database)
    with writer_of(settings) as (run, writer):
        writer.finish("KILLED")
    store = ObjectStore(url)
    for one in store.list():
        content = store.read(one.key)[0].decode()  # type: ignore[index]
        assert str(tmp_path) not in content.replace(database, ""), one.key
    record = json.loads(store.read(f"alignment/{run.path.name}/run.json")[0])  # type: ignore[index]
    assert record["directory"] == f"{url}/alignment/{run.path.name}"
    known = client_of(database).get_run(run.run_id).data
    assert (known.tags["raytrain2p.directory"], known.params["output.root"]) == (record["directory"], url)


@pytest.mark.parametrize("after", ["intent", "mlflow", "run.json", "record"])
def test_a_launch_that_is_killed_while_its_run_is_made_has_one_run(
    url: str, database: str, after: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings, left = settings_in(url, database), {"intent": 1, "run.json": 2, "record": 3}.get(after, 0)
    push, done = create_run.push_file, list[str]()

    def pushed(path: Path) -> None:
        push(path)
        done.append(path.name)
        if len(done) == left:
            raise Killed

    def not_recorded(path: Path) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(create_run, "push_file", pushed)
        if after == "mlflow":
            patch.setattr(create_run, "pull", not_recorded)
        with pytest.raises(Killed), writer_of(settings):
            pass
    on_host("second", monkeypatch, tmp_path)
    with writer_of(settings_in(url, database)) as (run, writer):
        writer.finish("FINISHED")
    assert runs_in_mlflow(database, url) == [run.run_id]
    assert {one.key.split("/")[1] for one in ObjectStore(url).list("alignment/")} == {run.path.name}


def test_a_second_driver_on_another_machine_is_refused_while_the_first_is_alive(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_objects, "SECONDS_TO_TAKE_OVER", 1.5)
    monkeypatch.setattr(leases, "is_dead", lambda row: False)
    root, said = local_path(url), list[str]()
    with only_driver(root, "nightly", said.append) as first, only_driver(root, "nightly", said.append) as second:
        assert first is None
        assert second is not None
        assert second.startswith("pid ")
    assert len(said) == 1
    assert "is, or was, driven by pid" in said[0]


def test_a_writer_finds_out_without_a_request_that_another_process_has_taken_over(url: str, database: str, s3: S3Server) -> None:
    with writer_of(settings_in(url, database)) as (_, writer):
        writer.check_lease()
        assert writer.objects is not None
        assert writer.objects.lease is not None
        writer.objects.lease.lost = "pid 1 on node7"  # as the thread that renews it finds
        with pytest.raises(LostLeaseError, match="was taken over by pid 1 on node7"):
            writer.check_lease()


def test_an_artifact_is_fetched_by_its_url_and_as_the_latest(
    url: str, database: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = settings_in(url, database)
    with writer_of(settings) as (run, writer):
        run.files.artifact(ALIGNMENT).write_text("tensors")
        writer.finish("FINISHED")
    directory = f"{url}/alignment/{run.path.name}"
    for number, wanted in enumerate((f"{directory}/aligner.pt", directory, "latest", run.run_id[:8])):
        on_host(f"host-{number}", monkeypatch, tmp_path)
        open_root(local_path(url))
        assert find_artifact(local_path(url), ALIGNMENT, wanted, "model.aligner").read_text() == "tensors"
    with pytest.raises(InputError, match="is neither a file nor"):
        find_artifact(local_path(url), ALIGNMENT, f"{url}/nothing.pt", "model.aligner")


def test_another_node_fetches_the_checkpoint_that_rank_0_has_now(
    url: str, database: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = settings_in(url, database)
    with writer_of(settings) as (run, writer):
        for step in (2, 4):
            save(run, writer, step)
            with monkeypatch.context() as node:
                on_host("node-2", node, tmp_path)
                there = Path(local_path(public_of(run, url))) / "lightning_checkpoints" / "last.ckpt"
                fetch(there)
                assert there.read_text() == f"step {step}"
                assert '"raytrain2p.root"' in (there.parents[1] / "run.json").read_text()
        before = run.files.last_checkpoint.stat()
        fetch(run.files.last_checkpoint)  # on rank 0's own node: it is there
        assert run.files.last_checkpoint.stat() == before


def public_of(run: Run, url: str) -> str:
    return f"{url}/alignment/{run.path.name}"
