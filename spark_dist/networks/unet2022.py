"""UNet-2022: Guo et al., UNet-2022: Exploring Dynamics in Non-isomorphic Architecture,
arXiv 2210.15566."""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import NetworkOutput, Tap, Taps, check_size, scaled

HEADS = (3, 6, 12, 24)
WINDOWS = (7, 7, 14, 7)
"""Side of the windows within which a level attends."""
BLOCKS = 3
"""In each level of the encoder and of the decoder."""
DROP = 0.2
"""How often the deepest block is dropped in training; shallower ones in proportion."""


class UNet2022(nn.Module):
    """Convolution and attention in each block: four levels from a stride of 4 to 32, each with its skip added.

    A window that does not fit a small map shrinks to it, and takes the part of its position bias that it needs.
    low is the encoder's first level, high its last, both after their norm.
    """

    stride = 32
    branches_on_size = True
    """Which windows shrink and which are shifted depends on the size of a map, so that an exported graph is of one."""

    def __init__(self, in_channels: int = 1, classes: int = 2, width: float = 1.0):
        super().__init__()
        # Each head keeps a whole number of channels.
        filters = [heads * scaled(32, width) for heads in HEADS]
        self.taps = Taps(low=Tap(filters[0], 4), high=Tap(filters[3], 32))
        half = (filters[0] + 1) // 2  # one channel alone would not survive its norm
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, half, 3, stride=2, padding=1),
            nn.GELU(),
            ChannelNorm(half),
            nn.Conv2d(half, half, 3, padding=1),
            nn.GELU(),
            ChannelNorm(half),
            nn.Conv2d(half, filters[0], 3, stride=2, padding=1),
            nn.GELU(),
            ChannelNorm(filters[0]),
            nn.Conv2d(filters[0], filters[0], 3, padding=1),
            ChannelNorm(filters[0]),
        )
        self.encoder = nn.ModuleList(blocks(level, filters[level], 4) for level in range(4))
        self.norms = nn.ModuleList(map(ChannelNorm, filters))
        steps = list(pairwise(filters))
        self.down = nn.ModuleList(
            nn.Sequential(nn.GELU(), ChannelNorm(a), nn.Conv2d(a, b, 3, stride=2, padding=1)) for a, b in steps
        )
        self.up = nn.ModuleList(nn.Sequential(ChannelNorm(b), nn.ConvTranspose2d(b, a, 2, stride=2)) for a, b in steps)
        self.decoder = nn.ModuleList(blocks(level, filters[level], 3) for level in range(3))
        self.head = nn.ConvTranspose2d(filters[0], classes, 4, stride=4)

    def forward(self, x: Tensor) -> NetworkOutput:
        check_size("unet2022", x, self.stride)
        x = self.encoder[0](self.stem(x))
        maps = [self.norms[0](x)]
        for down, level, norm in zip(self.down, self.encoder[1:], self.norms[1:], strict=True):
            x = level(down(x))
            maps.append(norm(x))
        x = maps[3]
        for up, level, skip in reversed(list(zip(self.up, self.decoder, maps[:3], strict=True))):
            x = level(up(x) + skip)
        return NetworkOutput(self.head(x), maps[0], maps[3])


def blocks(level: int, channels: int, levels: int) -> nn.Sequential:
    """One level of a coder that has so many `levels`."""
    layers = []
    for k in range(BLOCKS):
        drop = DROP * (level * BLOCKS + k) / (levels * BLOCKS - 1)
        layers += [
            Residual(ConvBlock(channels), drop),
            Residual(Attention(channels, HEADS[level], WINDOWS[level], shifted=k % 2 == 1), drop),
        ]
    return nn.Sequential(*layers)


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of (N, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Residual(nn.Module):
    """Adds what a block makes of the input; in training it leaves out the block for a part `drop` of the samples."""

    def __init__(self, block: nn.Module, drop: float):
        super().__init__()
        self.block = block
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        keep = F.dropout(x.new_ones(x.shape[0], 1, 1, 1), self.drop, self.training)
        return x + keep * self.block(x)


class ConvBlock(nn.Sequential):
    """Of ConvNeXt: 7×7 convolution in each channel alone, norm, two 1×1 convolutions, a learned scale."""

    def __init__(self, channels: int):
        super().__init__(
            nn.Conv2d(channels, channels, 7, padding=3, groups=channels),
            ChannelNorm(channels, eps=1e-6),
            nn.Conv2d(channels, 4 * channels, 1),
            nn.GELU(),
            nn.Conv2d(4 * channels, channels, 1),
        )
        self.scale = nn.Parameter(torch.full((channels, 1, 1), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * super().forward(x)


class Attention(nn.Module):
    """Attention within windows, as in Swin, to which a 7×7 convolution in each channel alone is added.

    Every other one is shifted by half a window, so that windows overlap those of the block before.
    """

    def __init__(self, channels: int, heads: int, window: int, shifted: bool):
        super().__init__()
        self.heads, self.window, self.shifted = heads, window, shifted
        self.norm = ChannelNorm(channels)
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.project = nn.Linear(channels, channels)
        self.position = nn.Parameter(torch.empty(heads, 2 * window - 1, 2 * window - 1))
        nn.init.trunc_normal_(self.position, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        size = [min(self.window, side) for side in (height, width)]
        fits = [side <= self.window for side in (height, width)]
        shift = [self.window // 2 if self.shifted and not fit else 0 for fit in fits]
        x = F.pad(self.norm(x), (0, -width % size[1], 0, -height % size[0]))
        x = x.roll([-s for s in shift], dims=(2, 3))
        tokens = windows(x, size)
        q, k, v = self.qkv(tokens).unflatten(-1, (3, self.heads, -1)).permute(3, 0, 1, 4, 2, 5)
        weights = q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2) + self.bias(size)
        if any(shift):
            weights = weights.masked_fill(strangers(x, size, shift), float("-inf"))
        attended = (weights.softmax(dim=-1) @ v).transpose(2, 3).flatten(3)
        attended = self.project(attended + windows(self.depthwise(x), size))
        rows, columns = x.shape[-2] // size[0], x.shape[-1] // size[1]
        x = attended.unflatten(2, size).unflatten(1, (rows, columns)).permute(0, 5, 1, 3, 2, 4)
        x = x.flatten(4, 5).flatten(2, 3).roll(shift, dims=(2, 3))
        return x[..., :height, :width]

    def bias(self, size: list[int]) -> Tensor:
        """Relative position bias (heads, T, T): added to the weight between each two of the T pixels of a window."""
        pixels = torch.cartesian_prod(*(torch.arange(side, device=self.position.device) for side in size))
        offset = pixels[:, None] - pixels + self.window - 1
        return self.position[:, offset[..., 0], offset[..., 1]]


def windows(x: Tensor, size: list[int]) -> Tensor:
    """The pixels of each window of a map: (N, C, H, W) to (N, windows, pixels, C)."""
    x = x.unflatten(3, (-1, size[1])).unflatten(2, (-1, size[0]))
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(1, 2)


def strangers(x: Tensor, size: list[int], shift: list[int]) -> Tensor:
    """Pixels that the roll made neighbours, though they are from opposite edges: (windows, 1, pixels, pixels)."""
    wrapped = [torch.arange(n, device=x.device) >= n - s for n, s in zip(x.shape[-2:], shift, strict=True)]
    origin = 2 * wrapped[0][:, None] + wrapped[1]
    origin = windows(origin[None, None], size)[0, :, :, 0]
    return (origin[:, None, :] != origin[:, :, None])[:, None]
