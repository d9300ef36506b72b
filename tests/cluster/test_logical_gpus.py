"""What is asked of Ray for a launch on GPUs, on a head with 16 CPUs and 8 GPUs that Ray counts and this machine does not have."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.launch.launching import DASHBOARD_PORT, PORT, WORKER_PORTS, head, ray_node, run_command

pytestmark = [
    pytest.mark.skipif(os.environ.get("RAYTRAIN2P_CLUSTER_TESTS") != "1", reason="takes minutes: part of `make test-cluster`"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has real GPUs"),
]


@pytest.fixture(scope="module")
def gpu_head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="ray") as sessions:
        gpus = ["--num-cpus=16", "--num-gpus=8", '--resources={"accelerator_type:H100": 1}', f"--temp-dir={sessions}"]
        with ray_node(tmp_path_factory.mktemp("ray"), head(PORT, DASHBOARD_PORT, WORKER_PORTS, *gpus)):
            yield f"127.0.0.1:{PORT}"


def test_encoding_names_a_node_without_cuda(gpu_head: str, tiny_config: Path, tmp_path: Path) -> None:
    done = run_command(tmp_path, "raytrain2p.train", "--phase=1", f"--config={tiny_config}/phase1.yaml", RAY_ADDRESS=gpu_head)
    assert done.code == 2
    assert "PyTorch finds no GPU on" in done.err
    assert "Traceback" not in done.err


def test_workers_take_what_is_said_and_a_node_without_cuda_is_named(gpu_head: str, tiny_config: Path, tmp_path: Path) -> None:
    """A launch on the CPUs encodes; the same launch then takes GPUs for more steps."""
    arguments = ["--phase=1", f"--config={tiny_config}/phase1.yaml", "--launch-id=moves"]
    on_cpus = run_command(tmp_path, "raytrain2p.train", *arguments, "launch.use_gpu=false", "--json", RAY_ADDRESS=gpu_head)
    assert on_cpus.outcome["steps"] == 6
    arguments += ["training.max_steps=12", "launch.cpus_per_worker=null", "launch.num_workers=2"]
    arguments += ["launch.placement_strategy=SPREAD", "launch.accelerator_type=H100"]
    done = run_command(tmp_path, "raytrain2p.train", *arguments, RAY_ADDRESS=gpu_head)
    assert done.code == 1, done.err
    assert "starting 2 workers with 2 CPUs and a GPU (H100) each (launch.use_gpu=auto: the cluster has 8 GPUs)" in done.err
    assert "PyTorch finds no GPU on" in done.err
    assert "Traceback" not in done.err
