"""ENet: Paszke et al., A Deep Neural Network Architecture for Real-Time Semantic Segmentation, arXiv 1606.02147."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import NetworkOutput, Tap, Taps, check_size, rgb, rgb_channels, scaled


class ENet(nn.Module):
    """The paper's five stages, with PReLU throughout.

    low is the initial block, high is the end of stage 3.
    """

    stride = 8

    def __init__(self, in_channels: int = 1, classes: int = 2, width: float = 1.0):
        super().__init__()
        stem = rgb_channels(in_channels)
        # Bottlenecks divide by four, and the initial block has the input among its channels.
        c16 = 4 * max(scaled(4, width), stem // 4 + 1)
        c64, c128 = (4 * scaled(c // 4, width) for c in (64, 128))
        self.taps = Taps(low=Tap(c16, 2), high=Tap(c128, 8))
        self.initial = Initial(stem, c16)
        self.down1 = Downsampling(c16, c64, dropout=0.01)
        self.stage1 = nn.Sequential(*(Bottleneck(c64, dropout=0.01) for _ in range(4)))
        self.down2 = Downsampling(c64, c128)
        self.stage2 = middle_stage(c128)
        self.stage3 = middle_stage(c128)
        self.up4 = Upsampling(c128, c64)
        self.stage4 = nn.Sequential(*(Bottleneck(c64) for _ in range(2)))
        self.up5 = Upsampling(c64, c16)
        self.stage5 = Bottleneck(c16)
        self.head = nn.ConvTranspose2d(c16, classes, 2, stride=2, bias=False)

    def forward(self, x: Tensor) -> NetworkOutput:
        check_size("enet", x, self.stride)
        low = self.initial(rgb(x))
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


def conv(channels: int, out_channels: int, kernel: int | tuple[int, int] = 1, **options) -> nn.Conv2d:
    return nn.Conv2d(channels, out_channels, kernel, bias=False, **options)


def active(channels: int) -> list[nn.Module]:
    return [nn.BatchNorm2d(channels), nn.PReLU()]


def bottleneck(channels: int, middle: list[nn.Module], out_channels: int, dropout: float) -> nn.Sequential:
    """1×1 down to a quarter of `out_channels`, the middle convolution there, and 1×1 up."""
    inner = out_channels // 4
    down = [conv(channels, inner), *active(inner)]
    up = [conv(inner, out_channels), nn.BatchNorm2d(out_channels), nn.Dropout2d(dropout)]
    return nn.Sequential(*down, *middle, *active(inner), *up)


class Initial(nn.Module):
    """3×3 convolution with stride 2 beside 2×2 max pooling."""

    def __init__(self, channels: int, out_channels: int):
        super().__init__()
        self.conv = conv(channels, out_channels - channels, 3, stride=2, padding=1)
        self.active = nn.Sequential(*active(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.active(torch.cat([self.conv(x), F.max_pool2d(x, 2)], dim=1))


class Bottleneck(nn.Module):
    """A 3×3 convolution (dilated, or 5×1 and 1×5) among a quarter of the channels, and the input added."""

    def __init__(self, channels: int, dilation: int = 1, asymmetric: bool = False, dropout: float = 0.1):
        super().__init__()
        inner = channels // 4
        if asymmetric:
            middle = [conv(inner, inner, (5, 1), padding=(2, 0)), conv(inner, inner, (1, 5), padding=(0, 2))]
        else:
            middle = [conv(inner, inner, 3, padding=dilation, dilation=dilation)]
        self.extension = bottleneck(channels, middle, channels, dropout)
        self.activation = nn.PReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(x + self.extension(x))


class Downsampling(nn.Module):
    """Halves the map: max pooling, whose places are kept for the decoder, beside a bottleneck of stride 2."""

    def __init__(self, channels: int, out_channels: int, dropout: float = 0.1):
        super().__init__()
        inner = out_channels // 4
        self.main = nn.Sequential(conv(channels, out_channels), nn.BatchNorm2d(out_channels))
        self.extension = bottleneck(channels, [conv(inner, inner, 2, stride=2)], out_channels, dropout)
        self.activation = nn.PReLU()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        pooled, places = F.max_pool2d(x, 2, return_indices=True)
        return self.activation(self.main(pooled) + self.extension(x)), places


class Upsampling(nn.Module):
    """Doubles the map: unpooling to the encoder's places beside a bottleneck with a transposed convolution."""

    def __init__(self, channels: int, out_channels: int):
        super().__init__()
        inner = out_channels // 4
        self.main = nn.Sequential(conv(channels, out_channels), nn.BatchNorm2d(out_channels))
        middle = nn.ConvTranspose2d(inner, inner, 2, stride=2, bias=False)
        self.extension = bottleneck(channels, [middle], out_channels, dropout=0.1)
        self.activation = nn.PReLU()

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        return self.activation(F.max_unpool2d(self.main(x), places, 2) + self.extension(x))
