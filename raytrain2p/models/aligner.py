"""The aligner: one branch for each modality, from its encoder's features into the shared space.

Shape letters: B items, T positions, D width of an encoder, S width of the shared space.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

Grids = tuple[torch.Tensor, torch.Tensor | None]  # values (B, T, D), and the positions of each item (B,) where they differ


class Branch(nn.Module):
    """Maps each position on its own, then pools by attention with one learnt query.

    Because the map is per position, phase 2 can use the unpooled grid of the same weights.
    """

    def __init__(self, width: int, hidden: int, dimension: int, dropout: float) -> None:
        super().__init__()
        self.map = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, dimension)
        )
        self.query = nn.Linear(dimension, 1)
        self.width = width

    @property
    def dtype(self) -> torch.dtype:
        return self.query.weight.dtype

    def grid(self, features: torch.Tensor) -> torch.Tensor:
        """(B, T, D) to (B, T, S)."""
        return self.map(features)

    def forward(self, features: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        """(B, T, D) to a unit vector per item, (B, S), in float32. Item i has `positions[i]` positions; without, all have T."""
        grid = self.grid(features)
        scores = self.query(grid).float()
        if positions is not None:
            scores = scores.masked_fill(~within(positions, grid.shape[1]).unsqueeze(-1), -math.inf)
        return F.normalize((grid.float() * scores.softmax(dim=1)).sum(dim=1), dim=-1)


def within(positions: torch.Tensor, longest: int) -> torch.Tensor:
    """Where an item has positions, (B, longest), from their numbers (B,)."""
    return torch.arange(longest, device=positions.device) < positions[:, None]


class Aligner(nn.Module):
    """One branch per modality.

    Args:
        widths: D of each modality's encoder, such as `{"image": 1280, "text": 384}`.
        hidden: width inside a branch.
        dimension: S.
        dropout: inside a branch, while training.
    """

    def __init__(self, widths: Mapping[str, int], hidden: int, dimension: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.shape: dict[str, Any] = {"widths": dict(widths), "hidden": hidden, "dimension": dimension, "dropout": dropout}
        self.dimension = dimension
        self.branches = nn.ModuleDict({name: Branch(width, hidden, dimension, dropout) for name, width in widths.items()})

    def forward(self, features: Mapping[str, Grids]) -> dict[str, torch.Tensor]:
        """Features by modality, (B, T, D) and (B,) positions, to unit vectors by modality, (B, S)."""
        return {name: self.branches[name](*grids) for name, grids in features.items()}
