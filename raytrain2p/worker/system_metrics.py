"""CPU, memory, network and GPU use of one node, sampled while a run trains."""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from types import MappingProxyType
from typing import Any

import psutil
import ray.train

from raytrain2p.config import Settings
from raytrain2p.tracking.metrics_file import MetricPoint
from raytrain2p.tracking.run import Run
from raytrain2p.tracking.run_writer import RunWriter
from raytrain2p.worker.channel import RunChannel

try:
    import pynvml
except ImportError:
    pynvml = None  # it matters where there are GPUs

SECONDS_BETWEEN_SAMPLES = 10.0


class SystemSampler:
    """A thread that samples its node.

    Points are named `system/<node>/<metric>`; their step is the second since the run began, so that a resumed run does not
    give two points one step.

    Args:
        timestamp: when the run began, as in its directory's name.
        deliver: takes the points of each sample.
        gpus: to sample, as of `reserved_gpus`.
    """

    def __init__(
        self, timestamp: str, deliver: Callable[[Sequence[MetricPoint]], None], gpus: Mapping[str, Any] = MappingProxyType({})
    ) -> None:
        self.began = datetime.strptime(timestamp, "%Y%m%d_%H%M%S").timestamp()
        self.deliver, self.done = deliver, threading.Event()
        self.network = psutil.net_io_counters()
        self.gpus = gpus
        self.thread = threading.Thread(target=self._work, name="system-metrics", daemon=True)
        psutil.cpu_percent()  # the first call has nothing to compare with
        self.thread.start()

    def close(self) -> None:
        self.done.set()
        self.thread.join(5)

    def sample(self) -> list[MetricPoint]:
        """The use of the node now, or since the last sample."""
        memory, network, before = psutil.virtual_memory(), psutil.net_io_counters(), self.network
        self.network = network
        values = {
            "cpu_percent": psutil.cpu_percent(),
            "memory_percent": memory.percent,
            "memory_used_megabytes": memory.used / 1e6,
            "network_received_megabytes": (network.bytes_recv - before.bytes_recv) / 1e6,
            "network_sent_megabytes": (network.bytes_sent - before.bytes_sent) / 1e6,
        }
        for identifier, gpu in self.gpus.items():
            values |= {f"gpu_{identifier}_{name}": value for name, value in gpu_values(gpu).items()}
        now = time.time()
        return [MetricPoint(f"system/{socket.gethostname()}/{name}", value, round(now - self.began), now) for name, value in values.items()]

    def _work(self) -> None:
        while not self.done.wait(SECONDS_BETWEEN_SAMPLES):
            self.deliver(self.sample())


def reserved_gpus() -> dict[str, Any]:
    """NVML's handles of the GPUs that Ray has reserved for the run's workers on this node, by index or UUID; none where NVML is missing.

    Through NVML, since CUDA would take memory of a GPU to ask about it, and counts those of CUDA_VISIBLE_DEVICES from 0 on.
    """
    if pynvml is None or not ray.get_gpu_ids():  # else the variable is somebody else's
        return {}
    try:
        pynvml.nvmlInit()
        return {
            identifier: pynvml.nvmlDeviceGetHandleByIndex(int(identifier))
            if identifier.isdecimal()
            else pynvml.nvmlDeviceGetHandleByUUID(identifier)
            for identifier in filter(
                None, os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
            )  # Ray Train gives a node's workers those of all of them
        }
    except pynvml.NVMLError:
        return {}


def gpu_values(gpu: Any) -> dict[str, float]:
    """What a GPU reports now; some lack a part of it.

    Args:
        gpu: NVML's handle.
    """
    values = dict[str, float]()
    with suppress(pynvml.NVMLError):
        memory = pynvml.nvmlDeviceGetMemoryInfo(gpu)
        values["memory_percent"] = 100 * memory.used / memory.total
    with suppress(pynvml.NVMLError):
        values["utilization_percent"] = pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu
    with suppress(pynvml.NVMLError):
        values["power_watts"] = pynvml.nvmlDeviceGetPowerUsage(gpu) / 1000
    return values


def records_system_metrics(settings: Settings) -> bool:
    """Whether a run records them: GPUs are worth watching, unless the settings say otherwise."""
    chosen = settings.tracking.system_metrics
    return settings.launch.gpus > 0 if chosen is None else chosen


@contextmanager
def system_metrics(run: Run, channel: RunChannel, writer: RunWriter | None) -> Iterator[None]:
    """Within, one worker of each node samples it, and rank 0 writes the samples of all."""

    def deliver(points: Sequence[MetricPoint]) -> None:
        if ray.train.get_context().get_local_rank() == 0:
            channel.put_points(points)
        if writer is not None and (gathered := channel.take_points()):
            writer.write(gathered)

    sampler = SystemSampler(run.timestamp, deliver, reserved_gpus())
    try:
        yield
    finally:
        sampler.close()
