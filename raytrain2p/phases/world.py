"""The workers of a run, as the phases see them: the one place where ranks are asked for."""

from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

Items = TypeVar("Items", list[Any], np.ndarray)


@dataclass(frozen=True)
class World:
    """This worker's rank, and how many workers there are."""

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> "World":
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
