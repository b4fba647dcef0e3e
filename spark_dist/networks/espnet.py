"""ESPNet: Mehta et al., Efficient Spatial Pyramid of Dilated Convolutions for Semantic Segmentation, ECCV 2018,
arXiv 1803.06815."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import NetworkOutput, Tap, Taps, check_size, rgb, rgb_channels, scaled

BRANCHES = 5
"""Dilated convolutions side by side in a pyramid."""


class ESPNet(nn.Module):
    """Spatial pyramids of dilated convolutions, two at a stride of 4 and three at a stride of 8; the downsampled slice
    is fed in again at each level.

    low is the first convolution, high is the end of the encoder.
    """

    stride = 8

    def __init__(self, in_channels: int = 1, classes: int = 2, width: float = 1.0):
        super().__init__()
        stem = rgb_channels(in_channels)
        c16 = scaled(16, width)
        c64, c128 = (max(BRANCHES, scaled(c, width)) for c in (64, 128))
        self.taps = Taps(low=Tap(c16, 2), high=Tap(2 * c128, 8))
        self.level1 = nn.Sequential(conv(stem, c16, 3, stride=2), *active(c16))
        self.active1 = active(c16 + stem)
        self.down2 = down(c16 + stem, c64)
        self.level2 = nn.Sequential(*(Residual(c64) for _ in range(2)))
        self.active2 = active(2 * c64 + stem)
        self.down3 = down(2 * c64 + stem, c128)
        self.level3 = nn.Sequential(*(Residual(c128) for _ in range(3)))
        self.active3 = active(2 * c128)
        # From here on there is little more than one map for each class.
        pyramid = max(BRANCHES, classes)
        self.head3 = nn.Sequential(conv(2 * c128, classes), norm(classes), double(classes, classes))
        self.head2 = conv(2 * c64 + stem, classes)
        self.join2 = nn.Sequential(
            active(2 * classes),
            Pyramid(conv(2 * classes, pyramid // BRANCHES), pyramid),
            active(pyramid),
            double(pyramid, classes),
            active(classes),
        )
        self.join1 = nn.Sequential(conv(c16 + stem + classes, classes, 3), active(classes), double(classes, classes))

    def forward(self, x: Tensor) -> NetworkOutput:
        check_size("espnet", x, self.stride)
        x = rgb(x)
        half = halved(x)
        low = self.level1(x)
        map1 = self.active1(torch.cat([low, half], dim=1))
        first = self.down2(map1)
        map2 = self.active2(torch.cat([self.level2(first), first, halved(half)], dim=1))
        first = self.down3(map2)
        high = self.active3(torch.cat([first, self.level3(first)], dim=1))
        joint = self.join2(torch.cat([self.head2(map2), self.head3(high)], dim=1))
        return NetworkOutput(self.join1(torch.cat([joint, map1], dim=1)), low, high)


def halved(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=2, padding=1)


def conv(channels: int, out_channels: int, kernel: int = 1, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    padding = dilation * (kernel // 2)
    return nn.Conv2d(channels, out_channels, kernel, stride, padding, dilation, bias=False)


def double(channels: int, out_channels: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(channels, out_channels, 2, stride=2, bias=False)


def norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


def active(channels: int) -> nn.Sequential:
    return nn.Sequential(norm(channels), nn.PReLU(channels))


def down(channels: int, out_channels: int) -> nn.Sequential:
    reduce = conv(channels, out_channels // BRANCHES, 3, stride=2)
    return nn.Sequential(Pyramid(reduce, out_channels), active(out_channels))


class Pyramid(nn.Module):
    """Reduces the map and joins its convolutions with dilations of 1, 2, 4, 8 and 16; the sum of all smaller ones from
    2 on is added to each, which hides the grid that dilation leaves."""

    def __init__(self, reduce: nn.Conv2d, out_channels: int):
        super().__init__()
        inner = reduce.out_channels
        self.reduce = reduce
        self.plain = conv(inner, out_channels - (BRANCHES - 1) * inner, 3)
        self.dilated = nn.ModuleList(conv(inner, inner, 3, dilation=2**k) for k in range(1, BRANCHES))

    def forward(self, x: Tensor) -> Tensor:
        x = self.reduce(x)
        maps, total = [self.plain(x)], 0
        for branch in self.dilated:
            total = branch(x) + total
            maps.append(total)
        return torch.cat(maps, dim=1)


class Residual(nn.Module):
    """A pyramid with the input added."""

    def __init__(self, channels: int):
        super().__init__()
        self.pyramid = Pyramid(conv(channels, channels // BRANCHES), channels)
        self.active = active(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.active(x + self.pyramid(x))
