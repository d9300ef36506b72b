"""The workers of a run and their collectives: the one place where ranks are compared."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist

T = TypeVar("T")
Items = TypeVar("Items", list[Any], np.ndarray)


@dataclass(frozen=True)
class WorkerGroup:
    """This worker's rank, and the number of workers."""

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> "WorkerGroup":
        """Of torch's process group; a single worker has none."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, items: Items) -> Items:
        """Every `size`-th item, beginning at `rank`."""
        return items[self.rank :: self.size]

    def batches(self, items: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, bool]]:
        """This worker's share in batches, and whether each counts. All workers get equally many: those whose share is too short for the
        last one get one that does not count."""
        mine = self.share(items)
        for start in range(0, -(-len(items) // self.size), size):
            batch = mine[start : start + size]
            yield (batch, True) if len(batch) else (items[:1], False)

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean over the workers, on each of them."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values / self.size

    def gather(self, value: T) -> list[T]:
        """Every worker's value (small, plain), on each of them, in rank order."""
        if self.size == 1:
            return [value]
        gathered: list[T | None] = [None] * self.size
        dist.all_gather_object(gathered, value)
        return cast("list[T]", gathered)

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` returns on rank 0 (small, plain), on every worker; it is called there alone."""
        if self.size == 1:
            return make()
        values = [make() if self.is_first else None]
        dist.broadcast_object_list(values, src=0)
        return cast(T, values[0])


class NumberOfFirst:
    """Rank 0's number on every worker, cheap enough for every step: each call gives the number of the call before, which has arrived by
    then, and it goes over Gloo, so that no GPU is waited for. To make one is a collective, and so is each call.
    """

    def __init__(self, group: WorkerGroup) -> None:
        self.channel = dist.new_group(backend="gloo") if group.size > 1 else None
        self.number, self.arrives = torch.zeros(1, dtype=torch.int64), cast("dist.Work | None", None)

    def exchange(self, number: int) -> int:
        """Send rank 0's `number`; returns that of the call before, at first 0. A single worker gets its own at once."""
        if self.channel is None:
            return number
        if self.arrives is not None:
            self.arrives.wait()
        before = int(self.number)
        self.number = torch.tensor([number])
        self.arrives = dist.broadcast(self.number, src=0, group=self.channel, async_op=True)
        return before


class GatherWithGradient(torch.autograd.Function):
    """Rows of all workers, in rank order. The gradient of a row comes back to its owner, summed over the workers."""

    @staticmethod
    def forward(ctx, rows: torch.Tensor) -> torch.Tensor:  # type: ignore[no-untyped-def]
        ctx.rows = rows.shape[0]
        gathered = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, rows.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[no-untyped-def]
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        start = dist.get_rank() * ctx.rows
        return gradient[start : start + ctx.rows]


def gather_with_gradient(rows: torch.Tensor) -> torch.Tensor:
    """(b, ...) of each worker to (N, ...), with the gradient. A single worker gets its own rows."""
    if WorkerGroup.current().size == 1:
        return rows
    return GatherWithGradient.apply(rows)
