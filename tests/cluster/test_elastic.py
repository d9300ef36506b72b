"""Workers that become fewer and more with the nodes of the cluster: one run, and the losses of an undisturbed one."""

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.cluster.nodes_that_come_and_go import (
    SECONDS,
    STEPS,
    Cluster,
    LaunchIn,
    changes,
    launcher,
    losses,
    plot,
    spread,
    start_cluster,
    undisturbed_losses,
)

pytestmark = pytest.mark.skipif(os.environ.get("RAYTRAIN2P_CLUSTER_TESTS") != "1", reason="takes minutes: part of `make test-cluster`")
PLOT = "RAYTRAIN2P_ELASTIC_PLOT"  # path of docs/elastic.png


@pytest.fixture(scope="module")
def launch_in(tiny_config: Path, untrained_aligner: Path, shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> LaunchIn:
    return launcher(tiny_config, untrained_aligner, shapes, tmp_path_factory.mktemp("records"))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with ExitStack() as nodes:
        yield start_cluster(tmp_path_factory.mktemp("cluster"), nodes)


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, launch_in: LaunchIn, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    return undisturbed_losses(launch_in, tmp_path_factory.getbasetemp())


def test_a_node_is_lost_and_comes_back(
    cluster: Cluster,
    undisturbed: dict[int, float],
    launch_in: LaunchIn,
    tmp_path: Path,
) -> None:
    if not cluster.second:
        cluster.start_second()
    launch = launch_in(tmp_path, "launch.num_workers=[1, 2]")
    launch.start()
    launch.wait_until(lambda: len(launch.steps()) > 80, SECONDS)
    cluster.lose_second()
    launch.wait_until(lambda: "1 worker from now on, 2 before" in launch.log, SECONDS)
    cluster.start_second()
    launch.wait_until(lambda: "2 workers from now on, 1 before" in launch.log, SECONDS)
    assert launch.wait() == 0, launch.log[-3000:]
    print(launch.log)
    if PLOT in os.environ:
        plot(losses(launch), undisturbed, changes(launch.log), Path(os.environ[PLOT]))
    print(f"largest difference {spread(losses(launch), undisturbed):.1e}")
    (shrunk, _), (grown, _) = changes(launch.log)
    assert shrunk < grown < STEPS, "it trained on one node, and then on both"
    assert spread(losses(launch), undisturbed) < 1e-4
    assert [run.info.status for run in launch.mlflow_runs()] == ["FINISHED"]
