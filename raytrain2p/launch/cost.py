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
from raytrain2p.config.settings import cross_field_problems, flatten
from raytrain2p.launch.places import size
from raytrain2p.models.gpus import GPUS, Gpu, gpu_of
from raytrain2p.models.parameters import count_of, count_parameters
from raytrain2p.models.precision import resolve_precision
from raytrain2p.models.timing import COLD, seconds_of
from raytrain2p.models.tracing import Operation
from raytrain2p.phases.inputs import PhaseInputs, planned_steps

REACHED = 0.5  # of a data sheet's rates, on an H100: docs/measurements.md
START = 2e-5  # seconds in which Python starts an operation: 134 ms for 6,158 kernels beside that H100
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

    def link(self, workers: int) -> float:
        """Bytes a second of rings through so many: where they leave a node, they share its network."""
        return min(self.gpu.link, self.network / 8) if workers > self.gpus else self.gpu.link

    def __str__(self) -> str:
        return f"{self.nodes} x {self.gpus} {self.kind}"


def parsed_machines(text: str) -> Machines:
    """Of `nodes=8,gpus=8,gpu=h100`; `network=400` is of a node, in Gbit/s.

    Raises:
        InputError: everything that is wrong with it.
    """
    pairs = [part.partition("=")[::2] for part in text.split(",") if part]
    found, counts, known = dict(pairs), Counter(name for name, _ in pairs), ("nodes", "gpus", "gpu", "network")
    problems = [Problem(f"--on {name}", "is unknown", f"known: {', '.join(known)}") for name in sorted(found.keys() - set(known))]
    problems += [Problem(f"--on {name}", f"comes {count} times", "leave one") for name, count in counts.items() if count > 1]
    for name in ("nodes", "gpus", "network"):
        value = found.get(name, "1")
        if not value.isdecimal() or not 0 < int(value) <= 10_000:
            problems.append(Problem(f"--on {name}={value}", "is no whole number from 1 to 10,000", "as in --on nodes=8,gpus=8,gpu=h100"))
    kind = found.get("gpu", "").lower()
    if kind not in GPUS:
        problems.append(Problem(f"--on gpu={kind}", "is not in the table", f"take one of {', '.join(GPUS)}"))
    if problems:
        raise InputError(problems)
    network = int(found["network"]) * 1e9 if "network" in found else GPUS[kind].network
    return Machines(int(found.get("nodes", 1)), int(found.get("gpus", 1)), kind, network)


def settings_on(settings: Settings, machines: Machines) -> Settings:
    """The settings of a run there.

    Raises:
        InputError: the global batch cannot be divided among so many workers; or the precision is one of which no rate is known.
    """
    launch = settings.launch.model_copy(update={"num_workers": machines.workers, "use_gpu": True})
    there = settings.model_copy(update={"launch": launch})
    problems = cross_field_problems(flatten(there), there.accumulates)
    if settings.training.precision == "float32":
        what = "the table of GPUs has rates in bfloat16 alone"
        problems.append(Problem("training.precision=float32 with --on", what, "set training.precision=auto or bf16"))
    if problems:
        raise InputError(problems)
    return there


@dataclass(frozen=True)
class Weights:
    """Parameters that a worker holds.

    Args:
        frozen, trained: of what is trained, its frozen parts included.
        encoders: bytes of those that run within the step; they are never sharded.
        layers: of each layer of the language model.
        quantized: of the frozen ones, those in 4 bits; they are never sharded either.
    """

    frozen: int
    trained: int
    encoders: int
    layers: list[int]
    quantized: int = 0

    @property
    def gathered(self) -> int:
        """At once, if they are sharded: a layer that works, the next one, and all that is in no layer."""
        return 2 * max(self.layers, default=0) + self.frozen + self.trained - sum(self.layers)


