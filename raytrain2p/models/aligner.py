"""The aligner: one branch for each modality, from its encoder's features into the shared space.

Shape letters: B items, T positions, D width of an encoder, S width of the shared space.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

Grids = tuple[torch.Tensor, torch.Tensor | None]  # values (B, T, D), and the positions of each item (B,) where they differ


class Branch(nn.Module):
    """Maps each position on its own, then pools by attention with one learnt query.

    Because the map is per position, phase 2 can use the unpooled grid of the same weights. Without `input_norm` it is a plain MLP.
    """

    def __init__(self, width: int, hidden: int, dimension: int, dropout: float, input_norm: bool = True) -> None:
        super().__init__()
        norm = nn.LayerNorm(width) if input_norm else nn.Identity()
        self.map = nn.Sequential(norm, nn.Linear(width, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, dimension))
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
        return self.pooled(self.grid(features), positions)

    def pooled(self, grid: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        """The same of a grid (B, T, S)."""
        scores = self.query(grid).float()
        if positions is not None:
            scores = scores.masked_fill(~within(positions, grid.shape[1]).unsqueeze(-1), -math.inf)
        return F.normalize((grid.float() * scores.softmax(dim=1)).sum(dim=1), dim=-1)


def within(positions: torch.Tensor, longest: int) -> torch.Tensor:
    """Where an item has positions, (B, longest), from their numbers (B,)."""
    return torch.arange(longest, device=positions.device) < positions[:, None]


def branches_of(shape: Mapping[str, Any], modalities: Iterable[str]) -> dict[str, Branch]:
    """New branches of these modalities, for inference.

    Args:
        shape: of the aligner, as an artifact has it; an earlier version always normalized what branches read.
    """
    norm = shape.get("input_norm", True)
    return {modality: Branch(shape["widths"][modality], shape["hidden"], shape["dimension"], 0.0, norm) for modality in modalities}


class Aligner(nn.Module):
    """One branch per modality.

    Args:
        widths: D of each modality's encoder, such as `{"image": 1280, "text": 384}`.
        hidden: width inside a branch.
        dimension: S.
        dropout: inside a branch, while training.
        input_norm: whether branches normalize what they read.
    """

    def __init__(self, widths: Mapping[str, int], hidden: int, dimension: int, dropout: float = 0.0, input_norm: bool = True) -> None:
        super().__init__()
        self.shape: dict[str, Any] = {"widths": dict(widths), "hidden": hidden, "dimension": dimension, "dropout": dropout}
        self.shape["input_norm"] = input_norm
        self.dimension = dimension
        self.branches = nn.ModuleDict({name: Branch(width, hidden, dimension, dropout, input_norm) for name, width in widths.items()})

    def forward(self, features: Mapping[str, Grids]) -> dict[str, torch.Tensor]:
        """Features by modality, (B, T, D) and (B,) positions, to unit vectors by modality, (B, S)."""
        return {name: self.branches[name](*grids) for name, grids in features.items()}
