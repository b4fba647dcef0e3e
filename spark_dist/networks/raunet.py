"""RAUNet: Ni et al., Residual Attention U-Net for Semantic Segmentation of Cataract Surgical Instruments, ICONIP 2019,
arXiv 1909.10360."""

from torch import Tensor, nn
from torch.nn import functional as F

from .base import NetworkOutput, Tap, Taps, check_batch, check_size, scaled
from .resnet import ResNetEncoder


class RAUNet(nn.Module):
    """ResNet-34 encoder, LinkNet decoder, and augmented attention where the two are joined.

    low is the stem, high is layer2.
    """

    stride = 32

    def __init__(self, in_channels: int = 1, classes: int = 2, width: float = 1.0):
        super().__init__()
        self.encoder = ResNetEncoder("resnet34", in_channels, width)
        stem, *layers = self.encoder.channels
        self.taps = Taps(low=Tap(stem, 2), high=Tap(layers[1], 8))
        deep_to_shallow = list(zip(layers[:0:-1], layers[-2::-1], strict=True))
        self.up = nn.ModuleList(Up(a, b) for a, b in deep_to_shallow)
        self.attention = nn.ModuleList(Attention(b) for _, b in deep_to_shallow)
        self.last_up = Up(layers[0], stem)
        head = scaled(32, width)
        # Three borders that make up for each other: the size doubles exactly.
        self.head = nn.Sequential(
            nn.ConvTranspose2d(stem, head, 3, stride=2),
            nn.ReLU(inplace=True),
            nn.Conv2d(head, head, 3),
            nn.ReLU(inplace=True),
            nn.Conv2d(head, classes, 2, padding=1),
        )

    def forward(self, x: Tensor) -> NetworkOutput:
        check_size("raunet", x, self.stride)
        check_batch("raunet", x, self.training)
        low, *maps = self.encoder(x)
        x = maps[-1]
        for up, attention, skip in zip(self.up, self.attention, maps[-2::-1], strict=True):
            x = attention(up(x), skip)
        return NetworkOutput(self.head(self.last_up(x)), low, maps[1])


def conv1x1(channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, out_channels, 1), nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))


class Attention(nn.Module):
    """Augmented attention module: adds the encoder's map, its channels weighted by what both maps hold on average."""

    def __init__(self, channels: int):
        super().__init__()
        self.of_decoder = conv1x1(channels, channels)
        self.of_encoder = conv1x1(channels, channels)
        self.weight = nn.Conv2d(channels, channels, 1)
        self.encoder = conv1x1(channels, channels)

    def forward(self, decoder: Tensor, encoder: Tensor) -> Tensor:
        """(N, C, H, W) of two maps of that shape."""
        means = [F.adaptive_avg_pool2d(x, 1) for x in (decoder, encoder)]
        weight = self.weight(self.of_decoder(means[0]) + self.of_encoder(means[1])).softmax(dim=1)
        return decoder + weight * self.encoder(encoder)


class Up(nn.Sequential):
    """Doubles the map as in LinkNet: a transposed convolution among a quarter of the channels."""

    def __init__(self, channels: int, out_channels: int):
        inner = max(1, channels // 4)
        super().__init__(
            *conv1x1(channels, inner),
            nn.ConvTranspose2d(inner, inner, 4, stride=2, padding=1),
            nn.BatchNorm2d(inner),
            nn.ReLU(inplace=True),
            *conv1x1(inner, out_channels),
        )
