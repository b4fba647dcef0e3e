"""What several methods do with feature maps (N, C, H, W)."""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from spark_dist.networks.base import Tap

Size = tuple[int, int]


def connector(channels: int, out_channels: int) -> nn.Module:
    """A trained map of a student's features to the teacher's channels: 1×1 convolution and batch norm; nothing where
    the channels are equal already."""
    if channels == out_channels:
        return nn.Identity()
    # The norm's shift stands in for the convolution's bias, whose gradient would be zero.
    return nn.Sequential(nn.Conv2d(channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels))


def size_of(x: Tensor) -> Size:
    """(H, W)."""
    return x.shape[-2], x.shape[-1]


def map_size(tap: Tap, mask: Tensor) -> Size:
    """(H, W) of a network's feature map for a crop of the mask's size."""
    return mask.shape[-2] // tap.stride, mask.shape[-1] // tap.stride


def smaller(a: Size, b: Size) -> Size:
    """Side by side, the smaller of two sizes."""
    return min(a[0], b[0]), min(a[1], b[1])


def pool_to(x: Tensor, size: Size) -> Tensor:
    """Average-pooled to (H, W)."""
    return x if size_of(x) == tuple(size) else F.adaptive_avg_pool2d(x, size)


def resize(x: Tensor, size: Size) -> Tensor:
    """Bilinearly resized to (H, W)."""
    return x if size_of(x) == tuple(size) else F.interpolate(x, size, mode="bilinear")


def attention_map(x: Tensor, power: int = 2) -> Tensor:
    """Spatial attention, the mean over channels of x^power, L2-normalised over the pixels of each sample: (N, H, W).

    Zagoruyko and Komodakis, Paying More Attention to Attention, ICLR 2017.
    """
    energy = x.float().pow(power).mean(dim=1)
    return F.normalize(energy.flatten(1), dim=1).view_as(energy)


def attention_enhanced(x: Tensor, gain: float) -> Tensor:
    """Features weighted by their own attention, x · gain · attention_map(x), in float32."""
    return x.float() * (gain * attention_map(x)).unsqueeze(1)


def crop_free_gain(gain: float, x: Tensor, stride: int, reference_crop: int) -> float:
    """The gain that gives attention-enhanced features the same magnitude whatever the crop: `gain` at a square
    `reference_crop`, and proportional to √(H·W).

    An attention map is L2-normalised over H·W pixels, so that its values are of the order of 1/√(H·W).
    """
    height, width = size_of(x)
    return gain * math.sqrt(height * width) * stride / reference_crop


def hierarchical_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error at full size and of the maps pooled to 4×4, 2×2 and 1×1, with weights 1, ½, ¼, ⅛ divided by
    their sum. A pooling that is not smaller than the map is skipped, and the next takes its weight.

    The hierarchical context loss of Chen et al., Distilling Knowledge via Knowledge Review, CVPR 2021.
    """
    loss, weight, total = F.mse_loss(student, teacher), 1.0, 1.0
    for side in (4, 2, 1):
        if side < min(size_of(student)):
            weight /= 2
            loss = loss + weight * F.mse_loss(pool_to(student, (side, side)), pool_to(teacher, (side, side)))
            total += weight
    return loss / total
