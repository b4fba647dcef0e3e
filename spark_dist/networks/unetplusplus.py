"""UNet++: Zhou et al., UNet++: A Nested U-Net Architecture for Medical Image Segmentation, DLMIA 2018,
arXiv 1807.10165."""

import torch
from torch import Tensor, nn

from .base import NetworkOutput, Tap, Taps, check_size, scaled
from .unet import double_conv

LEVELS = 5


class UNetPlusPlus(nn.Module):
    """Nested U-Nets of 64 … 1024 filters, all of which share an encoder; without deep supervision.

    X(i, j) of the paper is the j-th block of level i: it joins all earlier blocks of its level with the level below.
    low is X(1, 0), high is X(3, 0).
    """

    stride = 16

    def __init__(self, in_channels: int = 1, classes: int = 2, width: float = 1.0):
        super().__init__()
        filters = [scaled(64 * 2**level, width) for level in range(LEVELS)]
        self.taps = Taps(low=Tap(filters[1], 2), high=Tap(filters[3], 8))
        self.pool = nn.MaxPool2d(2)
        self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
        inputs = [in_channels, *filters[:-1]]
        self.encoder = nn.ModuleList(double_conv(a, b) for a, b in zip(inputs, filters, strict=True))
        self.nested = nn.ModuleList(
            nn.ModuleList(double_conv(j * filters[i] + filters[i + 1], filters[i]) for j in range(1, LEVELS - i))
            for i in range(LEVELS - 1)
        )
        self.head = nn.Conv2d(filters[0], classes, 1)

    def forward(self, x: Tensor) -> NetworkOutput:
        check_size("unet++", x, self.stride)
        levels: list[list[Tensor]] = []
        for block in self.encoder:
            levels.append([block(self.pool(levels[-1][0]) if levels else x)])
            # Each level of the encoder completes one more U-Net, from its bottom to its top.
            for i in reversed(range(len(levels) - 1)):
                joined = torch.cat([*levels[i], self.up(levels[i + 1][-1])], dim=1)
                levels[i].append(self.nested[i][len(levels[i]) - 1](joined))
        return NetworkOutput(self.head(levels[0][-1]), levels[1][0], levels[3][0])
