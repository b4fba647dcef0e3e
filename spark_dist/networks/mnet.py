"""MNet: Dong et al., Rethinking 2D/3D Networks for Anisotropic Medical Image Segmentation, IJCAI 2022,
arXiv 2205.04846."""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data_tools.errors import UserError

from .base import NetworkOutput, Tap, Taps, check_size, scaled


class MNet(nn.Module):
    """A mesh of U-Nets between a purely 2D one and a purely 3D one; a slice is a volume of depth 1.

    A cell of the mesh computes a 2D map (1×3×3 kernels) and a 3D map (3×3×3). Cell r of a level has come there by r
    steps as a 3D map: it joins the 2D map of cell r and the 3D map of cell r − 1 of the level above by their absolute
    difference, and in the decoder the 2D map of cell r and the 3D map of cell r + 1 of the level below.
    low is the 2D map of cell 0 at the second level, high that at the last level.
    """

    stride = 16

    def __init__(self, in_channels: int = 1, classes: int = 2, width: float = 1.0):
        super().__init__()
        filters = [scaled(c, width) for c in (32, 48, 64, 80, 96)]
        bottom = len(filters) - 1
        self.taps = Taps(low=Tap(filters[1], 2), high=Tap(filters[-1], 16))
        inputs = [in_channels, *filters[:-1]]
        # At the edges of the mesh, a map that no other cell would take is left out.
        self.down = nn.ModuleList(
            nn.ModuleList(
                Cell(inputs[level], filters[level], flat=(level, r) != (bottom, bottom), deep=(level, r) != (bottom, 0))
                for r in range(level + 1)
            )
            for level in range(len(filters))
        )
        self.up = nn.ModuleList(
            nn.ModuleList(
                Cell(filters[level] + filters[level + 1], filters[level], r < level or r == 0, r > 0 or level == 0)
                for r in range(level + 1)
            )
            for level in reversed(range(bottom))
        )
        self.head = nn.Conv3d(filters[0], classes, 1, bias=False)

    def forward(self, x: Tensor) -> NetworkOutput:
        check_size("mnet", x, self.stride)
        if x.shape[-2:] == (self.stride, self.stride):
            raise UserError(f"mnet needs slices larger than {self.stride}×{self.stride}: its norm is over the map")
        levels, taps = [[self.down[0][0](x.unsqueeze(2))]], []
        for cells in self.down[1:]:
            flat, deep = ([F.max_pool3d(m, (1, 2, 2)) for m in maps] for maps in zip(*levels[-1], strict=True))
            joined = [flat[0], *map(difference, flat[1:], deep[:-1]), deep[-1]]
            levels.append([cell(m) for cell, m in zip(cells, joined, strict=True)])
            # What follows is computed from the very tensor that is returned, so that the logits have a gradient by it.
            first, deep = levels[-1][0]
            taps.append(first.squeeze(2))
            levels[-1][0] = taps[-1].unsqueeze(2), deep
        maps = levels[-1]
        for cells, skips in zip(self.up, levels[-2::-1], strict=True):
            below = [difference(flat, deep, up=True) for (flat, _), (_, deep) in pairwise(maps)]
            joined = [torch.cat([difference(*skip), m], dim=1) for skip, m in zip(skips, below, strict=True)]
            maps = [cell(m) for cell, m in zip(cells, joined, strict=True)]
        return NetworkOutput(self.head(sum(maps[0])).squeeze(2), taps[0], taps[-1])


def difference(flat: Tensor, deep: Tensor, up: bool = False) -> Tensor:
    """The absolute difference of two maps, of twice the height and width if `up`."""
    x = flat - deep
    return (F.interpolate(x, scale_factor=(1, 2, 2), mode="trilinear") if up else x).abs()


class Cell(nn.Module):
    """The 2D and the 3D map of a volume (N, C, D, H, W); None for one that is not wanted."""

    def __init__(self, channels: int, out_channels: int, flat: bool, deep: bool):
        super().__init__()
        self.flat = double_conv(channels, out_channels, (1, 3, 3)) if flat else None
        self.deep = double_conv(channels, out_channels, (3, 3, 3)) if deep else None

    def forward(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        return self.flat and self.flat(x), self.deep and self.deep(x)


class SliceConv3d(nn.Conv3d):
    """A 3D convolution of volumes of depth 1, where only the middle slice of the kernel meets more than padding.

    Computed in 2D it takes a third of the time. Nor can the real one be used for bfloat16 on CPUs with AMX: oneDNN 3.12
    reads memory that is not the volume's.
    """

    def forward(self, x: Tensor) -> Tensor:
        middle = self.weight[:, :, self.kernel_size[0] // 2]
        return F.conv2d(x.squeeze(2), middle, self.bias, padding="same").unsqueeze(2)


def double_conv(channels: int, out_channels: int, kernel: tuple[int, int, int]) -> nn.Sequential:
    """Convolution, instance norm, leaky ReLU; twice."""
    layers = []
    for inputs in (channels, out_channels):
        layers += [
            SliceConv3d(inputs, out_channels, kernel, padding="same"),
            nn.InstanceNorm3d(out_channels, affine=True),
            nn.LeakyReLU(inplace=True),
        ]
    return nn.Sequential(*layers)
