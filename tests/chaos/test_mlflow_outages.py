"""MLflow's server hangs, is overloaded, loses or repeats requests, refuses them, or its disk is full; a run is deleted and restored:
training continues, the cause is reported as what it is, and in the end MLflow has everything once.

In short against a proxy in front of one real `mlflow server`, in this process; `make chaos` launches real training against it.
"""

import json
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import pytest
from requests.adapters import HTTPAdapter

from raytrain2p.config import Settings
from raytrain2p.runs.sync import sync
from raytrain2p.tracking import mlflow_sync as sync_module
from raytrain2p.tracking.mlflow_store import client_of, prepare_store
from raytrain2p.tracking.run import Run
from raytrain2p.tracking.run_writer import RunWriter, open_run_writer, resolved_config
from tests.chaos.conftest import Judged, Undisturbed
from tests.chaos.killing import Launch, launch_in, only_long, verdict
from tests.chaos.mlflow_proxy import Fault, Proxy
from tests.chaos.mlflow_server import Server
from tests.inference.tiny import save_tiny_model
from tests.launch.launching import run_command
from tests.runs.made import printed, trained
from tests.tracking.stores import EXPERIMENT, create, elsewhere, fill, history, mlflow_run, points

MANY_STEPS = 1500  # some are left when the outage begins
AWAY, NO_LOGIN, FORBIDDEN, FULL = ("MLflow is away", "does not accept the login", "does not permit it", "full, or over a limit")
# What is wrong with the server, and what is reported; nothing where the client gets its answer.
FAULTS: dict[str, tuple[Fault, str | None]] = {
    "hangs": (Fault("hangs"), AWAY),
    "answers 503": (Fault(503), AWAY),
    "answers 429": (Fault(429), AWAY),
    "answers 502 in HTML": (Fault(502), AWAY),
    "gets each request twice": (Fault("request twice"), None),
    "answers twice": (Fault("answer twice"), None),
    "answers late": (Fault("late"), AWAY),
    "loses its answers after committing": (Fault("loses"), AWAY),
    "answers 401": (Fault(401), NO_LOGIN),
    "answers 403": (Fault(403), FORBIDDEN),
    "answers that a quota is used up": (Fault(507), FULL),
    "answers 503 to artifacts": (Fault(503, "mlflow-artifacts"), AWAY),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, made_store: Path) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    shutil.copy(made_store / "mlflow.db", server.folder / "server.db")  # MLflow takes seconds to make one
    server.start()
    yield server
    server.stop()


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    proxy = Proxy(server.port)
    yield proxy
    proxy.stop()


@pytest.fixture
def remote(settings: Settings, server: Server) -> Settings:
    """Settings with the real server as their store, and an experiment whose artifacts go through it."""
    remote = elsewhere(settings, server.uri)
    remote = remote.model_copy(update={"tracking": remote.tracking.model_copy(update={"experiment": "served"})})
    prepare_store(remote, EXPERIMENT)
    return remote


