"""The loss of a language model: cross entropy over a large vocabulary, without copies of all logits in float32.

Shape letters: M supervised positions, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

CHUNK = 1 << 25  # logits in float32 at a time, 128 MB


def token_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross entropy summed over the positions, in float32: logits (M, V) and tokens (M,) to a scalar.

    Up to CHUNK logits it is PyTorch's, which needs 12 bytes for each one in bfloat16: its own two, the logarithms of probabilities and the
    gradient in float32, and that in bfloat16. Of more logits some rows are in float32 at a time, and where gradients are wanted, each row's
    gradient takes the place of its logits, **which are lost**. In bfloat16 it is then rounded once more, when it is scaled.
    """
    if logits.numel() <= CHUNK:
        return F.cross_entropy(logits.float(), targets, reduction="sum")
    if logits.requires_grad and torch.is_grad_enabled():
        return _InPlace.apply(logits, targets)
    size = rows_of(logits)
    parts = zip(logits.split(size), targets.split(size), strict=True)
    return torch.stack([F.cross_entropy(part.float(), own, reduction="sum") for part, own in parts]).sum()


def rows_of(logits: torch.Tensor) -> int:
    """Of a chunk."""
    return max(1, CHUNK // logits.shape[1])


class _InPlace(torch.autograd.Function):
    """The gradient of `logsumexp(x) - x[target]` is `softmax(x)`, less one at the target: all that it needs is there in the forward pass
    (as in Liger Kernel, arXiv:2410.10989, section 3.2). Whoever has saved the logits for a backward pass of their own gets PyTorch's error.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        total, size = logits.new_zeros((), dtype=torch.float32), rows_of(logits)
        for rows, own in zip(logits.split(size), targets[:, None].split(size), strict=True):
            part = rows.float()
            normalizer = part.logsumexp(1, keepdim=True)
            total += (normalizer - part.gather(1, own)).sum()
            part.sub_(normalizer).exp_().scatter_add_(1, own, part.new_full((1, 1), -1.0).expand_as(own))
            rows.copy_(part)
        ctx.save_for_backward(logits)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *above: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(above[0]), None
