"""CPU, memory and network of this node, really sampled."""

import socket
import threading
import time
from collections.abc import Sequence
from datetime import datetime
from types import SimpleNamespace

import pytest
import ray
import torch

from raytrain2p.config import load_settings
from raytrain2p.tracking.metrics_file import MetricPoint
from raytrain2p.worker import system_metrics
from raytrain2p.worker.system_metrics import SystemSampler, records_system_metrics, reserved_gpus


def ago(seconds: float) -> str:
    """A moment as the name of a run directory has it."""
    return datetime.fromtimestamp(time.time() - seconds).strftime("%Y%m%d_%H%M%S")


@pytest.mark.parametrize(
    ("overrides", "records"),
    [
        ([], False),
        (["launch.use_gpu=true"], True),
        (["launch.use_gpu=true", "tracking.system_metrics=false"], False),
        (["tracking.system_metrics=true"], True),
    ],
)
def test_they_are_recorded_on_gpus_unless_the_settings_say_otherwise(overrides: list[str], records: bool) -> None:
    assert records_system_metrics(load_settings(2, None, overrides)) is records


def test_a_sample_has_plausible_values_of_this_node() -> None:
    sampler = SystemSampler(ago(1000), lambda points: None)
    sampler.close()
    found = {point.name: point.value for point in sampler.sample()}
    node = f"system/{socket.gethostname()}"
    assert {f"{node}/cpu_percent", f"{node}/memory_percent", f"{node}/memory_used_megabytes"} <= set(found)
    assert 0 < found[f"{node}/memory_percent"] <= 100
    assert found[f"{node}/memory_used_megabytes"] > 1
    assert all(value >= 0 for value in found.values())


def test_the_step_of_a_sample_counts_seconds_since_the_run_began_also_after_a_resume() -> None:
    first, second = SystemSampler(ago(1000), lambda points: None), SystemSampler(ago(5000), lambda points: None)
    for sampler in (first, second):
        sampler.close()
    steps = [{point.step for point in sampler.sample()} for sampler in (first, second)]
    assert [len(one) for one in steps] == [1, 1]
    assert steps[0].pop() in range(999, 1100)
    assert steps[1].pop() in range(4999, 5100)


@pytest.mark.timeout(60)
def test_samples_are_delivered_until_it_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system_metrics, "SECONDS_BETWEEN_SAMPLES", 0.01)
    delivered: list[Sequence[MetricPoint]] = []
    three = threading.Event()

    def deliver(points: Sequence[MetricPoint]) -> None:
        delivered.append(points)
        if len(delivered) == 3:
            three.set()

    sampler = SystemSampler(ago(0), deliver)
    three.wait()
    sampler.close()
    assert not sampler.thread.is_alive()
    names = [{point.name for point in points} for points in delivered]
    assert names[0] == names[1] == names[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="has NVML; tests/launch/test_gpu.py has what it reports")
@pytest.mark.parametrize("reserved", ["0", "GPU-5d0a4bb2-0000-0000-0000-000000000000"])
def test_where_nvml_is_missing_there_are_no_points_of_gpus(monkeypatch: pytest.MonkeyPatch, reserved: str) -> None:
    """As with logical GPUs, `ray start --num-gpus=8`."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", reserved)
    monkeypatch.setattr(ray, "get_gpu_ids", lambda: [reserved])
    assert reserved_gpus() == {}


class Nvml:
    """Stands in for the module where no GPU is: a device with half its memory used, which does not report its power, as a part of one."""

    NVMLError = RuntimeError
    nvmlInit = staticmethod(lambda: None)
    nvmlDeviceGetMemoryInfo = staticmethod(lambda device: SimpleNamespace(used=1, total=2))
    nvmlDeviceGetUtilizationRates = staticmethod(lambda device: SimpleNamespace(gpu=7))
    nvmlDeviceGetHandleByIndex = nvmlDeviceGetHandleByUUID = staticmethod(lambda identifier: identifier)

    @staticmethod
    def nvmlDeviceGetPowerUsage(device: object) -> int:
        raise Nvml.NVMLError("not supported")


def test_the_gpus_of_a_node_are_those_that_ray_has_reserved_by_number_or_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system_metrics, "pynvml", Nvml)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,MIG-5d0a4bb2")
    monkeypatch.setattr(ray, "get_gpu_ids", list)
    assert reserved_gpus() == {}, "Ray does not hide GPUs from a worker that has none"
    monkeypatch.setattr(ray, "get_gpu_ids", lambda: ["3"])
    assert reserved_gpus() == {"3": 3, "MIG-5d0a4bb2": "MIG-5d0a4bb2"}, "of its other worker, too"
    sampler = SystemSampler(ago(0), lambda points: None, reserved_gpus())
    sampler.close()
    found = {point.name.rpartition("/")[2]: point.value for point in sampler.sample() if "gpu" in point.name}
    assert found == {
        "gpu_3_memory_percent": 50.0,
        "gpu_3_utilization_percent": 7,
        "gpu_MIG-5d0a4bb2_memory_percent": 50.0,
        "gpu_MIG-5d0a4bb2_utilization_percent": 7,
    }