def weights_of(settings: Settings, parts: Mapping[str, nn.Module]) -> Weights:
    counts = count_parameters(parts)
    encoders = {name for name in parts if "encoder" in name}
    lists = [one for name in parts.keys() - encoders for one in parts[name].modules() if isinstance(one, nn.ModuleList)]
    return Weights(
        sum(count.frozen for name, count in counts.items() if name not in encoders),
        sum(count.trained for name, count in counts.items() if name not in encoders),
        sum(weight.nbytes for name in encoders for weight in parts[name].parameters()) if settings.data.features == "online" else 0,
        [sum(count_of(one) for one in layer.parameters()) for layer in max(lists, key=len, default=nn.ModuleList())],
        sum(count.quantized for count in counts.values()),
    )


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
        f"{operations.total():,} operations of a pass, which work for {working:.3f} s ({rates}); Python starts them in {starting:.3f} s"
    )
    return Speed(max(working, starting), bandwidth, because)


def speed_here(operations: Counter[Operation], device: torch.device) -> Speed:
    """Measured. What there is no time to measure takes as long for its bytes as what was."""
    measured = seconds_of(operations, device, CALIBRATION)
    of_measured = sum(operations[one] * seconds for one, seconds in measured.items())
    all_bytes = sum(count * one.bytes for one, count in operations.items())
    all_flops = sum(count * one.flops for one, count in operations.items())
    share = sum(operations[one] * one.bytes for one in measured) / all_bytes
    of_flops = sum(operations[one] * one.flops for one in measured) / max(1, all_flops)
    moving = [(one.bytes, seconds) for one, seconds in measured.items() if not one.flops and one.bytes > COLD / 16]
    bandwidth = sum(moved for moved, _ in moving) / sum(seconds for _, seconds in moving) if moving else 1e10
    because = (
        f"{len(measured)} of {len(operations)} operations were measured here, {share:.0%} of a pass's bytes and {of_flops:.0%} of its FLOPs"
    )
    return Speed(of_measured / share, bandwidth, because)


def exchange_seconds(machines: Machines, sharing: int, weights: Weights, passes: int) -> float:
    """Of a step. In rings each GPU sends and receives (n-1)/n of what is gathered or scattered, and twice that of what is reduced; a
    message passes log2(n) others, as in NCCL's trees.

    Args:
        sharing: GPUs among whom weights are sharded; such groups reduce gradients between them.
    """
    groups = machines.workers // sharing
    # between groups each GPU reduces its own shard with those of the others; GPUs of a node do so at once, over one network
    link = machines.link(machines.workers) / (min(sharing, machines.gpus) if machines.nodes > 1 else 1)
    calls = math.ceil(4 * weights.trained / sharing / BUCKET)
    reduced = 2 * (groups - 1) / groups * 4 * weights.trained / sharing / link + 2 * calls * math.log2(groups) * LATENCY
    if sharing == 1:
        return reduced
    gathered = 2 * 2 * (weights.frozen + weights.trained)  # for the forward and for the backward pass, in bfloat16
    moved = (sharing - 1) / sharing * (gathered + 4 * weights.trained) / machines.link(sharing)
    return passes * (reduced + moved + 3 * (len(weights.layers) + 1) * math.log2(sharing) * LATENCY)


