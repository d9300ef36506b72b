"""How many parameters of a model are frozen, and how many train; of those in 4 bits, two are in a byte."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class ParameterCount:
    """Of one part of a model.

    Args:
        quantized: those of the frozen ones that are in 4 bits.
    """

    frozen: int
    trained: int
    quantized: int = 0


def count_of(parameter: nn.Parameter) -> int:
    """The numbers that it stands for."""
    return parameter.numel() * (2 if parameter.dtype == torch.uint8 else 1)


def count_parameters(parts: Mapping[str, nn.Module]) -> dict[str, ParameterCount]:
    """Parameters of each part; weights that parts share count for the first of them."""
    counts, seen = {}, set()
    for name, part in parts.items():
        frozen = trained = quantized = 0
        for parameter in part.parameters():
            if id(parameter) not in seen:
                seen.add(id(parameter))
                frozen += 0 if parameter.requires_grad else count_of(parameter)
                trained += parameter.numel() if parameter.requires_grad else 0
                quantized += count_of(parameter) if parameter.dtype == torch.uint8 else 0
        counts[name] = ParameterCount(frozen, trained, quantized)
    return counts


def describe_parameters(counts: Mapping[str, ParameterCount]) -> str:
    """One line, such as `parameters that train: projector 1,234; frozen: language model 134,515,008`."""
    trained = [f"{name} {count.trained:,}" for name, count in counts.items() if count.trained]
    frozen = [f"{name} {count.frozen:,}" for name, count in counts.items() if count.frozen]
    return f"parameters that train: {', '.join(trained) or 'none'}; frozen: {', '.join(frozen) or 'none'}"
