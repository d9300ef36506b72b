"""Frozen linear layers in 4 bits, as QLoRA has them (arXiv:2305.14314): bitsandbytes' NF4, whose scales are quantized too.

Their weights are made numbers again where a product needs them, in the forward pass and in the backward pass, and are kept nowhere.
"""

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from raytrain2p.config import Problem

PACKAGE = "bitsandbytes"
BYTES = 1 / 2 + 1 / 64 + 4 / (64 * 256)  # of a weight: 4 bits, a byte for the scale of 64, and a float32 for that of 256 scales


class QuantizedLinear(nn.Linear):
    """A linear layer whose weights (O, D) are two to a byte. They do not train.

    Args:
        layer: whose weights it takes.
        device: on which they are quantized.
        dtype: of products.
    """

    def __init__(self, layer: nn.Linear, device: torch.device, dtype: torch.dtype) -> None:
        from bitsandbytes import functional  # its import takes seconds

        nn.Module.__init__(self)
        self.in_features, self.out_features, self.dtype = layer.in_features, layer.out_features, dtype
        numbers = layer.weight.detach().to(device, dtype).contiguous()
        packed, self.scales = functional.quantize_4bit(numbers, compress_statistics=True, quant_type="nf4")
        if numbers.is_meta:
            functional.name2qmap.clear()  # the table of all later calls would be one without numbers
        self.weight, self.bias = nn.Parameter(packed, requires_grad=False), layer.bias

    def _apply(self, fn: Callable[[Any], Any], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.scales.to(self.weight.device)
        return self

    def numbers(self) -> torch.Tensor:
        """The weights (O, D)."""
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(self.weight, self.scales)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return _Product.apply(x.to(self.dtype), self)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: QuantizedLinear) -> torch.Tensor:
        ctx.layer = layer
        y = F.linear(x, layer.numbers())
        return y if layer.bias is None else y.add_(layer.bias)  # and no view: some models clamp it in place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient @ ctx.layer.numbers(), None


def parents(model: nn.Module) -> list[nn.Module]:
    """The modules that have others. Were the others in the list, none that is replaced would be let go of before the end."""
    return [module for module in model.modules() if next(module.children(), None) is not None]


def quantizable(model: Any) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """The frozen linear layers of a language model, but for its output layer, with the modules that have them, and their names there."""
    head = model.get_output_embeddings().weight
    for parent in parents(model):
        for name in [name for name, _ in parent.named_children()]:
            layer = getattr(parent, name)
            if type(layer) is nn.Linear and layer.weight is not head and not layer.weight.requires_grad:
                yield parent, name, layer


def quantize(model: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Quantize a language model, layer by layer; whichever device it was on, these layers are on `device` then."""
    for parent, name, layer in quantizable(model):
        setattr(parent, name, QuantizedLinear(layer, device, dtype))


def dequantize(model: nn.Module) -> None:
    """Linear layers again, in float32, with the numbers that were computed with."""
    for parent in parents(model):
        for name in [name for name, _ in parent.named_children()]:
            layer = getattr(parent, name)
            if isinstance(layer, QuantizedLinear):
                dense = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
                dense.weight, dense.bias = nn.Parameter(layer.numbers().float(), requires_grad=False), layer.bias
                setattr(parent, name, dense)


def package_problem(where: str) -> Problem | None:
    """What quantization needs, if it is not installed.

    Args:
        where: the setting, or the file that says so.
    """
    if importlib.util.find_spec(PACKAGE) is not None:
        return None
    return Problem(where, f"needs the package {PACKAGE}, which is not installed", "pip install 'raytrain2p[quantization]'")
