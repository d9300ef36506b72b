"""Nodes that are taken away with notice: a checkpoint inside the warning window, one run, and the losses of an undisturbed one."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.cluster.nodes_that_come_and_go import SECONDS, Cluster, LaunchIn, launcher, losses, spread, start_cluster, undisturbed_losses

pytestmark = pytest.mark.skipif(os.environ.get("RAYTRAIN2P_CLUSTER_TESTS") != "1", reason="takes minutes: part of `make test-cluster`")
TAKEN = "a node is taken away: the workers start again elsewhere, from step "


@pytest.fixture(scope="module")
def launch_in(tiny_config: Path, untrained_aligner: Path, shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> LaunchIn:
    return launcher(tiny_config, untrained_aligner, shapes, tmp_path_factory.mktemp("records"))


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with ExitStack() as nodes:
        yield start_cluster(tmp_path_factory.mktemp("cluster"), nodes)


@pytest.fixture
def undisturbed(cluster: Cluster, launch_in: LaunchIn, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    return undisturbed_losses(launch_in, tmp_path_factory.getbasetemp())


def test_a_drained_node_costs_no_step_and_the_group_waits_for_another(
    cluster: Cluster, undisturbed: dict[int, float], launch_in: LaunchIn, tmp_path: Path
) -> None:
    """Checkpoints are saved at epochs' ends alone, and no failure is allowed: what is resumed was saved because of the notice."""
    cluster.start_second()
    launch = launch_in(tmp_path, "launch.num_workers=2", "launch.max_failures=0", "checkpoint.every_steps=null")
    launch.start()
    launch.wait_until(lambda: len(launch.steps()) > 40, SECONDS)
    cluster.drain("127.0.0.3", 30)
    drained = time.monotonic()
    launch.wait_until(lambda: TAKEN in launch.log, 30)
    launch.wait_until(lambda: "waiting for nodes: 2 workers need 1 CPU each, and there is room for 1" in launch.log, 60)
    print(f"checkpoint {time.monotonic() - drained:.1f} s after the notice")
    step = int(launch.log.partition(TAKEN)[2].split()[0])
    cluster.lose_second()
    cluster.start_second()
    assert launch.wait() == 0, launch.log[-3000:]
    print(launch.log)
    assert f"at step {step}\n" in launch.log, "not a step was lost"
    assert spread(losses(launch), undisturbed) < 1e-4
    assert [run.info.status for run in launch.mlflow_runs()] == ["FINISHED"]


def test_a_launch_whose_own_node_is_drained_stops_with_a_checkpoint(cluster: Cluster, launch_in: LaunchIn, tmp_path: Path) -> None:
    """As at a SIGTERM: the driver ends with its node."""
    launch = launch_in(tmp_path, "checkpoint.every_steps=null")
    launch.start()
    launch.wait_until(lambda: len(launch.steps()) > 40, SECONDS)
    cluster.drain("127.0.0.2", 30)
    assert launch.wait() == 128 + signal.SIGTERM, launch.log[-3000:]
    print(launch.log)
    assert "the node of this launch is taken away" in launch.log
    assert "--resume" in launch.log
    assert [run.info.status for run in launch.mlflow_runs()] == ["KILLED"]
    assert (launch.directories()[0] / "lightning_checkpoints" / "last.ckpt").is_file()
