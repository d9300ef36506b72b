"""What is asked of Ray for a launch on GPUs, on a head with 16 CPUs and 8 GPUs that Ray counts and this machine does not have."""

import io
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

from raytrain2p.config.console import Console
from raytrain2p.config.settings import LaunchSettings
from raytrain2p.data.features import FeatureStore
from raytrain2p.launch.cluster import connected
from raytrain2p.launch.driver import say_if_waiting
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


@pytest.fixture
def gpu_cluster(gpu_head: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process is connected to it."""
    monkeypatch.setenv("RAY_ADDRESS", gpu_head)
    with connected(LaunchSettings(), verbose=False) as capacity:
        assert (capacity.gpus, capacity.nodes[0].accelerators, capacity.autoscales) == (8, {"H100"}, False)
        yield


def placements() -> list[tuple[str, list[dict[str, float]]]]:
    """The strategy and the bundles of every group of workers that there was."""
    return [(group["strategy"], list(group["bundles"].values())) for group in ray.util.placement_group_table().values()]


def test_encoding_names_a_node_without_cuda(gpu_head: str, tiny_config: Path, tmp_path: Path) -> None:
    done = run_command(tmp_path, "raytrain2p.train", "--phase=1", f"--config={tiny_config}/phase1.yaml", RAY_ADDRESS=gpu_head)
    assert done.code == 2
    assert "PyTorch finds no GPU on" in done.err
    assert "Traceback" not in done.err


def test_workers_take_what_is_said_and_a_node_without_cuda_is_named(
    gpu_head: str, tiny_config: Path, sweep_config: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """A launch on the CPUs encodes; the same launch then takes GPUs for more steps, and so does a sweep."""
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

    arguments = [f"--config={sweep_config}", "launch.gpus_per_worker=0.25", "sweep.num_trials=1", "sweep.max_failures=0"]
    done = run_command(tmp_path, "raytrain2p.tune", *arguments, RAY_ADDRESS=gpu_head)
    assert ": 16 trials at once" in done.err, "32 by the GPUs, and a CPU each"

    request.getfixturevalue("gpu_cluster")
    taken = placements()
    assert ("SPREAD", [{"CPU": 2.0, "GPU": 1.0, "accelerator_type:H100": 0.001}] * 2) in taken, taken
    assert any(bundles == [{"CPU": 1.0, "GPU": 0.25}] for _, bundles in taken), taken


def test_waiting_for_gpus_is_said(gpu_cluster: None) -> None:
    class Other:
        def ready(self) -> bool:
            return True

    other, log = ray.remote(num_gpus=7, num_cpus=0)(Other).remote(), io.StringIO()
    assert ray.get(other.ready.remote())
    say_if_waiting(2, 1, Console(log))
    assert log.getvalue() == ""
    say_if_waiting(2, 2, Console(log))
    assert log.getvalue() == "waiting for GPUs: 1 of 2 are free, others of this cluster use the rest\n"


def encode_device(texts: Sequence[Any]) -> list[torch.Tensor]:
    """The GPU that Ray gave to this process, for each text."""
    (device,) = ray.get_runtime_context().get_accelerator_ids()["GPU"]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == device
    return [torch.full((1, 1), float(device)) for _ in texts]


def test_each_encoder_process_has_a_gpu_of_its_own(gpu_cluster: None, tmp_path: Path) -> None:
    items = {n.to_bytes(32): f"text {n}" for n in range(600)}  # three shards
    store = FeatureStore(tmp_path, "f" * 64)
    assert store.complete(items, lambda: encode_device, workers=2, cpus=1, gpus=1) == len(items)
    values, _ = store.table(list(items)).gather(range(len(items)))
    assert len(np.unique(values)) == 2
