"""CPU, memory and network of this node, really sampled."""

import socket
import threading
import time
from collections.abc import Sequence
from datetime import datetime

import pytest

from raytrain2p.config import load_settings
from raytrain2p.tracking.metrics_file import MetricPoint
from raytrain2p.worker import system_metrics
from raytrain2p.worker.system_metrics import SystemSampler, records_system_metrics


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