@pytest.fixture
def reported() -> list[str]:
    return []


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes seconds takes tenths of them."""
    monkeypatch.setattr(sync_module, "SEND_SECONDS", 0.05)
    monkeypatch.setattr(sync_module, "LONGEST_WAIT", 0.2)
    monkeypatch.setattr(sync_module, "TRIES_AT_THE_END", 1)


class Training:
    """Writes a point each 50 ms, as training does."""

    def __init__(self, writer: RunWriter) -> None:
        self.writer, self.steps = writer, 0

    def train(self, until: Callable[[], bool], seconds: float = 30.0) -> None:
        deadline = time.monotonic() + seconds
        while not until():
            assert time.monotonic() < deadline
            self.steps += 1
            self.writer.write(points(self.steps))
            time.sleep(0.05)


def writing(run: Run, settings: Settings, uri: str, reported: list[str]) -> Any:
    description = {"config": resolved_config(settings, {}), "command": "command", "facts": {}}
    return open_run_writer(run, uri, description, reported.append)


@contextmanager
def senders(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[threading.Thread]]:
    """Collects the threads that send a request over HTTP within."""
    asked, send = set[threading.Thread](), HTTPAdapter.send

    def noted(*arguments: Any, **options: Any) -> Any:
        asked.add(threading.current_thread())
        return send(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(HTTPAdapter, "send", noted)
        yield asked


def is_whole(settings: Settings, run: Run, steps: int) -> None:
    """MLflow has every point once, the parameters, the settings file and the status."""
    assert history(settings, run) == [(point.step, point.value) for point in points(*range(1, steps + 1))]
    found = mlflow_run(settings, run)
    assert found.info.status == "FINISHED"
    assert found.data.params["seed"] == str(settings.seed)
    assert [entry.path for entry in client_of(settings.tracking.uri).list_artifacts(run.run_id, "config")] == ["config/config.json"]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("scenario", FAULTS)
def test_training_continues_while_the_server(
    scenario: str, remote: Settings, proxy: Proxy, reported: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = create(remote, Path(remote.output.root).parent.name)
    proxy.fault, words = FAULTS[scenario]
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    with writing(run, remote, proxy.uri, reported) as writer:
        training = Training(writer)
        with senders(monkeypatch) as asked:
            training.train(lambda: proxy.met >= 2)
            proxy.fault = None
            if words:
                training.train(lambda: len(reported) == 2)
        assert writer.finish("FINISHED")
    is_whole(remote, run, training.steps)
    assert asked
    assert threading.main_thread() not in asked  # training waits for no answer
    if words:
        problem, back = reported
        assert words in problem
        assert "training continues" in problem
        assert "MLflow is back" in back
    else:
        assert reported == []


@pytest.mark.timeout(120)
def test_a_server_that_hangs_for_ever_delays_the_end_by_a_bounded_time(
    remote: Settings, proxy: Proxy, reported: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sync_module, "SECONDS_AT_THE_END", 2.0)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    run = create(remote, Path(remote.output.root).parent.name)
    proxy.fault = Fault("hangs", delay=60)
    with writing(run, remote, proxy.uri, reported) as writer:
        training = Training(writer)
        training.train(lambda: training.steps == 20)
        began = time.monotonic()
        assert not writer.finish("FINISHED")
        assert time.monotonic() - began < 2.0 + 2 * 2.0 + 3.0  # the last try hangs twice: for an artifact, and for the status
    proxy.fault = None
    assert sync(run, remote.output.root, proxy.uri, reported.append)
    is_whole(remote, run, training.steps)


@pytest.mark.timeout(120)
def test_a_run_that_is_deleted_is_reported_as_that_and_gets_everything_once_it_is_restored(
    remote: Settings, server: Server, reported: list[str]
) -> None:
    run, client = create(remote, Path(remote.output.root).parent.name), client_of(remote.tracking.uri)
    with writing(run, remote, server.uri, reported) as writer:
        training = Training(writer)
        training.train(lambda: len(history(remote, run)) > 5)
        client.delete_run(run.run_id)
        training.train(lambda: len(reported) == 1)
        assert "was deleted in MLflow; training continues" in reported[0]
        assert "mlflow runs restore" in reported[0]
        client.restore_run(run.run_id)
        training.train(lambda: len(reported) == 2)
        client.delete_run(run.run_id)
        assert not writer.finish("FINISHED")
    assert not sync(run, remote.output.root, None, reported.append)
    assert "was deleted in MLflow; restore it" in reported[-1]
    client.restore_run(run.run_id)
    assert sync(run, remote.output.root, None, reported.append)
    is_whole(remote, run, training.steps)


def test_a_run_that_is_gone_for_good_is_reported_as_that(remote: Settings, server: Server, reported: list[str]) -> None:
    run = create(remote, Path(remote.output.root).parent.name)
    run.files.write_status("FAILED")
    assert not sync(replace(run, run_id="0" * 32), remote.output.root, server.uri, reported.append)
    assert "MLflow does not have it" in reported[0]
    assert "tracking.uri" in reported[0]


def test_a_full_disk_under_mlflow_db_is_reported_as_that_and_everything_arrives_later(
    settings: Settings, made_store: Path, small_disk: Path, tmp_path: Path, reported: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    subprocess.run(["mount", "-o", "remount,size=8m", small_disk], check=True)
    shutil.copy(made_store / "mlflow.db", small_disk)
    settings = elsewhere(settings, f"sqlite:///{small_disk}/mlflow.db")
    run = create(settings)
    with writing(run, settings, settings.tracking.uri, reported) as writer:
        training = Training(writer)
        training.train(lambda: len(history(settings, run)) > 5)
        fill(small_disk)
        training.train(lambda: len(reported) == 1)
        assert "MLflow's store is full, or over a limit (database or disk is full); training continues" in reported[0]
        assert not writer.finish("FINISHED")
    assert not sync(run, settings.output.root, None, reported.append)
    assert "database or disk is full); free space there" in reported[-1]
    assert "Traceback" not in capfd.readouterr().err
    (small_disk / "somebody elses").unlink()
    assert sync(run, settings.output.root, None, reported.append)
    is_whole(settings, run, training.steps)


@only_long
@pytest.mark.parametrize("scenario", FAULTS)
def test_a_launch_goes_on_while_the_server(
    scenario: str,
    tmp_path: Path,
    proxy: Proxy,
    ray_head: str,
    tiny_config: Path,
    undisturbed: Undisturbed,
    judged: Judged,
) -> None:
    launch = launch_at(proxy.uri, tmp_path, tiny_config, ray_head)
    launch.start()
    launch.wait_for_steps(300)
    proxy.fault, words = FAULTS[scenario]
    seconds = seconds_to_step(launch)
    if proxy.fault.path:  # artifacts are sent at the end
        launch.wait_until(lambda: proxy.met > 0, 120)
    else:
        time.sleep(8)
    proxy.fault = None
    assert launch.wait() == 0, launch.log
    assert (words or "") in launch.log
    assert "Traceback" not in launch.log
    synced(launch, scenario, undisturbed(1, MANY_STEPS), seconds, judged)


@only_long
def test_a_launch_goes_on_while_its_run_is_deleted(
    tmp_path: Path, server: Server, ray_head: str, tiny_config: Path, undisturbed: Undisturbed, judged: Judged
) -> None:
    launch = launch_at(server.uri, tmp_path, tiny_config, ray_head)
    launch.start()
    launch.wait_for_steps(300)
    (run,) = launch.mlflow_runs()
    launch.client.delete_run(run.info.run_id)
    seconds = seconds_to_step(launch)
    launch.wait_until(lambda: "was deleted in MLflow; training continues" in launch.log, 60)
    launch.client.restore_run(run.info.run_id)
    assert launch.wait() == 0, launch.log
    synced(launch, "has the run deleted and restored", undisturbed(1, MANY_STEPS), seconds, judged)


@only_long
def test_a_launch_goes_on_while_the_disk_under_mlflow_db_is_full(
    tmp_path: Path, small_disk: Path, made_store: Path, ray_head: str, tiny_config: Path, undisturbed: Undisturbed, judged: Judged
) -> None:
    subprocess.run(["mount", "-o", "remount,size=12m", small_disk], check=True)
    shutil.copy(made_store / "mlflow.db", small_disk)
    launch = launch_at(f"sqlite:///{small_disk}/mlflow.db", tmp_path, tiny_config, ray_head)
    launch.start()
    launch.wait_for_steps(300)
    fill(small_disk)
    seconds = seconds_to_step(launch)
    launch.wait_until(lambda: "database or disk is full); training continues" in launch.log, 60)
    (small_disk / "somebody elses").unlink()
    assert launch.wait() == 0, launch.log
    assert "Traceback" not in launch.log
    synced(launch, "has a full disk under mlflow.db", undisturbed(1, MANY_STEPS), seconds, judged)


def launch_at(uri: str, tmp_path: Path, tiny_config: Path, ray_head: str) -> Launch:
    """A launch with this store, and an experiment of its own in it."""
    launch = launch_in(tmp_path / "launch", tiny_config, steps=MANY_STEPS, RAY_ADDRESS=ray_head)
    launch.server = uri
    launch.experiment = tmp_path.name
    launch.arguments = [*launch.arguments, f"tracking.uri={uri}", f"tracking.experiment={tmp_path.name}"]
    return launch


def seconds_to_step(launch: Launch) -> float:
    """Seconds from now to the next step."""
    began, steps = time.time(), len(launch.steps())
    launch.wait_until(lambda: len(launch.steps()) > steps, 60)
    return time.time() - began


def synced(launch: Launch, scenario: str, undisturbed: Launch, seconds: float, judged: Judged) -> None:
    """Judge the launch once `runs sync` has sent the rest."""
    done = run_command(launch.folder, "raytrain2p.runs", "sync", f"tracking.uri={launch.server}")
    assert done.code == 0, done.out + done.err
    assert "1 of 1 runs are complete in MLflow" in done.out
    judged(verdict(f"MLflow's server {scenario}", launch, undisturbed, 1, [seconds]))


def test_a_model_is_registered_through_a_server_with_a_password_and_comes_back_from_it(
    remote: Settings, server: Server, tiny_llama: Path, tiny_vit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained(remote, "registered", [1.0])
    save_tiny_model(run.path / "model.pt", tiny_llama, tiny_vit)
    uri = server.uri.replace("http://", "http://me:hunter2222@")
    words = ("register", run.run_id, "--name", "assistant", "--alias", "champion", f"tracking.uri={uri}")
    for new in (True, False):
        found = printed(remote.output.root, capsys, *words)
        assert (found["version"], found["is_new"]) == (1, new)
    client = client_of(server.uri)
    version = client.get_model_version_by_alias("assistant", "champion")
    assert (version.run_id, version.source[:17]) == (run.run_id, "mlflow-artifacts:")
    assert "hunter2222" not in json.dumps([version.tags, version.description, version.source, found])
    mlflow.set_tracking_uri(server.uri)
    try:
        folder = Path(mlflow.artifacts.download_artifacts("models:/assistant@champion", dst_path=str(tmp_path)))
    finally:
        mlflow.set_tracking_uri(None)
    assert (folder / "artifacts" / "model.pt").read_bytes() == (run.path / "model.pt").read_bytes()
    assert not [path for path in folder.rglob("*") if path.is_file() and b"hunter2222" in path.read_bytes()]
    assert mlflow.pyfunc.load_model(str(folder)).predict([{"instruction": "Hi"}], params={"max_new_tokens": 2})
