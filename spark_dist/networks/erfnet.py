"""ERFNet: Romera et al., Efficient Residual Factorized ConvNet for Real-Time Semantic Segmentation, IEEE T-ITS 2018."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import NetworkOutput, Tap, Taps, check_size, scaled


class ERFNet(nn.Module):
    """Three downsamplers, three upsamplers, and residual blocks of 3×1 and 1×3 convolutions between them.

    low is the first downsampler, high is the end of the encoder.
    """

    stride = 8

    def __init__(self, in_channels: int = 1, classes: int = 2, width: float = 1.0):
        super().__init__()
        # A downsampler has its input among its channels.
        c16 = max(scaled(16, width), in_channels + 1)
        c64 = max(scaled(64, width), c16 + 1)
        c128 = max(scaled(128, width), c64 + 1)
        self.taps = Taps(low=Tap(c16, 2), high=Tap(c128, 8))
        self.initial = Down(in_channels, c16)
        self.encoder = nn.Sequential(
            Down(c16, c64),
            *(Residual(c64, dropout=0.03) for _ in range(5)),
            Down(c64, c128),
            *(Residual(c128, dropout=0.3, dilation=d) for d in (2, 4, 8, 16, 2, 4, 8, 16)),
        )
        self.decoder = nn.Sequential(
            *up(c128, c64),
            *(Residual(c64) for _ in range(2)),
            *up(c64, c16),
            *(Residual(c16) for _ in range(2)),
        )
        self.head = nn.ConvTranspose2d(c16, classes, 2, stride=2)

    def forward(self, x: Tensor) -> NetworkOutput:
        check_size("erfnet", x, self.stride)
        low = self.initial(x)
        high = self.encoder(low)
        return NetworkOutput(self.head(self.decoder(high)), low, high)


def norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class Down(nn.Module):
    """3×3 convolution with stride 2 beside 2×2 max pooling."""

    def __init__(self, channels: int, out_channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, out_channels - channels, 3, stride=2, padding=1)
        self.norm = norm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(torch.cat([self.conv(x), F.max_pool2d(x, 2)], dim=1)).relu_()


def up(channels: int, out_channels: int) -> list[nn.Module]:
    double = nn.ConvTranspose2d(channels, out_channels, 3, stride=2, padding=1, output_padding=1)
    return [double, norm(out_channels), nn.ReLU(inplace=True)]


class Residual(nn.Module):
    """Non-bottleneck-1D: two 3×3 convolutions, the second dilated, each as a 3×1 and a 1×3, and the input added."""

    def __init__(self, channels: int, dropout: float = 0.0, dilation: int = 1):
        super().__init__()
        self.body = nn.Sequential(
            *factorized(channels), nn.ReLU(inplace=True), *factorized(channels, dilation), nn.Dropout2d(dropout)
        )

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.body(x)).relu_()


def factorized(channels: int, dilation: int = 1) -> list[nn.Module]:
    return [
        nn.Conv2d(channels, channels, (3, 1), padding=(dilation, 0), dilation=(dilation, 1)),
        nn.ReLU(inplace=True),
        nn.Conv2d(channels, channels, (1, 3), padding=(0, dilation), dilation=(1, dilation)),
        norm(channels),
    ]
