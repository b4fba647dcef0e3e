"""PSPNet: Zhao et al., Pyramid Scene Parsing Network, CVPR 2017, arXiv 1612.01105."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import NetworkOutput, Tap, Taps, check_batch, check_size
from .resnet import ResNetEncoder


class PSPNet(nn.Module):
    """ResNet-50 with a stem of three convolutions, dilated to a stride of 8, and pyramid pooling.

    low is the first convolution of the stem, high is layer4.
    """

    stride = 8
    branches_on_size = True
    """Adaptive pooling's bins depend on the size, so that an exported graph is of one."""

    def __init__(self, in_channels: int = 1, classes: int = 2, width: float = 1.0):
        super().__init__()
        self.encoder = ResNetEncoder("resnet50", in_channels, width, deep_stem=True, dilated=True)
        channels = self.encoder.channels
        self.taps = Taps(low=Tap(channels[0], 2), high=Tap(channels[4], 8))
        self.pyramid = PyramidPooling(channels[4])
        self.head = nn.Conv2d(channels[4] // 4, classes, 1)

    def forward(self, x: Tensor) -> NetworkOutput:
        check_size("pspnet", x, self.stride)
        check_batch("pspnet", x, self.training)
        low, *_, high = self.encoder(x)
        logits = resized(self.head(self.pyramid(high)), x)
        return NetworkOutput(logits, low, high)


def resized(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=True)


def conv(channels: int, out_channels: int, kernel: int) -> list[nn.Module]:
    convolution = nn.Conv2d(channels, out_channels, kernel, padding=kernel // 2, bias=False)
    return [convolution, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)]


class PyramidPooling(nn.Module):
    """Joins the map with its means over 1, 2², 3² and 6² regions: (N, C, H, W) to (N, C / 4, H, W)."""

    def __init__(self, channels: int, regions: tuple[int, ...] = (1, 2, 3, 6)):
        super().__init__()
        quarter = channels // 4
        self.levels = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(n), *conv(channels, quarter, 1)) for n in regions
        )
        self.join = nn.Sequential(*conv(channels + len(regions) * quarter, quarter, 3), nn.Dropout2d(0.1))

    def forward(self, x: Tensor) -> Tensor:
        return self.join(torch.cat([x, *(resized(level(x), x) for level in self.levels)], dim=1))
