"""MobileNetV2: Sandler et al., Inverted Residuals and Linear Bottlenecks, CVPR 2018, arXiv 1801.04381."""

from torch import Tensor, nn
from torch.nn import functional as F

from .base import NetworkOutput, Tap, Taps, check_size, rgb, rgb_channels, scaled

STAGES = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 1), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
"""Expansion, channels, number of blocks and stride of the first of them; two strides fewer than for classification."""


class MobileNetV2(nn.Module):
    """MobileNetV2 at a stride of 8, with a 1×1 head.

    low is the stem, high is the last map before the head.
    """

    stride = 8

    def __init__(self, in_channels: int = 1, classes: int = 2, width: float = 1.0):
        super().__init__()
        channels, last = scaled(32, width), scaled(1280, width)
        self.taps = Taps(low=Tap(channels, 2), high=Tap(last, 8))
        self.stem = nn.Sequential(*conv(rgb_channels(in_channels), channels, 3, stride=2))
        layers = []
        for expansion, filters, blocks, stride in STAGES:
            for k in range(blocks):
                out_channels = scaled(filters, width)
                layers.append(InvertedResidual(channels, out_channels, expansion, stride if k == 0 else 1))
                channels = out_channels
        self.layers = nn.Sequential(*layers, *conv(channels, last, 1))
        self.head = nn.Conv2d(last, classes, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, x: Tensor) -> NetworkOutput:
        check_size("mobilenetv2", x, self.stride)
        low = self.stem(rgb(x))
        high = self.layers(low)
        logits = F.interpolate(self.head(high), size=x.shape[-2:], mode="bilinear", align_corners=True)
        return NetworkOutput(logits, low, high)


def conv(channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """Convolution, batch norm, ReLU6."""
    convolution = nn.Conv2d(channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [convolution, nn.BatchNorm2d(out_channels), nn.ReLU6(inplace=True)]


class InvertedResidual(nn.Module):
    """1×1 up, 3×3 in each channel alone, 1×1 down without activation, and the input added where it fits."""

    def __init__(self, channels: int, out_channels: int, expansion: int, stride: int):
        super().__init__()
        inner = expansion * channels
        self.residual = stride == 1 and channels == out_channels
        self.body = nn.Sequential(
            *(conv(channels, inner, 1) if expansion > 1 else []),
            *conv(inner, inner, 3, stride, groups=inner),
            nn.Conv2d(inner, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.residual else self.body(x)
