"""The workers of a run and their collectives: the one place where ranks are compared."""

from collections.abc import Callable
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

    def number_of_first(self, number: int, device: torch.device) -> int:
        """Rank 0's number, on every worker; a tensor on `device`, so cheap enough for every step."""
        if self.size == 1:
            return number
        shared = torch.tensor([number], device=device)
        dist.broadcast(shared, src=0)
        return int(shared.item())


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
