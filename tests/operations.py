"""Counts of what PyTorch dispatches: they do not depend on the machine or its load."""

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

VIEWS = {"view", "_unsafe_view", "as_strided", "t", "transpose", "permute", "expand", "unsqueeze", "squeeze", "slice", "select", "detach"}
VIEWS |= {"split_with_sizes"}
ALLOCATIONS = {"empty", "new_empty", "empty_like", "new_empty_strided"}


class Operations(TorchDispatchMode):
    """Within, counts what is dispatched to kernels, by name; `kernels` leaves out what computes and moves nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    @property
    def kernels(self) -> int:
        return sum(count for name, count in self.counts.items() if name not in VIEWS | ALLOCATIONS)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))
