"""Real Ray nodes, in minutes: `make test-cluster` runs these tests."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.conftest import judged  # noqa: F401  (a fixture)
from tests.cluster.local_nodes import Job, LocalNodes, job_in


@pytest.fixture(scope="session", autouse=True)
def wanted() -> None:
    if os.environ.get("RAYTRAIN2P_CLUSTER_TESTS") != "1":
        pytest.skip("takes minutes: make test-cluster")


@pytest.fixture(scope="session")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalNodes]:
    """A head and a second node with one CPU each, and a real `mlflow server` beside them."""
    nodes = LocalNodes(tmp_path_factory.mktemp("nodes"))
    if "cannot be made" in (probed := nodes.run("up", "0")).stderr:
        pytest.skip(f"needs namespaces of its own: {probed.stderr}")
    try:
        nodes.start_mlflow()
        nodes.check("start", "1", "--num-cpus=1")
        nodes.check("start", "2", "--num-cpus=1")
        yield nodes
    finally:
        nodes.run("down")


@pytest.fixture(scope="session")
def undisturbed(nodes: LocalNodes, tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Phase 1 on both nodes: what the disturbed jobs are compared with."""
    job = job_in(tmp_path_factory.mktemp("jobs") / "undisturbed", tiny_config, nodes)
    job.start()
    assert job.wait() == 0, job.log[-5000:]
    return job
