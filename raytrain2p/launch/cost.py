"""What a step costs on machines that are not here (`--dry-run --on nodes=8,gpus=8,gpu=h100`), or on this one, measured (`--calibrate`).

On paper, an operation takes as long as its products need at the rate of the GPU, or its bytes at that of the memory, whichever is
longer (the roofline model, doi:10.1145/1498765.1498785), and a pass no less than Python needs to start its operations.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from raytrain2p.config import InputError, Problem, Settings
from raytrain2p.launch.places import size
from raytrain2p.models.gpus import GPUS, Gpu
from raytrain2p.models.precision import resolve_precision
from raytrain2p.models.timing import COLD, seconds_of
from raytrain2p.models.tracing import Operation
from raytrain2p.phases.inputs import PhaseInputs, planned_steps

ON = "--on"
REACHED = 0.5  # of a data sheet's rates: an H100's kernels took 49 and 199 ms, where these say 24 and 94 (docs/measurements.md)
START = 2e-5  # seconds in which Python starts an operation: 134 ms for 6,158 kernels beside an H100, docs/measurements.md
LATENCY = 2e-5  # seconds of a message between nodes
BUCKET = 25e6  # bytes that DDP exchanges at once
OPTIMIZER_BYTES = 4 * 10  # read and written for each parameter: clipping 3, of AdamW gradient 1, weight 2 and moments 4, in float32
CALIBRATION = 20.0  # seconds


@dataclass(frozen=True)
class Machines:
    """So many GPUs in each of so many nodes.

    Args:
        kind: of GPU, a key of GPUS.
        network: of a node, bits a second.
    """

    nodes: int
    gpus: int
    kind: str
    network: float

    @property
    def workers(self) -> int:
        return self.nodes * self.gpus

    @property
    def gpu(self) -> Gpu:
        return GPUS[self.kind]

    @property
    def link(self) -> float:
        """Bytes a second of a ring through all: where it leaves a node, its GPUs share the network."""
        return min(self.gpu.link, self.network / 8) if self.nodes > 1 else self.gpu.link

    def __str__(self) -> str:
        return f"{self.nodes} x {self.gpus} {self.kind}"


def parsed_machines(text: str) -> Machines:
    """Of `nodes=8,gpus=8,gpu=h100`; `network=400` is of a node, in Gbit/s.

    Raises:
        InputError: everything that is wrong with it.
    """
    found = dict(part.partition("=")[::2] for part in text.split(","))
    known = ("nodes", "gpus", "gpu", "network")
    problems = [Problem(f"{ON} {name}", "is unknown", f"known: {', '.join(known)}") for name in found.keys() - set(known)]
    for name in {"nodes", "gpus", "network"} & found.keys():
        if not found[name].isdecimal() or not 0 < int(found[name]) < 1e6:
            problems.append(Problem(f"{ON} {name}={found[name]}", "is not a whole number over 0", f"as in {ON} nodes=8,gpus=8,gpu=h100"))
    kind = found.get("gpu", "").lower()
    if kind not in GPUS:
        problems.append(Problem(f"{ON} gpu={kind}", "is not in the table", f"take one of {', '.join(GPUS)}; or run --calibrate on it"))
    if problems:
        raise InputError(problems)
    network = int(found["network"]) * 1e9 if "network" in found else GPUS[kind].network
    return Machines(int(found.get("nodes", 1)), int(found.get("gpus", 1)), kind, network)


@dataclass(frozen=True)
class Speed:
    """Of one GPU, or of this machine.

    Args:
        of_pass: seconds.
        bandwidth: of memory, bytes a second.
        because: what it rests on.
    """

    of_pass: float
    bandwidth: float
    because: str


def speed_on_paper(operations: Counter[Operation], gpu: Gpu) -> Speed:
    flops, bandwidth = REACHED * gpu.flops, REACHED * gpu.bandwidth
    working = sum(count * max(one.flops / flops, one.bytes / bandwidth) for one, count in operations.items())
    rates = f"{REACHED:.0%} of {gpu.flops / 1e12:,.0f} TFLOP/s and of {gpu.bandwidth / 1e12:,.2f} TB/s, NVIDIA's figures"
    starting = START * operations.total()
    because = (
        f"{operations.total():,} operations of a pass work for {working:.3f} s ({rates}), and Python needs {starting:.3f} s to start them"
    )
    return Speed(max(working, starting), bandwidth, because)


def speed_here(operations: Counter[Operation], device: torch.device) -> Speed:
    """Measured. What there is no time to measure takes as long for its bytes as what was."""
    measured = seconds_of(operations, device, CALIBRATION)
    of_measured = sum(operations[one] * seconds for one, seconds in measured.items())
    share = sum(operations[one] * one.bytes for one in measured) / sum(count * one.bytes for one, count in operations.items())
    bandwidth = max((one.bytes / seconds for one, seconds in measured.items() if not one.flops and one.bytes > COLD), default=1e10)
    because = f"{len(measured)} of {len(operations)} operations were measured on this machine, {share:.0%} of the bytes of a pass"
    return Speed(of_measured / share, bandwidth, because)


def exchange_seconds(machines: Machines, strategy: str, frozen: int, trained: int, units: int, passes: int) -> float:
    """Of a step, through rings: each GPU sends and receives (n-1)/n of what is gathered or scattered, and twice that of what is reduced.

    Args:
        frozen, trained: parameters.
        units: that FSDP gathers one by one.
    """
    others, hops = (machines.workers - 1) / machines.workers, math.log2(machines.workers)
    if strategy != "fsdp":
        calls = math.ceil(4 * trained / BUCKET)
        return 2 * others * 4 * trained / machines.link + 2 * calls * hops * LATENCY
    gathered, scattered = 2 * 2 * (frozen + trained), 4 * trained  # for each of the two passes, in bfloat16; gradients in float32
    return passes * (others * (gathered + scattered) / machines.link + 3 * units * hops * LATENCY)


def layers(parts: Mapping[str, nn.Module]) -> list[nn.Module]:
    """Of all models among the parts."""
    lists = [[one for one in part.modules() if isinstance(one, nn.ModuleList)] for part in parts.values()]
    return [layer for found in lists if found for layer in max(found, key=len)]


@dataclass(frozen=True)
class Cost:
    """Of a step.

    Args:
        passes: that a worker makes in a step.
        optimizer, exchange: seconds; the exchange of gradients, and of shards, as if nothing of it were hidden behind the passes.
        tokens: of a step, over all workers, without padding.
        flops: that these need, of all workers.
        steps: of the training.
    """

    machines: Machines | None
    workers: int
    speed: Speed
    passes: int
    optimizer: float
    exchange: float
    tokens: int
    flops: float
    steps: int

    @property
    def seconds(self) -> tuple[float, float]:
        """If the exchange is hidden, and if it is not."""
        of_passes = self.passes * self.speed.of_pass
        return max(of_passes, self.exchange) + self.optimizer, of_passes + self.exchange + self.optimizer

    @property
    def mfu(self) -> tuple[float, float] | None:
        """Model FLOPs utilization, if the GPU is known; the lower one first."""
        if self.machines is None:
            return None
        least, most = self.seconds
        rate = self.machines.gpu.flops * self.workers
        return self.flops / most / rate, self.flops / least / rate

    def lines(self, memory: float) -> list[str]:
        """What is printed.

        Args:
            memory: of a worker, bytes.
        """
        least, most = self.seconds
        hours = [self.steps * seconds / 3600 for seconds in self.seconds]
        lines = [f"on                 {self.machines or 'this machine'}: {self.workers} workers"]
        if self.machines:
            lines.append(f"memory             {size(round(memory))} of {size(round(self.machines.gpu.memory))} a GPU")
        lines += [
            f"step               {least:.3f} to {most:.3f} s, with and without {self.exchange:.3f} s of exchange behind the passes",
            f"                   {self.passes} x {self.speed.of_pass:.3f} s of passes, {self.optimizer:.3f} s of the optimizer",
            f"tokens per second  {self.tokens / most:,.0f} to {self.tokens / least:,.0f}",
        ]
        if self.mfu:
            lines.append("MFU                {:.1%} to {:.1%}".format(*self.mfu))
        lines.append(f"training           {hours[0]:,.2f} to {hours[1]:,.2f} hours, {self.workers * hours[1]:,.1f} worker hours")
        lines.append(f"this rests on      {self.speed.because}")
        if self.machines and self.workers > 1:
            lines.append(
                f"                   {self.machines.link / 1e9:,.0f} GB/s between GPUs in one direction, {LATENCY * 1e6:.0f} us a message"
            )
        return lines


def cost_of(settings: Settings, inputs: PhaseInputs, machines: Machines | None, calibrate: bool, frozen: int, trained: int) -> Cost:
    """What a step takes.

    Args:
        machines: None: this one.
        calibrate: operations are measured on this machine.
        frozen, trained: parameters that a worker holds.
    """
    training, strategy = settings.training, settings.launch.strategy
    workers = machines.workers if machines else settings.launch.min_workers
    device = torch.device("cuda" if settings.launch.gpus and torch.cuda.is_available() else "cpu")
    precision = "bf16" if machines else resolve_precision(training.precision, device)
    operations = inputs.pass_of(precision, workers, longest=False).operations
    speed = speed_on_paper(operations, machines.gpu) if machines and not calibrate else speed_here(operations, device)
    passes, units = training.gradient_accumulation_steps(workers), len(layers(inputs.parts()))
    return Cost(
        machines,
        workers,
        speed,
        passes,
        OPTIMIZER_BYTES * trained / (workers if strategy == "fsdp" else 1) / speed.bandwidth,
        exchange_seconds(machines, strategy, frozen, trained, units, passes) if machines else 0.0,
        inputs.tokens_per_step(),
        inputs.tokens_per_step() * inputs.flops_per_token(),
        planned_steps(training, inputs.records),
    )
