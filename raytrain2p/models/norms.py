"""RMSNorm (arXiv:1910.07467, equation 4) with frozen weights, in fewer passes over the activations than the models' own."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

TOLERANCE = 1e-4


def replace_norms(model: nn.Module) -> int:
    """Let the frozen RMSNorms of a model of transformers compute with RMSNorm; returns how many.

    Models write theirs in about ten operations forward and twenty backward. Some differ (Gemma's adds 1 to the weight): only those that
    give the same stay replaced.
    """
    found = [module for module in model.modules() if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon")]
    for module in found:
        weight = module.get_parameter("weight")
        x = torch.randn(4, len(weight), generator=torch.Generator().manual_seed(0)).to(weight.device)
        wanted, own = module(x), type(module)
        module.__class__ = RMSNorm
        if not torch.allclose(module(x), wanted, rtol=TOLERANCE, atol=TOLERANCE):
            module.__class__ = own
    return sum(type(module) is RMSNorm for module in found)


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + epsilon) * weight` over the last dimension, in float32, rounded to the precision of x."""

    weight: torch.Tensor
    variance_epsilon: float

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            weight = self.weight.detach().to(x.dtype)
            if x.is_cuda:  # one kernel there; on CPUs it is the same operations as the models' own
                return F.rms_norm(x, weight.shape, weight, self.variance_epsilon)
            return _RMSNorm.apply(x, weight, self.variance_epsilon)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, epsilon: float) -> torch.Tensor:
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        inverse = size.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).to(x.dtype).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        weighted = gradient * weight
        along = (weighted * x).sum(-1, keepdim=True, dtype=torch.float32) * inverse.pow(3) / x.shape[-1]
        return (weighted * inverse).addcmul_(x, along, value=-1).to(x.dtype), None, None