@dataclass(frozen=True)
class Cost:
    """Of a step.

    Args:
        sharded: whether weights are gathered and gradients scattered in each pass; else these are reduced during the last one alone.
        passes: that a worker makes in a step.
        optimizer, exchange: seconds.
        tokens: of a step, over all workers, without padding.
        flops: that a token needs, if it is known.
        steps: of the training.
    """

    machines: Machines | None
    sharded: bool
    workers: int
    speed: Speed
    passes: int
    optimizer: float
    exchange: float
    tokens: int
    flops: float | None
    steps: int

    @property
    def seconds(self) -> tuple[float, float]:
        """If the exchange is hidden behind the passes, and if nothing of it is."""
        of_passes = self.passes * self.speed.of_pass
        beside = of_passes if self.sharded else self.speed.of_pass
        return of_passes + max(0.0, self.exchange - beside) + self.optimizer, of_passes + self.exchange + self.optimizer

    @property
    def mfu(self) -> tuple[float, float] | None:
        """Model FLOPs utilization, if the GPU is known; the lower one first."""
        if self.machines is None or self.flops is None:
            return None
        least, most = (self.tokens * self.flops / seconds / self.machines.gpu.flops / self.workers for seconds in reversed(self.seconds))
        return least, most

    def lines(self, memory: float) -> list[str]:
        """What is printed.

        Args:
            memory: of a worker, bytes.
        """
        least, most = self.seconds
        hours = [self.steps * seconds / 3600 for seconds in self.seconds]
        lines = [f"on                 {self.machines or 'this machine'}: {self.workers} workers"]
        if self.machines:
            lines.append(f"memory             {size(round(memory))} of tensors, of {size(round(self.machines.gpu.memory))} a GPU")
        lines += [
            f"step               {least:.3f} to {most:.3f} s, with the exchange hidden behind the passes, and not",
            f"                   {self.passes} x {self.speed.of_pass:.3f} s of passes, {self.exchange:.3f} s of exchange, "
            f"{self.optimizer:.3f} s of optimizer",
            f"tokens per second  {self.tokens / most:,.0f} to {self.tokens / least:,.0f}",
        ]
        if self.mfu:
            lines.append("MFU                {:.1%} to {:.1%}".format(*self.mfu))
        lines.append(f"training           {hours[0]:,.2f} to {hours[1]:,.2f} hours, {self.workers * hours[1]:,.1f} worker hours")
        lines.append(f"this rests on      {self.speed.because}")
        if self.machines and self.workers > 1:
            lines.append(
                f"                   {self.machines.link(self.workers) / 1e9:,.0f} GB/s around all GPUs, {LATENCY * 1e6:.0f} us a message"
            )
        return lines


def cost_of(settings: Settings, inputs: PhaseInputs, weights: Weights, machines: Machines | None, calibrate: bool) -> Cost:
    """What a step takes, of a run with these settings.

    Args:
        machines: None: this one.
        calibrate: operations are measured on this machine.

    Raises:
        InputError: this machine cannot be measured for these; or a pass over the language model cannot be made without numbers.
    """
    training, workers, sharing = settings.training, settings.launch.min_workers, settings.launch.sharing
    device = torch.device("cuda" if settings.launch.use_gpu is not False and torch.cuda.is_available() else "cpu")
    if calibrate:
        check_calibration(workers, machines, device)
    try:
        operations = inputs.pass_of("bf16" if machines else resolve_precision(training.precision, device), longest=False).operations
    except Exception as error:  # of a foreign model's own code, which may look at numbers
        what = f"what a pass takes cannot be told: it needs numbers ({type(error).__name__})"
        raise InputError(
            Problem("model.language_model with --on or --calibrate", what, "leave these out, and measure a short run")
        ) from None
    speed = speed_on_paper(operations, machines.gpu) if machines and not calibrate else speed_here(operations, device)
    passes = training.gradient_accumulation_steps(workers)
    return Cost(
        machines,
        sharing > 1,
        workers,
        speed,
        passes,
        OPTIMIZER_BYTES * weights.trained / sharing / speed.bandwidth,
        exchange_seconds(machines, sharing, weights, passes) if machines else 0.0,
        inputs.tokens_per_step(),
        inputs.flops_per_token(),
        planned_steps(training, inputs.records),
    )


def check_calibration(workers: int, machines: Machines | None, device: torch.device) -> None:
    """Refuse to measure what would not train.

    Raises:
        InputError: this machine has not that GPU; or one process would be measured, where several share it.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
    if machines is not None and gpu_of(name) != machines.gpu:
        raise InputError(
            Problem(f"--calibrate with --on gpu={machines.kind}", f"would measure {name}", "run it there, or leave one of the two out")
        )
    if machines is None and workers > 1:
        what = f"one process is measured, and {workers} would train"
        raise InputError(
            Problem(f"--calibrate with launch.num_workers={workers}", what, "set launch.num_workers=1, or name GPUs with --on")
        )
