"""EfficientNet-Lite0 as a transformers model, for `AutoModel` to load.

transformers' own EfficientNet always has squeeze-and-excitation blocks, which the Lite family leaves out (together with
Swish, replaced by ReLU6, because both quantize badly).
Source: Tan and Le, "EfficientNet" (arXiv:1905.11946), table 1; the Lite changes: the `lite` folder of tensorflow/tpu.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput


@dataclass(frozen=True)
class Stage:
    """One row of the architecture table: `repeats` blocks, of which the first has the stride."""

    repeats: int
    kernel: int
    stride: int
    expansion: int
    width: int


LITE0 = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)
STEM_WIDTH, HEAD_WIDTH = 32, 1280
BATCH_NORM_EPS = 1e-3  # TensorFlow's default, with which the weights were trained


class EfficientNetLiteConfig(PreTrainedConfig):
    model_type = "efficientnet_lite"

    hidden_size: int = HEAD_WIDTH


@dataclass
class GridOutput(ModelOutput):
    """last_hidden_state: (batch, positions, width), the final feature map in row-major order."""

    last_hidden_state: torch.Tensor | None = None


class SamePadConv2d(nn.Conv2d):
    """Convolution with TensorFlow's SAME padding, which is asymmetric where the stride does not divide the input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pads: list[int] = []
        for size, kernel, stride in zip(x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        return super().forward(F.pad(x, pads) if any(pads) else x)


def batch_norm(width: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(width, eps=BATCH_NORM_EPS)


class InvertedResidual(nn.Module):
    """Expand (1x1), filter each channel (depthwise), project (1x1), and add the input where the shapes agree."""

    def __init__(self, width_in: int, stage: Stage, stride: int) -> None:
        super().__init__()
        inner = width_in * stage.expansion
        self.expands = stage.expansion != 1
        if self.expands:
            self._expand_conv = SamePadConv2d(width_in, inner, 1, bias=False)
            self._bn0 = batch_norm(inner)
        self._depthwise_conv = SamePadConv2d(inner, inner, stage.kernel, stride, groups=inner, bias=False)
        self._bn1 = batch_norm(inner)
        self._project_conv = SamePadConv2d(inner, stage.width, 1, bias=False)
        self._bn2 = batch_norm(stage.width)
        self.adds_input = stride == 1 and width_in == stage.width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.adds_input else y


class EfficientNetLiteModel(PreTrainedModel):
    """Pixel values (batch, 3, height, width), scaled as (x - 127) / 128, to a grid with one vector per 32x32 pixels.

    Parameters have the names of the published weights, which therefore load without renaming.
    """

    config_class = EfficientNetLiteConfig
    main_input_name = "pixel_values"
    base_model_prefix = ""

    def __init__(self, config: EfficientNetLiteConfig) -> None:
        super().__init__(config)
        self._conv_stem = SamePadConv2d(3, STEM_WIDTH, 3, 2, bias=False)
        self._bn0 = batch_norm(STEM_WIDTH)
        blocks, width = [], STEM_WIDTH
        for stage in LITE0:
            for repeat in range(stage.repeats):
                blocks.append(InvertedResidual(width, stage, stage.stride if repeat == 0 else 1))
                width = stage.width
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = SamePadConv2d(width, HEAD_WIDTH, 1, bias=False)
        self._bn1 = batch_norm(HEAD_WIDTH)
        self.post_init()

    def forward(self, pixel_values: torch.Tensor) -> GridOutput:
        x = F.relu6(self._bn0(self._conv_stem(pixel_values)))
        for block in self._blocks:
            x = block(x)
        x = F.relu6(self._bn1(self._conv_head(x)))
        return GridOutput(last_hidden_state=x.flatten(2).transpose(1, 2))


AutoConfig.register(EfficientNetLiteConfig.model_type, EfficientNetLiteConfig, exist_ok=True)
AutoModel.register(EfficientNetLiteConfig, EfficientNetLiteModel, exist_ok=True)
