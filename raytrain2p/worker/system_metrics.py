"""CPU, memory, network and GPU use of one node, sampled while a run trains."""

import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime

import psutil
import ray.train
import torch

from raytrain2p.config import Settings
from raytrain2p.tracking.metrics_file import MetricPoint
from raytrain2p.tracking.run import Run
from raytrain2p.tracking.run_writer import RunWriter
from raytrain2p.worker.channel import RunChannel

SECONDS_BETWEEN_SAMPLES = 10.0


class SystemSampler:
    """A thread that samples its node.

    Points are named `system/<node>/<metric>`; their step is the second since the run began, so that a resumed run does not
    give two points one step.

    Args:
        timestamp: when the run began, as in its directory's name.
        deliver: takes the points of each sample.
    """

    def __init__(self, timestamp: str, deliver: Callable[[Sequence[MetricPoint]], None]) -> None:
        self.began = datetime.strptime(timestamp, "%Y%m%d_%H%M%S").timestamp()
        self.deliver, self.done = deliver, threading.Event()
        self.network = psutil.net_io_counters()
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
        for device in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(device)
            values[f"gpu_{device}_memory_percent"] = 100 * (1 - free / total)
        now = time.time()
        return [MetricPoint(f"system/{socket.gethostname()}/{name}", value, round(now - self.began), now) for name, value in values.items()]

    def _work(self) -> None:
        while not self.done.wait(SECONDS_BETWEEN_SAMPLES):
            self.deliver(self.sample())


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

    sampler = SystemSampler(run.timestamp, deliver)
    try:
        yield
    finally:
        sampler.close()
