"""The workers of a run and their collectives: the one place where ranks are asked for."""

from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

Items = TypeVar("Items", list[Any], np.ndarray)


@dataclass(frozen=True)
class WorkerGroup:
    """This worker's rank, and how many workers there are."""

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> "WorkerGroup":
        """The process group's, or a world of one where there is none."""
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

    def gather(self, value: Any) -> list[Any]:
        """Every worker's value (small, plain), on each of them, in rank order."""
        if self.size == 1:
            return [value]
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, value)
        return gathered


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
    """(b, ...) of each worker to (N, ...), with the gradient. Alone, the rows themselves."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return rows
    return GatherWithGradient.apply(rows)
