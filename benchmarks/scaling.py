"""A step of phase 2 on 1, 2 and 4 workers over Gloo, one thread each: measured, and predicted by a model with measured parameters.

    python -m benchmarks.scaling [--steps 4] [--turns 5]

Every group of workers makes the same steps of the same global batches, through torch's DistributedDataParallel as the program does,
without Ray. All groups are alive and take turns, since the speed of a shared machine drifts; of each, the fastest turn counts. In
other turns the workers do not exchange gradients: the difference is what communication costs. The model is that of a ring:

    t(n) = c(b / n) * max(1, n / cores) + calls * 2 (n - 1) * latency + 2 (n - 1) / n * bytes / bandwidth

with b records in the global batch; c, one worker's time for its share, is measured alone, latency and bandwidth with all-reduces
of one number and of a step's bytes between two workers. Needs a finished phase 1 run in ./checkpoints (`make quickstart` makes one).
"""

import argparse
import multiprocessing
import os
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

SIZES = (1, 2, 4)
NETWORKS = {"1 Gbit/s": 1e9 / 8, "10 Gbit/s": 10e9 / 8, "100 Gbit/s": 100e9 / 8}
NETWORK_LATENCY = 50e-6  # seconds, of a TCP network in one room


class Loss(nn.Module):
    """DistributedDataParallel exchanges gradients of what was called as a module."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: Any) -> torch.Tensor:
        return self.module.total_loss(batch)


class Worker:
    """One worker of a group; its methods are called by name, on all workers of the group at once."""

    def __init__(self, rank: int, size: int, folder: Path, aligner: str, steps: int) -> None:
        from raytrain2p.config import InstructionSettings, load_settings
        from raytrain2p.models.precision import resolve_precision
        from raytrain2p.phases.instruction import data, module

        torch.set_num_threads(1)
        torch.manual_seed(0)
        self.rank, self.size, self.steps, self.bytes, self.calls = rank, size, steps, 0, 0
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous{size}", rank=rank, world_size=size)
        self.settings = load_settings(2, None, [f"model.aligner={aligner}", "data.test={}", "data.val=null"])
        assert isinstance(self.settings, InstructionSettings)
        self.split = data.read_inputs(self.settings).prepare()["train"]
        self.precision = resolve_precision(self.settings.training.precision, torch.device("cpu"))
        inner: Any = module.build(self.settings, steps, self.precision)
        inner.trainer = self.trainer = SimpleNamespace(world_size=size)  # the module keeps a weak reference
        self.trained = [parameter for parameter in inner.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, weight_decay=0.0, fused=True)
        self.alone = Loss(inner)
        self.together = nn.parallel.DistributedDataParallel(self.alone, gradient_as_bucket_view=True) if size > 1 else None
        if self.together is not None:
            self.together.register_comm_hook(None, self.count)

    def count(self, state: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        """DDP's own all-reduce, counted."""
        buffer = bucket.buffer()
        self.bytes, self.calls = self.bytes + buffer.numel() * buffer.element_size(), self.calls + 1
        work = dist.all_reduce(buffer.div_(self.size), async_op=True)
        return work.get_future().then(lambda future: future.value()[0])

    def turn(self, exchange: bool, share_of: int) -> tuple[float, list[float], int, int]:
        """All steps once.

        Args:
            exchange: the gradients.
            share_of: the number of workers among whom the global batch is divided.

        Returns:
            Seconds of a step, the losses (of the global batch if it is all there), bytes and calls of all-reduce in a step.
        """
        from raytrain2p.models.distributed import WorkerGroup
        from raytrain2p.worker.loaders import train_sampler

        sampler = train_sampler(self.settings, self.split, WorkerGroup(self.rank, share_of))
        micro_batches = [one for one, _ in zip(sampler, range(self.steps), strict=False)]
        self.bytes, self.calls, losses = 0, 0, []
        self.trainer.world_size = share_of
        dist.barrier()
        begin = time.perf_counter()
        for micro_batch in micro_batches:
            self.optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bf16"):
                loss = (self.together if exchange and self.together else self.alone)(self.split[micro_batch])
            loss.backward()
            nn.utils.clip_grad_norm_(self.trained, 1.0)
            self.optimizer.step()
            losses.append(loss.detach())
        dist.barrier()
        seconds = (time.perf_counter() - begin) / self.steps
        mean = torch.stack(losses) / self.size
        dist.all_reduce(mean)
        return seconds, mean.tolist(), self.bytes // self.steps, self.calls // self.steps

    def reset(self, state: Any = None) -> None:
        """The weights of the beginning, so that every group has the same losses."""
        if not hasattr(self, "first"):
            self.first = [parameter.detach().clone() for parameter in self.trained]
        with torch.no_grad():
            for parameter, first in zip(self.trained, self.first, strict=True):
                parameter.copy_(first)
        self.optimizer.state.clear()

    def all_reduce(self, count: int, repeats: int = 20) -> float:
        """Seconds of an all-reduce of so many float32 numbers: the fastest."""
        values, fastest = torch.ones(count), float("inf")
        for _ in range(repeats):
            dist.barrier()
            begin = time.perf_counter()
            dist.all_reduce(values)
            fastest = min(fastest, time.perf_counter() - begin)
        return fastest


