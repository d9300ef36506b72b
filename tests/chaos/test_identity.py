"""First launches at once, on real stores; and a root that is moved between a stop and a resume."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.killing import Launch, launch_in, only_long
from tests.chaos.mlflow_server import Server
from tests.launch.launching import run_command


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    server.start()
    yield server
    server.stop()


class NewLaunch(Launch):
    """With a launch ID of its own."""

    def command(self) -> list[str]:
        return ["raytrain2p.train", *self.arguments]


def launch_at_once(folder: Path, tiny_config: Path, ray_head: str, count: int, *overrides: str) -> None:
    arguments = [*launch_in(folder, tiny_config, steps=6).arguments, *overrides]
    launches = [NewLaunch(folder, arguments, {"RAY_ADDRESS": ray_head}, starts=10 * number) for number in range(count)]  # and log files
    for launch in launches:
        launch.start()
    for launch in launches:
        assert launch.wait() == 0, launch.log
    assert len(launches[0].directories()) == count
    assert not launches[0].differences()


@only_long
def test_first_launches_at_once_in_a_fresh_directory_all_train(tmp_path: Path, ray_head: str, tiny_config: Path) -> None:
    launch_at_once(tmp_path / "fresh", tiny_config, ray_head, 4)


@only_long
def test_first_launches_at_once_against_a_fresh_server_all_train(tmp_path: Path, server: Server, ray_head: str, tiny_config: Path) -> None:
    launch_at_once(tmp_path / "served", tiny_config, ray_head, 4, f"tracking.uri={server.uri}")


@only_long
def test_a_run_that_was_stopped_is_resumed_after_its_folder_was_moved(tmp_path: Path, ray_head: str, tiny_config: Path) -> None:
    launch = launch_in(tmp_path / "before", tiny_config, steps=5000, RAY_ADDRESS=ray_head)
    launch.start()
    launch.wait_for_steps(50)
    assert launch.process is not None
    launch.process.send_signal(signal.SIGTERM)
    assert launch.wait() == 128 + signal.SIGTERM, launch.log
    stopped_at = max(launch.steps())
    launch.folder.rename(tmp_path / "after")
    launch.folder = tmp_path / "after"
    command = ["raytrain2p.train", "--phase=1", "--resume", "latest", f"training.max_steps={stopped_at + 20}"]
    refused = run_command(launch.folder, *command, **launch.variables)
    assert refused.code == 2, refused.err
    assert "there is no such store" in refused.err
    done = run_command(launch.folder, *command, f"tracking.uri=sqlite:///{launch.folder}/mlflow.db", **launch.variables)
    assert done.code == 0, done.err
    assert sorted(launch.steps()) == list(range(1, stopped_at + 21))
    (run,) = launch.mlflow_runs()
    assert run.info.status == "FINISHED"
    assert run.data.tags["raytrain2p.directory"] == str(launch.directories()[0])
    assert not (tmp_path / "before" / "checkpoints").exists()
