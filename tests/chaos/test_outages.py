"""MLflow is away, the disk is full, read-only or gone, a checkpoint is torn: nothing is lost, and the user is told."""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import pytest

from raytrain2p.tracking.checkpoints import damage
from tests.chaos.killing import kill_driver, losses, only_long
from tests.chaos.mlflow_server import Server
from tests.chaos.test_kills import launch_in
from tests.launch.launching import Command, run_command


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.stop()


def sent_steps(uri: str) -> list[int]:
    """Steps whose loss MLflow has, of its one run."""
    client = mlflow.MlflowClient(uri)
    (run,) = [run for experiment in client.search_experiments() for run in client.search_runs([experiment.experiment_id])]
    assert run.info.status == "FINISHED"
    assert {artifact.path for artifact in client.list_artifacts(run.info.run_id)} >= {"aligner", "config", "plots"}
    return sorted(metric.step for metric in client.get_metric_history(run.info.run_id, "train_loss"))


@only_long
def test_mlflow_is_stopped_in_the_middle_and_everything_arrives_by_sync(
    tmp_path: Path, server: Server, ray_head: str, tiny_config: Path
) -> None:
    server.start()
    launch = launch_in(tmp_path / "away", tiny_config, 1, RAY_ADDRESS=ray_head)
    launch.arguments = [*launch.arguments, f"tracking.uri={server.uri}", "training.max_steps=1500"]
    launch.start()
    launch.wait_for_steps(300)
    server.stop()
    assert launch.wait() == 0, launch.log
    assert "MLflow does not answer; training goes on" in launch.log
    assert "raytrain2p.runs sync" in launch.log
    assert sorted(launch.steps()) == list(range(1, 1501))

    def sync() -> Command:
        return run_command(launch.folder, "raytrain2p.runs", "sync", f"tracking.uri={server.uri}")

    assert sync().code == 1  # still away
    server.start()
    done = sync()
    assert done.code == 0, done.err
    assert "1 of 1 runs are whole in MLflow" in done.out
    assert sent_steps(server.uri) == list(range(1, 1501))
    assert sync().code == 0
    assert sent_steps(server.uri) == list(range(1, 1501))  # the second time sends nothing twice
    server.stop()


def test_mlflow_away_at_the_start_is_bad_input_and_leaves_nothing(tmp_path: Path, ray_head: str, tiny_config: Path) -> None:
    launch = launch_in(tmp_path / "never", tiny_config, 1, RAY_ADDRESS=ray_head)
    launch.arguments = [*launch.arguments, "tracking.uri=http://127.0.0.1:9"]
    launch.start()
    assert launch.wait() == 2, launch.log
    assert "tracking.uri=http://127.0.0.1:9" in launch.log
    assert not (launch.folder / "checkpoints").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1200k", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a small tmpfs: {mounted.stderr.strip()}")
    yield folder
    while os.path.ismount(folder):
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path) -> None:
    """To the last byte, and stay: as another program would."""
    with (disk / "filler").open("wb", buffering=0) as stream:
        for size in (65536, 4096, 1):
            try:
                while True:
                    stream.write(b"x" * size)
            except OSError:
                continue


def make_read_only(disk: Path) -> None:
    """By a read-only view of it on top: Linux does not take the right to write from those who hold open files."""
    subprocess.run(["mount", "--bind", str(disk), str(disk)], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", str(disk)], check=True)


def take_away(disk: Path) -> None:
    subprocess.run(["umount", "-l", str(disk)], check=True)


@only_long
@pytest.mark.parametrize(("disaster", "restarts"), [(fill, 0), (make_read_only, 0), (take_away, 0), (take_away, 1)])
def test_the_disk_fails_and_the_run_is_failed_with_one_line(
    disaster: Callable[[Path], None], restarts: int, tmp_path: Path, small_disk: Path, ray_head: str, tiny_config: Path
) -> None:
    launch = launch_in(tmp_path / "launch", tiny_config, 1, RAY_ADDRESS=ray_head)
    launch.folder.mkdir()
    (launch.folder / "checkpoints").symlink_to(small_disk)
    launch.arguments = [*launch.arguments, "training.max_steps=4000", f"launch.max_failures={restarts}"]
    launch.start()
    launch.wait_for_steps(200)
    kept = tmp_path / "kept"
    disaster(small_disk)
    assert launch.wait() == 1, launch.log
    assert "cannot be written" in launch.log
    assert ("is gone" if disaster is take_away else "needed") in launch.log
    assert "Traceback" not in launch.log
    assert "MLflow" not in launch.log  # it is not to blame
    (run,) = launch.mlflow_runs()
    assert run.info.status == "FAILED"
    if disaster is take_away:
        assert list(small_disk.iterdir()) == []  # nothing is begun anew on the disk below
    else:
        shutil.copytree(launch.directories()[0] / "lightning_checkpoints", kept)
        assert (kept / "last.ckpt").is_file()
        assert [damage(path) for path in kept.glob("[!.]*.ckpt")] == [None, None]
        assert f"raytrain2p.runs reconcile {run.info.run_id[:8]}" in launch.log
    if disaster is fill:  # and when there is room again
        (small_disk / "filler").unlink()
        done = run_command(launch.folder, "raytrain2p.runs", "reconcile", run.info.run_id[:8])
        assert done.code == 0, done.out + done.err
        assert (launch.status() or {})["status"] == "FAILED"
        history = mlflow.MlflowClient(f"sqlite:///{launch.folder}/mlflow.db").get_metric_history(run.info.run_id, "train_loss")
        assert sorted(point.step for point in history) == launch.steps() == list(range(1, len(history) + 1))


@only_long
@pytest.mark.parametrize("torn", ["cut off", "one bit wrong"])
def test_a_damaged_last_checkpoint_is_named_and_the_best_is_used(torn: str, tmp_path: Path, ray_head: str, tiny_config: Path) -> None:
    launch = launch_in(tmp_path / "launch", tiny_config, 1, RAY_ADDRESS=ray_head)
    launch.start()
    launch.wait_for_steps(150)
    assert kill_driver(launch)
    launch.wait()
    time.sleep(5)  # Ray ends the workers of a dead driver
    (directory,) = launch.directories()
    last = directory / "lightning_checkpoints" / "last.ckpt"
    content = bytearray(last.read_bytes())
    last.unlink()  # it may be the best one under a second name
    content[len(content) // 2] ^= 1
    last.write_bytes(content[: len(content) // 2] if torn == "cut off" else content)
    launch.start()
    assert launch.wait() == 0, launch.log
    assert f"{last} is damaged" in launch.log
    assert "going on from best-epoch=" in launch.log
    assert sorted(launch.steps()) == list(range(1, 401))
    assert len(losses(launch)) == 400
    assert json.loads((directory / "status.json").read_text())["status"] == "FINISHED"
