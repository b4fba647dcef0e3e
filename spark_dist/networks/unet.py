"""U-Net: Ronneberger et al., MICCAI 2015, arXiv 1505.04597."""

from torch import Tensor, cat, nn

from .base import NetworkOutput, Tap, Taps, check_size, scaled


class UNet(nn.Module):
    """Five levels of 64 … 1024 filters: two padded 3×3 convolutions with batch norm each; 2×2 max pooling down, nearest
    neighbour and a 3×3 convolution up.

    low is the second level of the encoder, high is the bottleneck.
    """

    stride = 16

    def __init__(self, in_channels: int = 1, classes: int = 2, width: float = 1.0):
        super().__init__()
        filters = [scaled(64 * 2**level, width) for level in range(5)]
        self.taps = Taps(low=Tap(filters[1], 2), high=Tap(filters[4], 16))
        self.pool = nn.MaxPool2d(2)
        inputs = [in_channels, *filters[:-1]]
        self.encoder = nn.ModuleList(double_conv(a, b) for a, b in zip(inputs, filters, strict=True))
        steps = list(zip(filters[:0:-1], filters[-2::-1], strict=True))
        self.up = nn.ModuleList(up_conv(a, b) for a, b in steps)
        self.decoder = nn.ModuleList(double_conv(2 * b, b) for _, b in steps)
        self.head = nn.Conv2d(filters[0], classes, 1)

    def forward(self, x: Tensor) -> NetworkOutput:
        check_size("unet", x, self.stride)
        maps = [self.encoder[0](x)]
        for block in self.encoder[1:]:
            maps.append(block(self.pool(maps[-1])))
        x = maps[-1]
        for up, block, skip in zip(self.up, self.decoder, maps[-2::-1], strict=True):
            x = block(cat([skip, up(x)], dim=1))
        return NetworkOutput(self.head(x), maps[1], maps[-1])


def conv(channels: int, out_channels: int) -> list[nn.Module]:
    """3×3 convolution, batch norm, ReLU."""
    return [nn.Conv2d(channels, out_channels, 3, padding=1), nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)]


def double_conv(channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(*conv(channels, out_channels), *conv(out_channels, out_channels))


def up_conv(channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Upsample(scale_factor=2), *conv(channels, out_channels))
