"""UniverSeg: Butoi et al., UniverSeg: Universal Medical Image Segmentation, ICCV 2023, arXiv 2304.06131."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data_tools.errors import UserError

from .base import NetworkOutput, Tap, Taps, check_size, scaled

LEVELS = 4


class UniverSeg(nn.Module):
    """A U-Net whose blocks compare the slice with each image and label of a support set.

    The paper segments one label at a time by a binary mask. Here the support's labels are one-hot, a channel for each
    class, so that one pass segments them all.

    The support set is given once, by `set_support`, and is saved and loaded with the weights.
    low is the slice's map after the first block, high after the third.
    """

    stride = 8

    def __init__(self, in_channels: int = 1, classes: int = 2, width: float = 1.0):
        super().__init__()
        filters = scaled(16, width)
        self.in_channels, self.classes = in_channels, classes
        self.taps = Taps(low=Tap(filters, 1), high=Tap(filters, 4))
        inputs = [in_channels + in_channels + classes, *[2 * filters] * (LEVELS - 1)]
        self.encoder = nn.ModuleList(CrossBlock(channels, filters) for channels in inputs)
        self.decoder = nn.ModuleList(CrossBlock(4 * filters, filters, last=k == LEVELS - 2) for k in range(LEVELS - 1))
        self.head = conv(filters, classes, 1)
        self.pool = nn.MaxPool2d(2)
        self.up = nn.UpsamplingBilinear2d(scale_factor=2)
        self.register_buffer("support_images", torch.empty(0, in_channels, 0, 0))
        self.register_buffer("support_labels", torch.empty(0, 1, 0, 0, dtype=torch.uint8))

    def set_support(self, images: Tensor, labels: Tensor) -> None:
        """The examples by which the network segments.

        images (S, in_channels, H, W), or (S, 1, H, W) for all channels; labels (S, 1, H, W), the class of each pixel.
        Slices must have the same height and width.
        """
        device = self.support_images.device
        self.support_images = images.detach().expand(-1, self.in_channels, -1, -1).to(device, copy=True)
        self.support_labels = labels.detach().to(device, torch.uint8)

    @property
    def bound_to(self) -> tuple[int, int]:
        """The size of slices, rows and columns, that the support set asks for."""
        return tuple(self.support_images.shape[-2:])

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest) -> None:
        # A saved support set has a size of its own; as in BatchNorm, this is where torch lets a module adapt.
        for name in ("support_images", "support_labels"):
            if (saved := state_dict.get(prefix + name)) is not None:
                setattr(self, name, getattr(self, name).new_empty(saved.shape))
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def support(self, x: Tensor) -> Tensor:
        """Images and one-hot labels, (N, S, in_channels + classes, H, W), the same for each slice of x (N, C, H, W)."""
        if not len(self.support_images):
            raise UserError("universeg has no support set; call set_support with images and labels first")
        if self.support_images.shape[-2:] != x.shape[-2:]:
            sizes = ("×".join(map(str, t.shape[-2:])) for t in (self.support_images, x))
            raise UserError("universeg's support set has slices of {}, not {}; use that crop".format(*sizes))
        classes = torch.arange(self.classes, device=x.device).view(-1, 1, 1)
        support = torch.cat([self.support_images.to(x.dtype), (self.support_labels == classes).to(x.dtype)], dim=1)
        # Not len(x), which is a constant in an exported network.
        return support.expand(x.shape[0], -1, -1, -1, -1)

    def forward(self, x: Tensor) -> NetworkOutput:
        check_size("universeg", x, self.stride)
        target, support = x, self.support(x)
        skips = []
        for block in self.encoder:
            if skips:
                target, support = self.pool(target), each(self.pool, support)
            target, support = block(target, support)
            skips.append((target, support))
        for block, (skip, support_skip) in zip(self.decoder, skips[-2::-1], strict=True):
            target = torch.cat([self.up(target), skip], dim=1)
            support = torch.cat([each(self.up, support), support_skip], dim=2)
            target, support = block(target, support)
        return NetworkOutput(self.head(target), skips[0][0], skips[2][0])


def each(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`function` of every map of x (N, S, C, H, W)."""
    return function(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def conv(channels: int, out_channels: int, kernel: int, nonlinearity: str = "linear") -> nn.Conv2d:
    """A convolution with He initialisation and biases of zero."""
    convolution = nn.Conv2d(channels, out_channels, kernel, padding=kernel // 2)
    nn.init.kaiming_normal_(convolution.weight, nonlinearity=nonlinearity)
    nn.init.zeros_(convolution.bias)
    return convolution


class CrossBlock(nn.Module):
    """Convolves the slice's map with each map of the support; their mean is the slice's next map.

    `channels` is the sum of both maps' channels. The last block has no next support.
    """

    def __init__(self, channels: int, filters: int, last: bool = False):
        super().__init__()
        self.cross = conv(channels, filters, 3)
        self.target = conv(filters, filters, 3, "leaky_relu")
        self.support = None if last else conv(filters, filters, 3, "leaky_relu")

    def forward(self, target: Tensor, support: Tensor) -> tuple[Tensor, Tensor | None]:
        """target (N, C, H, W), support (N, S, C', H, W)."""
        pairs = torch.cat([target.unsqueeze(1).expand(-1, support.shape[1], -1, -1, -1), support], dim=2)
        pairs = each(self.cross, pairs)
        target = F.leaky_relu(self.target(pairs.mean(dim=1)))
        return target, self.support and F.leaky_relu(each(self.support, pairs))
