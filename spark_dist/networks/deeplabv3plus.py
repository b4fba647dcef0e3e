"""DeepLabv3+: Chen et al., Encoder-Decoder with Atrous Separable Convolution for Semantic Image Segmentation, ECCV
2018, arXiv 1802.02611."""

import torch
from torch import Tensor, nn

from .base import NetworkOutput, Tap, Taps, check_batch, check_size, scaled
from .pspnet import resized


class DeepLabV3Plus(nn.Module):
    """Aligned Xception with 65 layers, dilated to a stride of 8; atrous spatial pyramid pooling; a decoder that joins
    it with the first block's map.

    low is the first convolution, high is the end of the exit flow.
    """

    stride = 8

    def __init__(self, in_channels: int = 1, classes: int = 2, width: float = 1.0):
        super().__init__()
        c32, c48, c64, c128, c256, c728, c1024, c1536, c2048 = (
            scaled(c, width) for c in (32, 48, 64, 128, 256, 728, 1024, 1536, 2048)
        )
        self.taps = Taps(low=Tap(c32, 2), high=Tap(c2048, 8))
        self.stem = conv(in_channels, c32, 3, stride=2)
        self.block1 = nn.Sequential(
            conv(c32, c64, 3),
            Block(c64, [c128] * 3, stride=2, first_relu=False),
            nn.ReLU(inplace=True),
        )
        self.rest = nn.Sequential(
            Block(c128, [c256] * 3, stride=2, first_relu=False),
            Block(c256, [c728] * 3),
            *(Block(c728, [c728] * 3, dilation=2) for _ in range(16)),
            Block(c728, [c728, c1024, c1024], dilation=2, second_norm=False),
            nn.ReLU(inplace=True),
            *separable(c1024, c1536, dilation=4, relu=True),
            *separable(c1536, c1536, dilation=4, relu=True),
            *separable(c1536, c2048, dilation=4, relu=True),
        )
        self.pyramid = PyramidPooling(c2048, c256)
        self.skip = conv(c128, c48, 3)
        self.head = nn.Sequential(
            conv(c256 + c48, c256, 3),
            nn.Dropout(0.5),
            conv(c256, c256, 3),
            nn.Dropout(0.1),
            nn.Conv2d(c256, classes, 1),
        )

    def forward(self, x: Tensor) -> NetworkOutput:
        check_size("deeplabv3+", x, self.stride)
        check_batch("deeplabv3+", x, self.training)
        low = self.stem(x)
        first = self.block1(low)
        high = self.rest(first)
        joined = torch.cat([resized(self.pyramid(high), first), self.skip(first)], dim=1)
        return NetworkOutput(resized(self.head(joined), x), low, high)


def conv(channels: int, out_channels: int, kernel: int, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    """Convolution, batch norm, ReLU."""
    padding = kernel // 2 * dilation
    convolution = nn.Conv2d(channels, out_channels, kernel, stride, padding, dilation, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))


def separable(
    channels: int, out_channels: int, stride: int = 1, dilation: int = 1, norm: bool = True, relu: bool = False
) -> list[nn.Module]:
    """3×3 convolution in each channel alone, batch norm, 1×1 convolution; then batch norm and ReLU if wanted."""
    return [
        nn.Conv2d(channels, channels, 3, stride, dilation, dilation, groups=channels, bias=False),
        nn.BatchNorm2d(channels),
        nn.Conv2d(channels, out_channels, 1, bias=False),
        *([nn.BatchNorm2d(out_channels)] if norm else []),
        *([nn.ReLU(inplace=True)] if relu else []),
    ]


class Block(nn.Module):
    """Three separable convolutions, each after a ReLU, and the input added; the last one has the stride."""

    def __init__(
        self,
        channels: int,
        filters: list[int],
        stride: int = 1,
        dilation: int = 1,
        first_relu: bool = True,
        second_norm: bool = True,
    ):
        super().__init__()
        a, b, c = filters
        self.body = nn.Sequential(
            *([nn.ReLU()] if first_relu else []),  # not in place: the input is added below
            *separable(channels, a, dilation=dilation),
            nn.ReLU(inplace=True),
            *separable(a, b, dilation=dilation, norm=second_norm),
            nn.ReLU(inplace=True),
            *separable(b, c, stride, dilation),
        )
        same = channels == c and stride == 1
        projection = [nn.Conv2d(channels, c, 1, stride, bias=False), nn.BatchNorm2d(c)]
        self.skip = nn.Sequential(*([] if same else projection))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + self.skip(x)


class PyramidPooling(nn.Module):
    """Atrous spatial pyramid pooling for a stride of 8: (N, channels, H, W) to (N, filters, H, W)."""

    def __init__(self, channels: int, filters: int, rates: tuple[int, ...] = (12, 24, 36)):
        super().__init__()
        self.branches = nn.ModuleList(
            [conv(channels, filters, 1), *(conv(channels, filters, 3, dilation=rate) for rate in rates)]
        )
        self.mean = nn.Sequential(nn.AdaptiveAvgPool2d(1), conv(channels, filters, 1))
        self.join = nn.Sequential(conv((len(rates) + 2) * filters, filters, 1), nn.Dropout(0.5))

    def forward(self, x: Tensor) -> Tensor:
        maps = [branch(x) for branch in self.branches]
        return self.join(torch.cat([*maps, self.mean(x).expand_as(maps[0])], dim=1))
