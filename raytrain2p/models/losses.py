"""Contrastive losses with several positives, over the items of all workers.

Shape letters: b items of this worker, N items of all workers, S width of the shared space.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from raytrain2p.models.distributed import gather_with_gradient

Present = tuple[torch.Tensor, torch.Tensor]
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

    def forward(
        self, left: torch.Tensor, right: torch.Tensor, keys: torch.Tensor, present: Present | None = None, alone: bool = False
    ) -> torch.Tensor:
        """Unit vectors (b, S) of both modalities and the records' keys (b,), integers, to a scalar.

        Args:
            present: which records have an item of the left and of the right modality, (b,) each; None: all have both. An item
                without a positive is an anchor of nothing, but a negative of others.
            alone: leave out the other workers' items (and communicate nothing).
        """
        with torch.autocast(left.device.type, enabled=False):  # bfloat16 has steps of half a unit at the largest scale
            return self._loss(left, right, keys, present or (torch.ones_like(keys, dtype=torch.bool),) * 2, alone)

    def _loss(self, left: torch.Tensor, right: torch.Tensor, keys: torch.Tensor, present: Present, alone: bool) -> torch.Tensor:
        gather_all = (lambda rows: rows) if alone else gather_with_gradient
        all_keys = gather_all(keys)
        scale = self.log_scale.clamp(max=LARGEST_SCALE).exp()
        all_present = [gather_all(mask.to(torch.uint8)).bool() for mask in present]
        workers = len(all_keys) // len(keys)
        same, all_same = keys[:, None] == all_keys[None, :], all_keys[:, None] == all_keys[None, :]
        all_right = gather_all(right)
        if self.form == "sigmoid":
            logits = scale * left @ all_right.T + self.bias
            losses = -F.logsigmoid((same.to(logits.dtype) * 2 - 1) * logits) * (present[0][:, None] & all_present[1])
            return losses.sum(dim=1).sum() * workers / all_present[0].sum().clamp(min=1)
        all_left, directions = gather_all(left), []
        for anchors, others, mine, theirs in ((left, all_right, 0, 1), (right, all_left, 1, 0)):
            positive = same & present[mine][:, None] & all_present[theirs]
            anchored = (all_same & all_present[mine][:, None] & all_present[theirs]).any(dim=1).sum()  # on all workers
            logits = (scale * anchors @ others.T).masked_fill(~all_present[theirs], torch.finfo(anchors.dtype).min / 2)
            rows = positive.any(dim=1)
            target = positive[rows] / positive[rows].sum(dim=1, keepdim=True)
            directions.append(F.cross_entropy(logits[rows], target, reduction="sum") * workers / anchored.clamp(min=1))
        return (directions[0] + directions[1]) / 2
