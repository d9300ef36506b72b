"""How long the operations of a pass take on this machine: each is made once more, with numbers, and timed."""

import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_unflatten

from raytrain2p.models.tracing import Operation, Shape

COLD = 1 << 26  # bytes that an operation is given in turn, so that they come from memory and not from a cache
MOST_SETS = 8  # of them
LARGEST = 1 << 31  # bytes of an operation that is made: larger ones may not fit beside what else is there
LEAST, REPEATS, LONG = 0.005, 3, 0.3  # seconds that are measured at once, and how often; what takes longer is measured once


def seconds_of(operations: Counter[Operation], device: torch.device, budget: float) -> dict[Operation, float]:
    """Seconds of each operation, those first that move the most bytes. What there is no time for, or what cannot be made alone, is missing.

    Args:
        budget: seconds in which to be done.
    """
    found, end = dict[Operation, float](), time.monotonic() + budget
    for operation in sorted(operations, key=lambda one: operations[one] * one.bytes, reverse=True):
        if time.monotonic() > end:
            break
        if operation.bytes > LARGEST:
            continue
        try:
            found[operation] = timed(operation, device)
        except (RuntimeError, IndexError, NotImplementedError, torch.OutOfMemoryError):  # a kernel of other devices, indices that it checks
            continue
    return found


def timed(operation: Operation, device: torch.device) -> float:
    """The median, in seconds, with the time that Python needs to start it, where that is longer."""
    sets = [filled(operation, device) for _ in range(max(1, min(MOST_SETS, COLD // max(1, operation.bytes))))]
    kernel = operation.kernel
    with torch.no_grad():
        started = time.perf_counter()
        for arguments, named in sets:
            kernel(*arguments, **named)
        waited(device)
        once = (time.perf_counter() - started) / len(sets)
        if once > LONG:
            return once
        rounds = max(1, min(200, round(LEAST / max(once, 1e-9) / len(sets))))
        found = []
        for _ in range(REPEATS):
            started = time.perf_counter()
            for _ in range(rounds):
                for arguments, named in sets:
                    kernel(*arguments, **named)
            waited(device)
            found.append((time.perf_counter() - started) / rounds / len(sets))
    return statistics.median(found)


def waited(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def filled(operation: Operation, device: torch.device) -> tuple[Any, Any]:
    """Its arguments, with random numbers; indices are 0."""

    def tensor(shape: Shape) -> torch.Tensor:
        count = 1 + sum((size - 1) * stride for size, stride in zip(shape.sizes, shape.strides, strict=True) if size)
        memory = torch.empty(count, dtype=shape.dtype, device=device)
        return (memory.normal_() if shape.dtype.is_floating_point else memory.zero_()).as_strided(shape.sizes, shape.strides)

    of_device: Callable[[Any], Any] = lambda one: device if isinstance(one, torch.device) else one  # noqa: E731
    leaves = [tensor(one) if isinstance(one, Shape) else of_device(one) for one in operation.arguments]
    return tree_unflatten(leaves, operation.nesting)
