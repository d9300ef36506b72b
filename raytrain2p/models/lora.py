"""LoRA adapters (arXiv:2106.09685) in peft's form, with fewer passes over the activations than peft makes."""

import warnings
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners import lora
from torch import nn
from torch.autograd.function import once_differentiable

from raytrain2p.models.quantization import QuantizedLinear, dequantize

# Layers of one module that read the same input, by the names that models of transformers give them.
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


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
            module.siblings = Siblings([module])
    for parent in adapted.modules():
        for names in SIBLINGS:
            siblings = Siblings([layer for name in names if isinstance(layer := getattr(parent, name, None), AdaptedLinear)])
            for layer in siblings.layers:
                layer.siblings = siblings
    return adapted


def without_adapters(language_model: Any) -> Any:
    """The model without peft: LoRA is added to its weights, in float32."""
    dequantize(language_model)
    return language_model.float().merge_and_unload() if hasattr(language_model, "merge_and_unload") else language_model


class AdaptedLinear(lora.Linear):
    """peft's layer; its usual case, one adapter without dropout, is one autograd function together with its siblings."""

    siblings: "Siblings"

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args or kwargs or not self.is_usual():
            return super().forward(x, *args, **kwargs)
        return self.plain(x) if torch.compiler.is_compiling() else self.siblings.output(self, x)

    def plain(self, x: torch.Tensor) -> torch.Tensor:
        """The formula of `_Adapted` in operations that torch.compile joins, and differentiates, itself."""
        name, weight = self.active_adapters[0], self.base_layer.weight
        with torch.autocast(x.device.type, enabled=False):
            down, up = (of[name].weight.to(weight.dtype) for of in (self.lora_A, self.lora_B))
            rows = x.to(weight.dtype)
            low = nn.functional.linear(rows, down).flatten(0, -2)
            y = torch.addmm(self.scaling[name] * nn.functional.linear(low, up), rows.flatten(0, -2), weight.t())
            return (y if self.base_layer.bias is None else y + self.base_layer.bias).view(*x.shape[:-1], -1)

    def is_usual(self) -> bool:
        name, *others = self.active_adapters or [""]
        if others or self.merged or self.disable_adapters or name not in self.lora_A or name in self.lora_variant:
            return False
        return not self.training or isinstance(self.lora_dropout[name], nn.Identity)


class Siblings:
    """Adapted layers that read the same input: when one is called, all are computed, and the others' outputs wait for their calls.

    Whatever is called with whatever input is right, but models in which siblings read different inputs compute what is not asked for.
    """

    def __init__(self, layers: list[AdaptedLinear]) -> None:
        self.layers = layers
        self.computed: tuple[torch.Tensor | None, dict[AdaptedLinear, torch.Tensor]] = None, {}

    def output(self, layer: AdaptedLinear, x: torch.Tensor) -> torch.Tensor:
        """Of a layer for its input x."""
        of, waiting = self.computed  # read once: another thread may put its own there
        if x is not of:
            layers = self.layers if all(one.is_usual() for one in self.layers) else [layer]
            waiting = dict(zip(layers, outputs_of(layers, x), strict=True))
            self.computed = x, waiting
        elif layer not in waiting:
            return outputs_of([layer], x)[0]
        output = waiting.pop(layer)
        if not waiting:
            self.computed = None, {}
        return output


def outputs_of(layers: list[AdaptedLinear], x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Outputs (.., O) of layers for their input x (.., D)."""
    tensors, scales, bases = list[Any](), list[float](), [layer.base_layer for layer in layers]
    for layer, base in zip(layers, bases, strict=True):
        name = layer.active_adapters[0]
        tensors += base.weight, base.bias, layer.lora_A[name].weight, layer.lora_B[name].weight
        scales.append(layer.scaling[name])
    dtype = bases[0].dtype if isinstance(bases[0], QuantizedLinear) else bases[0].weight.dtype
    with torch.autocast(x.device.type, enabled=False):
        return _Adapted.apply(x.to(dtype), scales, bases, *tensors)


def numbers_of(base: nn.Linear, weight: torch.Tensor) -> torch.Tensor:
    """A layer's weights as a product takes them."""
    return base.numbers() if isinstance(base, QuantizedLinear) else weight


class _Adapted(torch.autograd.Function):
    """`x W^T + b + s (x A^T) B^T` (arXiv:2106.09685, section 4.1) of one or several layers, in the precision of the frozen W and b.

    Through peft and autocast a layer makes about 25 operations more: casts of x, A, B and their gradients, products with s, and sums, each
    over all activations. Here the low-rank products and the others are added where the first of them are, s is a factor of products, and
    the A of several layers are one matrix.

    What LoRA adds comes first, and x W^T is added to it before the sum is rounded. The other way round, the sum of a rounded x W^T and of
    something smaller than half of its last bit is x W^T again: in bfloat16, weights that have begun to learn would change next to nothing.
    """

    @staticmethod
    def forward(ctx: Any, x: Any, scales: list[float], bases: list[nn.Linear], *tensors: Any) -> tuple[torch.Tensor, ...]:
        """x (.., D), and of each layer weight (O, D), bias (O,) or None, down (R, D), up (O, R); to (.., O) of each."""
        weights, biases, downs, ups = (tensors[kind::4] for kind in range(4))
        rows, down = x.reshape(-1, x.shape[-1]), (torch.cat(downs) if len(downs) > 1 else downs[0]).to(x.dtype)
        lows, ups = (rows @ down.t()).split([len(one) for one in downs], 1), tuple(up.to(x.dtype) for up in ups)
        outputs = tuple(x.new_empty(*x.shape[:-1], len(up)) for up in ups)
        for y, base, weight, bias, low, up, scale in zip(outputs, bases, weights, biases, lows, ups, scales, strict=True):
            flat = y.view(-1, len(up))
            flat.addmm_(low, up.t(), beta=0, alpha=scale).addmm_(rows, numbers_of(base, weight).t())
            if bias is not None:
                flat.add_(bias)
        ctx.save_for_backward(rows, down, *lows, *weights, *ups)
        ctx.scales, ctx.bases, ctx.shape = scales, bases, x.shape
        return outputs  # and no views of others: some models clamp them in place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, down, *others = ctx.saved_tensors
        count, nothing = len(gradients), rows.new_empty(())
        lows, weights, ups = (others[start : start + count] for start in range(0, 3 * count, count))
        of_ys = [gradient.reshape(-1, gradient.shape[-1]) for gradient in gradients]
        of_lows, of_ups = [], []
        for of_y, low, up, scale in zip(of_ys, lows, ups, ctx.scales, strict=True):
            of_lows.append(torch.addmm(nothing, of_y, up, beta=0, alpha=scale))
            of_ups.append(torch.addmm(nothing, of_y.t(), low, beta=0, alpha=scale).float())
        of_low = torch.cat(of_lows, 1) if count > 1 else of_lows[0]
        of_downs = (of_low.t() @ rows).float().split([low.shape[1] for low in lows])
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = of_low @ down
            for of_y, base, weight in zip(of_ys, ctx.bases, weights, strict=True):
                of_x.addmm_(of_y, numbers_of(base, weight))
            of_x = of_x.view(ctx.shape)
        of_layers = [of for pair in zip(of_downs, of_ups, strict=True) for of in (None, None, *pair)]
        return of_x, None, None, *of_layers
