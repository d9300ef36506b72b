"""The last command of cluster/kuberay's worker pods, on a node of cluster/local: Ray learns that the node ends, and the node leaves."""

import os
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster_files.placeholders import CLUSTER, filled

pytestmark = pytest.mark.skipif("RAYTRAIN2P_CLUSTER_TESTS" not in os.environ, reason="needs real nodes: make test-cluster")
HEAD = "10.77.0.11:6379"
ALIVE = f"import ray; ray.init('{HEAD}', log_to_driver=False); print(*[n['NodeManagerAddress'] for n in ray.nodes() if n['Alive']])"


def test_a_worker_pod_that_is_deleted_tells_ray_and_its_node_leaves(nodes: Any, tmp_path: Path) -> None:
    """Args: nodes: a tests.cluster.local_nodes.LocalNodes with two nodes."""
    cluster = yaml.safe_load(filled((CLUSTER / "kuberay" / "raycluster.yaml").read_text(), {}))
    (worker,) = cluster["spec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"]
    nodes.check("start", "3", "--num-cpus=1")
    assert "10.77.0.13" in nodes.check("exec", "1", "python", "-c", ALIVE)
    log = tmp_path / "log"
    nodes.start(log, "exec", "3", "env", f"RAY_ADDRESS={HEAD}", *worker["lifecycle"]["preStop"]["exec"]["command"])  # as KubeRay sets it
    deadline = time.monotonic() + 60
    while "10.77.0.13" in nodes.check("exec", "1", "python", "-c", ALIVE):
        assert time.monotonic() < deadline, log.read_text()
    assert "10.77.0.12" in nodes.check("exec", "1", "python", "-c", ALIVE)
