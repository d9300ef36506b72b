"""Contrastive losses with several positives, over the items of all workers.

Shape letters: b items of this worker, N items of all workers, S width of the shared space.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from raytrain2p.models.distributed import gather_with_gradient

LARGEST_SCALE = math.log(100.0)  # CLIP's bound (arXiv:2103.00020, section 2.5), for stability


class ContrastiveLoss(nn.Module):
    """Contrastive loss between two modalities with a learnt temperature.

    Two items are a positive pair if their keys are equal: a text that occurs twice in a batch is not a negative of itself.

    - `softmax`: cross entropy against a target spread evenly over the positives, both ways; with one positive each it is
      CLIP's loss (Radford et al., arXiv:2103.00020, figure 3); the several positives are those of SupCon
      (Khosla et al., arXiv:2004.11362, equation 2).
    - `sigmoid`: a binary classification of each pair (Zhai et al., arXiv:2303.15343, equation 1).

    The mean of the value over the workers is the loss of the union batch. DistributedDataParallel averages gradients over the
    workers, so the same is true of the gradient.
    """

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.log_scale = nn.Parameter(torch.tensor([math.log(10.0) if form == "sigmoid" else math.log(1 / 0.07)]))
        if form == "sigmoid":
            self.bias = nn.Parameter(torch.tensor([-10.0]))

    def forward(self, left: torch.Tensor, right: torch.Tensor, keys: torch.Tensor, alone: bool = False) -> torch.Tensor:
        """Unit vectors (b, S) of both modalities and the items' keys (b,), integers, to a scalar.

        With `alone`, the other workers' items are left out (and nothing is communicated).
        """
        with torch.autocast(left.device.type, enabled=False):  # bfloat16 has steps of half a unit at the largest scale
            return self._loss(left, right, keys, alone)

    def _loss(self, left: torch.Tensor, right: torch.Tensor, keys: torch.Tensor, alone: bool) -> torch.Tensor:
        gather_all = (lambda rows: rows) if alone else gather_with_gradient
        all_keys = gather_all(keys)
        positive = keys[:, None] == all_keys[None, :]
        scale = self.log_scale.clamp(max=LARGEST_SCALE).exp()
        all_right = gather_all(right)
        if self.form == "sigmoid":
            logits = scale * left @ all_right.T + self.bias
            signs = positive.to(logits.dtype) * 2 - 1
            return -F.logsigmoid(signs * logits).sum(dim=1).mean()
        target = positive / positive.sum(dim=1, keepdim=True)
        forwards = F.cross_entropy(scale * left @ all_right.T, target)
        backwards = F.cross_entropy(scale * right @ gather_all(left).T, target)
        return (forwards + backwards) / 2
