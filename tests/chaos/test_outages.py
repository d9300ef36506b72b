"""MLflow does not answer, the disk is full, read-only or gone, a checkpoint is damaged: nothing is lost, and it is reported."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from raytrain2p.tracking.checkpoints import damage
from tests.chaos.conftest import Judged, Undisturbed
from tests.chaos.killing import Launch, Stopwatch, keep_up, kill_driver, launch_in, only_long, verdict
from tests.chaos.mlflow_server import Server
from tests.disks import Disk
from tests.launch.launching import Command, run_command
from tests.sweep.test_run import SweepLaunch

MANY_STEPS = 1500  # some are left when the outage begins


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.stop()


@only_long
def test_mlflow_is_stopped_in_the_middle_and_everything_arrives_by_sync(
    tmp_path: Path, server: Server, ray_head: str, tiny_config: Path, undisturbed: Undisturbed, judged: Judged
) -> None:
    server.start()
    launch = launch_in(tmp_path / "away", tiny_config, steps=MANY_STEPS, RAY_ADDRESS=ray_head)
    launch.server = server.uri
    launch.arguments = [*launch.arguments, f"tracking.uri={server.uri}"]
    launch.start()
    launch.wait_for_steps(300)
    server.stop()
    stopped, steps = time.time(), len(launch.steps())
    launch.wait_until(lambda: len(launch.steps()) > steps, 60)
    seconds = time.time() - stopped
    assert launch.wait() == 0, launch.log
    assert "training continues, and what MLflow lacks waits on disk" in launch.log
    assert "raytrain2p.runs sync" in launch.log

    def sync() -> Command:
        return run_command(launch.folder, "raytrain2p.runs", "sync", f"tracking.uri={server.uri}")

    assert sync().code == 1  # it is still stopped
    server.start()
    done = sync()
    assert done.code == 0, done.err
    assert "1 of 1 runs are complete in MLflow" in done.out
    (run,) = launch.mlflow_runs()
    assert {artifact.path for artifact in launch.client.list_artifacts(run.info.run_id)} >= {"aligner", "config", "plots"}
    assert sync().code == 0  # sends nothing twice
    judged(
        verdict(
            "MLflow's server stopped while it trains, and started again after its end", launch, undisturbed(1, MANY_STEPS), 1, [seconds]
        )
    )
    server.stop()


def test_mlflow_that_does_not_answer_at_the_start_is_bad_input(tmp_path: Path, ray_head: str, tiny_config: Path) -> None:
    launch = launch_in(tmp_path / "never", tiny_config, RAY_ADDRESS=ray_head)
    launch.arguments = [*launch.arguments, "tracking.uri=http://127.0.0.1:9"]
    launch.start()
    assert launch.wait() == 2, launch.log
    assert "tracking.uri=http://127.0.0.1:9" in launch.log
    assert not (launch.folder / "checkpoints").exists()


@only_long
@pytest.mark.parametrize(
    ("disaster", "restarts", "scenario"),
    [
        ("fill", 0, "disk full"),
        ("make_read_only", 0, "disk read-only"),
        ("take_away", 0, "disk taken away"),
        ("take_away", 1, "disk taken away, and the worker started again without it"),
    ],
)
def test_a_failed_disk_ends_the_run_with_one_line_and_it_resumes_once_the_disk_is_repaired(
    disaster: str,
    restarts: int,
    scenario: str,
    tmp_path: Path,
    disk: Disk,
    ray_head: str,
    tiny_config: Path,
    undisturbed: Undisturbed,
    judged: Judged,
) -> None:
    launch = launch_in(tmp_path / "launch", tiny_config, steps=MANY_STEPS, RAY_ADDRESS=ray_head)
    launch.folder.mkdir()
    (launch.folder / "checkpoints").symlink_to(disk.folder)
    launch.arguments = [*launch.arguments, f"launch.max_failures={restarts}"]
    launch.start()
    launch.wait_for_steps(200)
    getattr(disk, disaster)()
    assert launch.wait() == 1, launch.log
    assert "cannot be written" in launch.log
    assert ("is gone" if disaster == "take_away" else "needed") in launch.log
    assert "Traceback" not in launch.log
    assert "MLflow" not in launch.log  # MLflow is not the cause
    (run,) = launch.mlflow_runs()
    assert run.info.status == "FAILED"
    if disaster == "take_away":
        assert list(disk.folder.iterdir()) == []  # nothing is written to the disk below
    disk.fix()
    if (launch.status() or {})["status"] == "RUNNING" and disaster != "take_away":  # the status could not be written
        assert f"raytrain2p.runs reconcile {run.info.run_id[:8]}" in launch.log
    checkpoints = launch.directories()[0] / "lightning_checkpoints"
    assert (checkpoints / "last.ckpt").is_file()
    assert [damage(path) for path in checkpoints.glob("[!.]*.ckpt")] == [None, None]
    done = run_command(launch.folder, "raytrain2p.runs", "reconcile", run.info.run_id[:8])
    assert done.code == 0, done.out + done.err
    assert (launch.status() or {})["status"] == "FAILED"
    history = launch.client.get_metric_history(run.info.run_id, "train_loss")
    assert sorted(point.step for point in history) == launch.steps()
    judged(verdict(scenario, launch, undisturbed(1, MANY_STEPS), 1, seconds_to_resume(launch)))


@only_long
def test_a_full_disk_under_the_feature_store_is_bad_input_and_what_was_computed_stays(
    tmp_path: Path, disk: Disk, ray_head: str, tiny_config: Path, undisturbed: Undisturbed, judged: Judged
) -> None:
    launch = launch_in(tmp_path / "launch", tiny_config, RAY_ADDRESS=ray_head, RAYTRAIN2P_FEATURES=str(disk.folder))
    disk.fill()
    launch.start()
    assert launch.wait() == 2, launch.log
    assert f"data.feature_store={disk.folder}" in launch.log
    assert "no space left" in launch.log
    assert "Traceback" not in launch.log
    assert launch.mlflow_runs() == []
    disk.fix()
    waits = seconds_to_resume(launch)
    judged(verdict("disk of the feature store full at the start", launch, undisturbed(), 1, waits))


@only_long
def test_a_sweep_whose_disk_is_taken_away_ends_with_one_line(tmp_path: Path, disk: Disk, ray_head: str, sweep_config: Path) -> None:
    launch = SweepLaunch(tmp_path / "sweep", [f"--config={sweep_config}", "training.max_steps=100000"], {"RAY_ADDRESS": ray_head})
    launch.folder.mkdir()
    (launch.folder / "checkpoints").symlink_to(disk.folder)
    launch.start()
    launch.wait_for_steps(200)
    disk.take_away()
    assert launch.wait() == 1, launch.log
    *_, what, why = launch.log.splitlines()
    assert "the sweep failed" in what
    assert "is gone" in why
    assert {path.name for path in disk.folder.iterdir()} <= {".ray"}  # Ray Tune's own state; no run is started there
    assert {run.info.status for run in launch.mlflow_runs()} == {"FAILED"}


@only_long
@pytest.mark.parametrize("torn", ["cut off", "one bit wrong"])
def test_a_damaged_last_checkpoint_is_reported_and_the_best_is_used(
    torn: str, tmp_path: Path, ray_head: str, tiny_config: Path, undisturbed: Undisturbed, judged: Judged
) -> None:
    launch = launch_in(tmp_path / "launch", tiny_config, RAY_ADDRESS=ray_head)
    launch.start()
    launch.wait_for_steps(150)
    assert kill_driver(launch)
    launch.wait()
    time.sleep(5)  # until Ray has ended the killed driver's workers
    (directory,) = launch.directories()
    last = directory / "lightning_checkpoints" / "last.ckpt"
    content = bytearray(last.read_bytes())
    last.unlink()  # it may be a hard link of the best one
    content[len(content) // 2] ^= 1
    last.write_bytes(content[: len(content) // 2] if torn == "cut off" else content)
    waits = seconds_to_resume(launch)
    assert f"{last} is damaged" in launch.log
    assert "resuming from best-epoch=" in launch.log
    judged(verdict(f"driver killed, and last.ckpt {torn}", launch, undisturbed(), 1, waits))


def seconds_to_resume(launch: Launch) -> list[float]:
    """Launch it again, to its end, and return the seconds to its next step."""
    stopwatch = Stopwatch(launch)
    stopwatch.start(time.time())
    launch.start()
    keep_up(launch, stopwatch, lambda: False)
    assert launch.starts == 2, launch.log
    return stopwatch.measured
