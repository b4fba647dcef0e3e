"""ResNet: He et al., Deep Residual Learning for Image Recognition, CVPR 2016, arXiv 1512.03385.

`ResNetEncoder` is shared by all networks that stand on a ResNet; `load_pretrained` fills it with ImageNet weights.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from data_tools.errors import UserError

from .base import NetworkOutput, Tap, Taps, check_size, rgb, rgb_channels, scaled


def conv(channels: int, out_channels: int, kernel: int, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    padding = dilation * (kernel // 2)
    return nn.Conv2d(channels, out_channels, kernel, stride, padding, dilation, bias=False)


def projection(channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    """The shortcut by which the input of a block fits its output; None where it fits already."""
    if stride == 1 and channels == out_channels:
        return None
    return nn.Sequential(conv(channels, out_channels, 1, stride), nn.BatchNorm2d(out_channels))


class BasicBlock(nn.Module):
    """Two 3×3 convolutions, and the input added."""

    expansion = 1

    def __init__(self, channels: int, filters: int, stride: int = 1, dilation: int = 1):
        super().__init__()
        self.conv1 = conv(channels, filters, 3, stride, dilation)
        self.bn1 = nn.BatchNorm2d(filters)
        self.conv2 = conv(filters, filters, 3, 1, dilation)
        self.bn2 = nn.BatchNorm2d(filters)
        self.downsample = projection(channels, filters, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x)).relu_()
        y = self.bn2(self.conv2(y))
        return (y + (self.downsample(x) if self.downsample else x)).relu_()


class Bottleneck(nn.Module):
    """1×1 down, 3×3, 1×1 up to four times the filters, and the input added."""

    expansion = 4

    def __init__(self, channels: int, filters: int, stride: int = 1, dilation: int = 1):
        super().__init__()
        out_channels = self.expansion * filters
        self.conv1 = conv(channels, filters, 1)
        self.bn1 = nn.BatchNorm2d(filters)
        self.conv2 = conv(filters, filters, 3, stride, dilation)
        self.bn2 = nn.BatchNorm2d(filters)
        self.conv3 = conv(filters, out_channels, 1)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample = projection(channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x)).relu_()
        y = self.bn2(self.conv2(y)).relu_()
        y = self.bn3(self.conv3(y))
        return (y + (self.downsample(x) if self.downsample else x)).relu_()


RESNETS = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
}


class ResNetEncoder(nn.Module):
    """A ResNet without its classifier, its parameters named as in torchvision.

    `deep_stem` has three 3×3 convolutions for the 7×7 one; `dilated` keeps layer3 and layer4 at a stride of 8 and
    dilates their convolutions. `channels` are those of the five maps that forward returns, `strides` their strides.
    """

    def __init__(
        self, name: str, in_channels: int = 1, width: float = 1.0, deep_stem: bool = False, dilated: bool = False
    ):
        super().__init__()
        block, blocks = RESNETS[name]
        filters = scaled(64, width)
        self.channels = (filters, *(block.expansion * filters * 2**k for k in range(4)))
        self.strides = (2, 4, 8, 8, 8) if dilated else (2, 4, 8, 16, 32)
        self.deep_stem = deep_stem
        self.conv1 = conv(rgb_channels(in_channels), filters, 3 if deep_stem else 7, stride=2)
        self.bn1 = nn.BatchNorm2d(filters)
        stem = filters
        if deep_stem:
            stem = 2 * filters
            self.conv2 = conv(filters, filters, 3)
            self.bn2 = nn.BatchNorm2d(filters)
            self.conv3 = conv(filters, stem, 3)
            self.bn3 = nn.BatchNorm2d(stem)
        last = (1, 2, 4) if dilated else (1, 1, 1)
        self.layer1 = layer(block, blocks[0], stem, filters)
        self.layer2 = layer(block, blocks[1], self.channels[1], 2 * filters, stride=2)
        self.layer3 = layer(block, blocks[2], self.channels[2], 4 * filters, 1 if dilated else 2, last[:2])
        self.layer4 = layer(block, blocks[3], self.channels[3], 8 * filters, 1 if dilated else 2, last[1:])
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> list[Tensor]:
        """Of slices (N, in_channels, H, W): the maps after the first convolution and after each of the four layers."""
        maps = [self.bn1(self.conv1(rgb(x))).relu_()]
        x = maps[0]
        if self.deep_stem:
            x = self.bn2(self.conv2(x)).relu_()
            x = self.bn3(self.conv3(x)).relu_()
        x = F.max_pool2d(x, 3, stride=2, padding=1)
        for blocks in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = blocks(x)
            maps.append(x)
        return maps


def layer(
    block: type[BasicBlock | Bottleneck],
    blocks: int,
    channels: int,
    filters: int,
    stride: int = 1,
    dilations: tuple[int, int] = (1, 1),
) -> nn.Sequential:
    """Blocks in a row; the first has the stride and the first dilation, the others the second dilation."""
    first = block(channels, filters, stride, dilations[0])
    rest = (block(block.expansion * filters, filters, 1, dilations[1]) for _ in range(blocks - 1))
    return nn.Sequential(first, *rest)


class ResNet(nn.Module):
    """Fully convolutional ResNet: Long et al., arXiv 1411.4038, with one 1×1 head on the last layer.

    low is the stem, high is layer2.
    """

    stride = 32

    def __init__(self, name: str, in_channels: int = 1, classes: int = 2, width: float = 1.0):
        super().__init__()
        self.name = name
        self.encoder = ResNetEncoder(name, in_channels, width)
        channels, strides = self.encoder.channels, self.encoder.strides
        self.taps = Taps(low=Tap(channels[0], strides[0]), high=Tap(channels[2], strides[2]))
        self.head = nn.Conv2d(channels[4], classes, 1)

    def forward(self, x: Tensor) -> NetworkOutput:
        check_size(self.name, x, self.stride)
        maps = self.encoder(x)
        logits = F.interpolate(self.head(maps[4]), size=x.shape[-2:], mode="bilinear", align_corners=True)
        return NetworkOutput(logits, maps[0], maps[2])


def load_pretrained(network: nn.Module, path: Path) -> None:
    """Fill the ResNet encoder of `network` with the weights of a classifier, as torchvision saves them.

    `path` is a state dict, .safetensors or .pth; its classifier (`fc.*`) is left out. The kernels of a first
    convolution of colour images are fitted to the channels that the network takes (`fit_channels`).

    Raises `UserError` if the network has no ResNet encoder, the file cannot be read, or its weights do not fit.
    """
    encoder = getattr(network, "encoder", None)
    if not isinstance(encoder, ResNetEncoder):
        raise UserError(f"{path} is for networks with a ResNet encoder, which {type(network).__name__} has not")
    own = encoder.state_dict()
    # ImageNet weights from before 2018 do not have these counters.
    counters = {key: value for key, value in own.items() if key.endswith("num_batches_tracked")}
    weights = counters | {key: value for key, value in read_weights(path).items() if not key.startswith("fc.")}
    if isinstance(first := weights.get("conv1.weight"), Tensor) and first.ndim == 4 and first.shape[1] == 3:
        weights["conv1.weight"] = fit_channels(first, encoder.conv1.in_channels)
    wrong = [
        f"{key} ({shape(weights.get(key))} in the file, {shape(own.get(key))} in the network)"
        for key in dict.fromkeys([*own, *weights])
        if shape(own.get(key)) != shape(weights.get(key))
    ]
    if wrong:
        raise UserError(f"{path} does not fit this encoder; {len(wrong)} keys differ, first {', '.join(wrong[:3])}")
    encoder.load_state_dict(weights)


def fit_channels(kernels: Tensor, channels: int) -> Tensor:
    """Kernels (F, 3, H, W) repeated over the input channels to (F, channels, H, W), and scaled so that an input which
    is the same in all channels gives what it gave before where these are a multiple of three.

    As in timm (Wightman, PyTorch Image Models).
    """
    repeats = -(-channels // 3)
    return kernels.repeat(1, repeats, 1, 1)[:, :channels] * (3 / channels)


def shape(value: object) -> str:
    return "×".join(map(str, value.shape)) or "scalar" if isinstance(value, Tensor) else "none"


def read_weights(path: Path) -> dict[str, Tensor]:
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # both readers have many kinds, few of which say what a user can do
        raise UserError(f"{path} is no state dict in .safetensors or .pth ({type(error).__name__})") from error
    if not isinstance(weights, dict):
        raise UserError(f"{path} holds a {type(weights).__name__}, not a state dict")
    return weights
