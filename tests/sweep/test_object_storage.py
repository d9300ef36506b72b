"""A sweep whose output root is an object storage: its trials' records and results, on a host that has none of their files. Real S3 server,
real MLflow store; what trains is played by calls of the writer.
"""

import json
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import pytest

from raytrain2p.config import Settings, load_settings
from raytrain2p.config.phases import ALIGNMENT
from raytrain2p.config.scratch import local_path
from raytrain2p.launch.api import fetched
from raytrain2p.storage.objects import ObjectStore
from raytrain2p.storage.remote import Directory
from raytrain2p.sweep.results import Trial, TrialRecords, write_results
from raytrain2p.tracking.find import is_alive
from raytrain2p.tracking.metrics_file import MetricPoint
from raytrain2p.tracking.mlflow_store import client_of
from raytrain2p.tracking.run import EARLY_TAG, SWEEP_TAG, Run
from raytrain2p.tracking.run_objects import only_driver
from raytrain2p.tracking.run_writer import RunWriter, end_run, send_rest
from tests.storage.s3_server import BUCKET, S3Server
from tests.tracking.test_run_objects import Killed, on_host, save, settings_in, writer_of

SWEEP = f"{'5' * 32}_20260101_000000"


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture
def url(s3: S3Server, tmp_path: Path) -> str:
    return f"s3://{BUCKET}/{tmp_path.name}"


@pytest.fixture
def settings(url: str, database: str) -> Settings:
    return settings_in(url, database)


@pytest.fixture
def trial(url: str) -> Trial:
    return Trial(0, {"training.learning_rate": 0.1}, Path(url).name)


def records_on(url: str) -> TrialRecords:
    """The sweep's, for the process that writes to it, on this host."""
    folder = Path(local_path(url)) / "sweeps" / SWEEP
    (folder / "trials").mkdir(parents=True, exist_ok=True)
    return TrialRecords(folder, local_path(url), Directory(folder))


def report(run: Run, writer: RunWriter, step: int, objective: float) -> None:
    writer.write([MetricPoint(name, objective, step, 1e9) for name in ("train_loss", "objective")])
    save(run, writer, step)


def test_the_record_of_a_trial_and_that_it_failed_are_objects_at_once(url: str, trial: Trial) -> None:
    records, store = records_on(url), ObjectStore(url)
    records.begin(trial)
    found = store.read(f"sweeps/{SWEEP}/trials/000.json")
    assert found is not None
    assert json.loads(found[0])["launch_id"] == trial.launch_id
    records.give_up(0, "the reason")
    assert store.read(f"sweeps/{SWEEP}/trials/000.failed") is not None


def test_a_drivers_results_are_those_of_workers_on_other_nodes_and_not_asked_for_more_often_than_it_says(
    url: str, settings: Settings, trial: Trial, s3: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with writer_of(settings) as (run, writer):
        report(run, writer, 2, 3.0)
        with monkeypatch.context() as driver:
            on_host("driver", driver, tmp_path)
            records = records_on(url)
            records.begin(trial)
            (before,) = records.results(age=600)
        report(run, writer, 4, 2.0)
        with monkeypatch.context() as driver:
            on_host("driver", driver, tmp_path)
            asked = s3.requests()
            assert records.results(age=600) == [before]
            assert s3.requests() == asked
            now = records.result(trial)
        run.files.artifact(ALIGNMENT).write_bytes(bytes(5000))
        writer.finish("FINISHED")
    assert ((before.state, before.reports), (now.state, now.reports)) == (("running", ((2, 3.0),)), ("running", ((2, 3.0), (4, 2.0))))

    on_host("driver", monkeypatch, tmp_path)
    (result,) = records.results()
    assert (result.state, result.steps) == ("finished", 4)
    assert result.run is not None
    assert [path.stat().st_mtime for path in (result.run.files.artifact(ALIGNMENT), result.run.files.last_checkpoint)] == [0, 0], "fetched"
    asked = s3.requests()
    records.results()
    assert s3.requests() == asked, "one that is over is not asked for again"
    best = write_results(records.folder.parent, [result], [], "min", 1)
    assert best is not None
    assert best["directory"] == f"{url}/alignment/{result.run.path.name}"
    on_host("another", monkeypatch, tmp_path)
    config = best["command"].split()[6]
    assert config == f"{best['directory']}/config.json"
    assert load_settings(1, fetched(config)) == load_settings(1, None, [f"output.root={url}", f"tracking.uri={settings.tracking.uri}"])


def test_results_that_may_be_old_are_there_while_the_storage_is_away(
    url: str, trial: Trial, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = records_on(url)
    records.begin(trial)
    s3.fault(status=403, seconds=30)
    assert [result.state for result in records.results(age=10)] == ["waiting"]
    s3.fault()


def test_the_driver_ends_a_trial_whose_worker_is_gone_from_another_host(
    url: str, settings: Settings, trial: Trial, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with suppress(Killed), writer_of(settings) as (run, writer):
        report(run, writer, 2, 3.0)
        raise Killed
    on_host("driver", monkeypatch, tmp_path)
    records = records_on(url)
    records.begin(trial)
    (result,) = records.results()
    assert result.run is not None
    assert end_run(result.run, settings.tracking.uri, "FINISHED", tags={EARLY_TAG: "asha at step 2"})
    assert (result.run.checkpoints / "last.ckpt").stat().st_mtime == 0, "fetched"
    assert send_rest(result.run, settings.tracking.uri)

    on_host("next driver", monkeypatch, tmp_path)
    found = records_on(url).result(trial)
    assert (found.state, found.reason) == ("stopped early", "asha at step 2")
    known = client_of(settings.tracking.uri).get_run(run.run_id)
    assert (known.info.status, known.data.tags[EARLY_TAG]) == ("FINISHED", "asha at step 2")


def test_a_trial_that_its_sweep_has_yet_to_start_again_counts_as_alive_on_any_host(
    url: str, settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with suppress(Killed), writer_of(settings) as (run, writer):
        run.add_tags({SWEEP_TAG: SWEEP[:32]})
        writer.upload()
        raise Killed
    sweep = Run(SWEEP[:32], f"{local_path(url)}/sweeps/{SWEEP}", "e", "20260101_000000", "sweep-of-it", "sweeps", settings.tracking.uri)
    sweep.path.mkdir(parents=True)
    sweep.files.write_record(asdict(sweep))
    root = local_path(url)
    assert not is_alive(run, root)
    with only_driver(root, "sweep-of-it", print):
        assert is_alive(run, root)
    assert not is_alive(run, root)
