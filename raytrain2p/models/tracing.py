"""What a pass takes and does, found by making it without numbers: each operation is given shapes alone (PyTorch's FakeTensor)."""

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from logging import getLogger
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_iter
from torch.utils.flop_counter import flop_registry

from raytrain2p.models.quantization import QuantizedLinear

aten = torch.ops.aten
FLOPS = flop_registry | {  # and of those that it lacks: on CPUs flash attention has names of its own
    aten.addmm_: flop_registry[aten.addmm],
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[aten._scaled_dot_product_flash_attention_backward],
}
ALLOCATIONS = (aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided)
LOOKUPS = (aten.embedding, aten.gather, aten.index, aten.index_select)  # read as much as they write


@dataclass(frozen=True)
class Shape:
    """What an operation is given in place of a tensor."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Of its elements; one that is repeated counts once."""
        return self.dtype.itemsize * math.prod(size for size, stride in zip(self.sizes, self.strides, strict=True) if stride)


@dataclass(frozen=True)
class Operation:
    """A kernel and what it is given; equal ones take equally long.

    Args:
        arguments: the leaves of its positional and named arguments; tensors are Shapes.
        nesting: of these leaves.
        flops: of matrix products and attention; 0 of all else.
        bytes: that it reads and writes.
    """

    kernel: torch._ops.OpOverload
    arguments: tuple[Any, ...]
    nesting: Any = field(compare=False, repr=False)
    flops: int
    bytes: int


@dataclass(frozen=True)
class Pass:
    """A forward and a backward pass.

    Args:
        most_bytes: that they take at once, with gradients, without the module's weights.
        operations: and how often each is made; views of what is there are none.
    """

    most_bytes: int
    operations: Counter[Operation]


class Recorder(TorchDispatchMode):
    """Within, keeps the operations, and adds up the memory of tensors that they make, until Python or autograd lets go of it."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.sizes: dict[int, int] = {}  # of what is in use, by address
        self.operations = Counter[Operation]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given, new = {one.untyped_storage()._cdata for one in tensors((args, kwargs))}, False
        for tensor in tensors(made):
            memory = tensor.untyped_storage()
            if memory._cdata in given:
                continue
            new = True
            if memory._cdata not in self.sizes:
                self.sizes[memory._cdata] = memory.nbytes()
                self.now += memory.nbytes()
                weakref.finalize(memory, self.let_go, memory._cdata)
        self.most = max(self.most, self.now)
        if (new or func._schema.is_mutable) and func.overloadpacket not in ALLOCATIONS:
            self.operations[operation(func, args, kwargs or {}, made)] += 1
        return made

    def let_go(self, address: int) -> None:
        self.now -= self.sizes.pop(address, 0)

    def let_gradient_go(self, weight: torch.Tensor) -> None:
        if weight.grad is not None:
            self.let_go(weight.grad.untyped_storage()._cdata)


def tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_iter(tree) if isinstance(leaf, torch.Tensor)]


def operation(func: Any, args: Any, kwargs: dict[str, Any], made: Any) -> Operation:
    leaves, nesting = tree_flatten((args, kwargs))
    arguments = tuple(Shape(tuple(leaf.shape), leaf.stride(), leaf.dtype) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves)
    count = FLOPS.get(func.overloadpacket)
    read = sum(one.bytes for one in arguments if isinstance(one, Shape))
    written = sum(one.numel() * one.element_size() for one in tensors(made))
    moved = 2 * written if func.overloadpacket in LOOKUPS else read + written
    return Operation(func, arguments, nesting, count(*args, **kwargs, out_val=made) if count else 0, moved)


def traced(module: nn.Module, loss: Callable[[], torch.Tensor], sharded: bool = False) -> Pass:
    """Make a pass without numbers.

    Args:
        module: on the meta device. Its weights are replaced.
        loss: makes the forward pass. What it takes may have numbers.
        sharded: whether each gradient is let go as soon as it is there, as those that other workers keep are.
    """
    with without_numbers(module), Recorder() as recorder:
        for weight in module.parameters() if sharded else ():
            if weight.requires_grad:
                weight.register_post_accumulate_grad_hook(recorder.let_gradient_go)
        loss().backward()
    return Pass(recorder.most, recorder.operations)


@contextmanager
def without_numbers(module: nn.Module) -> Iterator[None]:
    """Within, a module that is on the meta device computes as on a CPU, of shapes alone. Its weights are replaced."""
    logger = getLogger("torch._subclasses.fake_tensor")  # has a traceback for what is raised as well
    before, logger.disabled = logger.disabled, True
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            give_shapes(module)
            yield
    finally:
        logger.disabled = before


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
        if isinstance(part, QuantizedLinear):
            part.scales.to("cpu")
