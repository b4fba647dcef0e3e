"""ENet: Paszke et al., A Deep Neural Network Architecture for Real-Time Semantic Segmentation, arXiv 1606.02147."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import NetworkOutput, Tap, Taps, scaled


class ENet(nn.Module):
    """The paper's five stages, with PReLU throughout, and no batch norm between the two halves of an asymmetric 5×5.

    low is the initial block, high is the end of stage 3.
    """

    stride = 8

    def __init__(self, in_channels: int = 1, classes: int = 2, width: float = 1.0):
        super().__init__()
        # Bottlenecks divide by four.
        c16, c64, c128 = (4 * scaled(c // 4, width) for c in (16, 64, 128))
        self.taps = Taps(low=Tap(c16, 2), high=Tap(c128, 8))
        self.initial = Initial(in_channels, c16)
        self.down1 = Downsampling(c16, c64, inner=c16 // 4, dropout=0.01)
        self.stage1 = nn.Sequential(*(Bottleneck(c64, dropout=0.01) for _ in range(4)))
        self.down2 = Downsampling(c64, c128, inner=c128 // 4, dropout=0.1)
        self.stage2 = middle_stage(c128)
        self.stage3 = middle_stage(c128)
        self.up4 = Upsampling(c128, c64, kernel=2)
        self.stage4 = nn.Sequential(*(Bottleneck(c64) for _ in range(2)))
        self.up5 = Upsampling(c64, c16, kernel=3)
        self.stage5 = Bottleneck(c16)
        self.head = nn.ConvTranspose2d(c16, classes, 3, stride=2, padding=1, output_padding=1, bias=False)

    def forward(self, x: Tensor) -> NetworkOutput:
        low = self.initial(x)
        x, places1 = self.down1(low)
        x, places2 = self.down2(self.stage1(x))
        high = self.stage3(self.stage2(x))
        x = self.stage4(self.up4(high, places2))
        x = self.stage5(self.up5(x, places1))
        return NetworkOutput(self.head(x), low, high)


def middle_stage(channels: int) -> nn.Sequential:
    """Stages 2 and 3: plain, dilated and asymmetric bottlenecks in turn."""
    settings = [{}, {"dilation": 2}, {"asymmetric": True}, {"dilation": 4}]
    settings += [{}, {"dilation": 8}, {"asymmetric": True}, {"dilation": 16}]
    return nn.Sequential(*(Bottleneck(channels, **kind) for kind in settings))


class Initial(nn.Module):
    """3×3 convolution with stride 2 beside 2×2 max pooling."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels - in_channels, 3, stride=2, padding=1, bias=False)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(out_channels)
        self.activation = nn.PReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.norm(torch.cat([self.conv(x), self.pool(x)], dim=1)))


def normed(conv: nn.Module) -> list[nn.Module]:
    """A convolution with batch norm."""
    return [conv, nn.BatchNorm2d(conv.out_channels)]


class Bottleneck(nn.Module):
    """1×1 down to a quarter of the channels, a 3×3 (dilated, or 5×1 and 1×5), 1×1 up, and the input added."""

    def __init__(self, channels: int, dilation: int = 1, asymmetric: bool = False, dropout: float = 0.1):
        super().__init__()
        inner = channels // 4
        if asymmetric:
            middle = [
                nn.Conv2d(inner, inner, (5, 1), padding=(2, 0), bias=False),
                nn.PReLU(),
                *normed(nn.Conv2d(inner, inner, (1, 5), padding=(0, 2), bias=False)),
            ]
        else:
            middle = normed(nn.Conv2d(inner, inner, 3, padding=dilation, dilation=dilation, bias=False))
        self.extension = nn.Sequential(
            *normed(nn.Conv2d(channels, inner, 1, bias=False)),
            nn.PReLU(),
            *middle,
            nn.PReLU(),
            *normed(nn.Conv2d(inner, channels, 1, bias=False)),
            nn.Dropout2d(dropout),
        )
        self.activation = nn.PReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(x + self.extension(x))


class Downsampling(nn.Module):
    """Halves the map: max pooling, whose places are kept for the decoder, beside a bottleneck of stride 2."""

    def __init__(self, channels: int, out_channels: int, inner: int, dropout: float):
        super().__init__()
        self.more = out_channels - channels
        self.extension = nn.Sequential(
            *normed(nn.Conv2d(channels, inner, 2, stride=2, bias=False)),
            nn.PReLU(),
            *normed(nn.Conv2d(inner, inner, 3, padding=1, bias=False)),
            nn.PReLU(),
            *normed(nn.Conv2d(inner, out_channels, 1, bias=False)),
            nn.PReLU(),
            nn.Dropout2d(dropout),
        )
        self.activation = nn.PReLU()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        pooled, places = F.max_pool2d(x, 2, return_indices=True)
        pooled = F.pad(pooled, (0, 0, 0, 0, 0, self.more))
        return self.activation(pooled + self.extension(x)), places


class Upsampling(nn.Module):
    """Doubles the map: unpooling to the encoder's places beside a bottleneck with a transposed convolution."""

    def __init__(self, channels: int, out_channels: int, kernel: int):
        super().__init__()
        inner = out_channels // 4
        self.main = nn.Sequential(*normed(nn.Conv2d(channels, out_channels, 1, bias=False)))
        extra = kernel - 2  # so that the map doubles with either kernel
        double = nn.ConvTranspose2d(inner, inner, kernel, 2, padding=extra, output_padding=extra, bias=False)
        self.extension = nn.Sequential(
            *normed(nn.Conv2d(channels, inner, 1, bias=False)),
            nn.PReLU(),
            *normed(double),
            nn.PReLU(),
            *normed(nn.Conv2d(inner, out_channels, 1, bias=False)),
            nn.PReLU(),
            nn.Dropout2d(0.1),
        )
        self.activation = nn.PReLU()

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        return self.activation(F.max_unpool2d(self.main(x), places, 2) + self.extension(x))
