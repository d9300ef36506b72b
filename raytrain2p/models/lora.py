"""LoRA adapters (arXiv:2106.09685) in peft's form, with fewer passes over the activations than peft makes."""

import warnings
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners import lora
from torch import nn
from torch.autograd.function import once_differentiable


def with_adapters(language_model: Any, settings: dict[str, Any]) -> nn.Module:
    """The model with adapters in float32: peft's names and checkpoints, our forward and backward passes."""
    config = LoraConfig(
        r=settings["rank"],
        lora_alpha=settings["alpha"],
        lora_dropout=settings["dropout"],
        target_modules=settings["target_modules"],
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for an attribute that is about to go
        adapted = get_peft_model(language_model, config)
    for module in adapted.modules():
        if type(module) is lora.Linear and type(module.base_layer) is nn.Linear:
            module.__class__ = AdaptedLinear
    return adapted


def without_adapters(language_model: Any) -> Any:
    """The model without peft: LoRA is added to its weights, in float32."""
    return language_model.float().merge_and_unload() if hasattr(language_model, "merge_and_unload") else language_model


class AdaptedLinear(lora.Linear):
    """peft's layer; its usual case, one adapter without dropout, is one autograd function."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        (name, *others), weight = self.active_adapters or [""], self.base_layer.weight
        usual = (
            not (others or args or kwargs or self.merged or self.disable_adapters) and name in self.lora_A and name not in self.lora_variant
        )
        if not usual or (self.training and not isinstance(self.lora_dropout[name], nn.Identity)):
            return super().forward(x, *args, **kwargs)
        down, up = self.lora_A[name].weight, self.lora_B[name].weight
        with torch.autocast(x.device.type, enabled=False):
            return _Adapted.apply(x.to(weight.dtype), weight, self.base_layer.bias, down, up, self.scaling[name])


class _Adapted(torch.autograd.Function):
    """`x W^T + b + s (x A^T) B^T` (arXiv:2106.09685, section 4.1), in the precision of the frozen W and b.

    Through peft and autocast a layer makes about 25 operations more: casts of x, A, B and their gradients, products with s, and sums, each
    over all activations. Here the low-rank products are added to the others' results where those are, and s is a factor of products.
    """

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, bias: Any, down: Any, up: Any, scale: float) -> torch.Tensor:
        """x (.., D), weight (O, D), bias (O,) or None, down (R, D), up (O, R) to (.., O)."""
        rows = x.reshape(-1, x.shape[-1])
        down, up = down.to(x.dtype), up.to(x.dtype)
        low = rows @ down.t()
        y = nn.functional.linear(rows, weight, bias).addmm_(low, up.t(), alpha=scale)
        ctx.save_for_backward(rows, low, weight, down, up)
        ctx.scale, ctx.shape = scale, x.shape
        return y.view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, low, weight, down, up = ctx.saved_tensors
        of_y, nothing = gradient.reshape(-1, gradient.shape[-1]), gradient.new_empty(())
        of_low = torch.addmm(nothing, of_y, up, beta=0, alpha=ctx.scale)
        of_up = torch.addmm(nothing, of_y.t(), low, beta=0, alpha=ctx.scale).float()
        of_down = (of_low.t() @ rows).float()
        of_x = (of_y @ weight).addmm_(of_low, down).view(ctx.shape) if ctx.needs_input_grad[0] else None
        return of_x, None, None, of_down, of_up, None