def serve(connection: Connection, *arguments: Any) -> None:
    """A worker's process: calls that arrive, until there is none."""
    worker = Worker(*arguments)
    connection.send(None)
    while (call := connection.recv()) is not None:
        name, *values = call
        connection.send(getattr(worker, name)(*values))
    dist.destroy_process_group()


class Group:
    """The processes of so many workers."""

    def __init__(self, size: int, *arguments: Any) -> None:
        context = multiprocessing.get_context("forkserver")
        self.size, self.connections = size, list[Connection]()
        for rank in range(size):
            mine, other = context.Pipe()
            context.Process(target=serve, args=(other, rank, size, *arguments), daemon=True).start()
            self.connections.append(mine)

    def ready(self) -> None:
        for connection in self.connections:
            connection.recv()

    def call(self, *call: Any) -> Any:
        """What rank 0 returns."""
        for connection in self.connections:
            connection.send(call)
        answers = [connection.recv() for connection in self.connections]
        return answers[0]

    def end(self) -> None:
        for connection in self.connections:
            connection.send(None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4, help="of a turn")
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()

    from raytrain2p.config.phases import ALIGNMENT
    from raytrain2p.tracking.find import find_artifact

    aligner = str(find_artifact("checkpoints", ALIGNMENT, "latest", "model.aligner"))
    fastest: dict[tuple[str, int], float] = {}
    with tempfile.TemporaryDirectory() as folder:
        groups = {size: Group(size, Path(folder), aligner, options.steps) for size in SIZES}
        for group in groups.values():
            group.ready()
        losses, traffic = {}, {}
        for turn in range(options.turns + 1):  # the first one is cold
            for size, group in groups.items():
                turns = {"together": (group, True, size)}
                if size > 1:
                    turns |= {"no exchange": (group, False, size), "share": (groups[1], False, size)}
                for kind, (of, exchange, share_of) in turns.items():
                    of.call("reset")
                    seconds, found, *counted = of.call("turn", exchange, share_of)
                    if kind == "together":
                        losses[size], traffic[size] = found, counted
                    if turn:
                        fastest[kind, size] = min(seconds, fastest.get((kind, size), float("inf")))
            print(f"turn {turn} of {options.turns}", end="\r", flush=True)
        size_bytes, calls = traffic[2]
        small, large = groups[2].call("all_reduce", 1), groups[2].call("all_reduce", size_bytes // 4)
        for group in groups.values():
            group.end()
    latency, bandwidth = small / 2, size_bytes / (large - small)
    report(fastest, losses, size_bytes, calls, latency, bandwidth)


def communication(size: int, size_bytes: int, calls: int, latency: float, bandwidth: float) -> float:
    """Seconds of a step, by the model."""
    return calls * 2 * (size - 1) * latency + 2 * (size - 1) / size * size_bytes / bandwidth


def report(
    fastest: dict[tuple[str, int], float], losses: dict[int, list[float]], size_bytes: int, calls: int, latency: float, bandwidth: float
) -> None:
    """Print the table."""
    name = next((line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "?")
    print(f"{name}, {os.cpu_count()} cores")
    print(f"all-reduced in a step: {size_bytes / 1e6:.1f} MB in {calls} calls; latency {latency * 1e6:.0f} us, {bandwidth / 1e9:.2f} GB/s")
    print("| workers | seconds a step | speed | no exchange | of a step, communication | share alone | predicted | measured / predicted |")
    for size in SIZES:
        together = fastest["together", size]
        without, share = (fastest.get((kind, size), together) for kind in ("no exchange", "share"))
        predicted = share * max(1, size / (os.cpu_count() or 1)) + communication(size, size_bytes, calls, latency, bandwidth)
        cells = [f"{size}", f"{together:.3f}", f"{fastest['together', 1] / together:.2f}", f"{without:.3f}"]
        cells += [f"{1 - without / together:.1%}", f"{share:.3f}", f"{predicted:.3f}", f"{together / predicted:.2f}"]
        print(f"| {' | '.join(cells)} |")
    worst = max(abs(one - other) for size in SIZES for one, other in zip(losses[1], losses[size], strict=True))
    print(f"losses of {len(losses[1])} steps differ by at most {worst:.1e} between the groups")
    print("by the model alone, milliseconds of communication in a step, none of it overlapped:")
    for network, rate in NETWORKS.items():
        times = (f"{size} workers {1e3 * communication(size, size_bytes, calls, NETWORK_LATENCY, rate):.0f}" for size in (2, 8, 64))
        print(f"  {network}: {', '.join(times)}")


if __name__ == "__main__":
    main()
