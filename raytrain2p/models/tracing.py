"""What a pass takes, found by making it without numbers: each operation is given shapes alone (PyTorch's FakeTensor)."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class BytesInUse(TorchDispatchMode):
    """Within, adds up the memory of tensors that operations make, until Python or autograd lets go of it."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.sizes: dict[int, int] = {}  # of what is in use, by address

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_iter(made):
            if isinstance(tensor, torch.Tensor) and (memory := tensor.untyped_storage())._cdata not in self.sizes:
                self.sizes[memory._cdata] = memory.nbytes()
                self.now += memory.nbytes()
                weakref.finalize(memory, self._let_go, memory._cdata)
        self.most = max(self.most, self.now)
        return made

    def _let_go(self, address: int) -> None:
        self.now -= self.sizes.pop(address)


def most_bytes(module: nn.Module, loss: Callable[[], torch.Tensor]) -> int:
    """The most memory that a forward and a backward pass take at once, with gradients, without the module's weights.

    Args:
        module: on the meta device. Its weights are replaced.
        loss: makes the forward pass. What it takes may have numbers.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        give_shapes(module)
        with BytesInUse() as in_use:
            loss().backward()
    return in_use.most


def give_shapes(module: nn.Module) -> None:
    """Move a module from the meta device to the CPU, without memory for its weights. Those that parts share stay shared."""
    moved = dict[int, torch.Tensor]()
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and id(tensor) not in moved:
                    empty = torch.empty_like(tensor, device="cpu")
                    moved[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
                if tensor is not None:
                    tensors[name] = moved[id(tensor)]  # type: ignore[assignment]
