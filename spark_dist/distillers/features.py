"""What several methods do with feature maps (N, C, H, W)."""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from spark_dist.networks.base import NetworkOutput, Tap, Taps

Size = tuple[int, int]


def convolution(channels: int, out_channels: int, size: int) -> nn.Module:
    """A convolution and batch norm that keep the map's size.

    The norm takes its statistics from each process's own part of the batch.
    """
    # The norm's shift stands in for the convolution's bias, whose gradient would be zero.
    layer = nn.Conv2d(channels, out_channels, size, padding=size // 2, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(out_channels))


def connector(channels: int, out_channels: int) -> nn.Module:
    """A trained map of a student's features to the teacher's channels; nothing where they are equal already."""
    return nn.Identity() if channels == out_channels else convolution(channels, out_channels, 1)


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
    return x if size_of(x) == size else F.adaptive_avg_pool2d(x, size)


def resize_to(x: Tensor, size: Size) -> Tensor:
    """Average-pooled to (H, W) where it is larger, bilinearly interpolated where it is smaller."""
    if size_of(x) == size:
        return x
    if smaller(size_of(x), size) == size:
        return pool_to(x, size)
    return F.interpolate(x, size, mode="bilinear")


def pooled_maps(teacher: NetworkOutput, student: Taps, mask: Tensor) -> dict[str, Tensor]:
    """A teacher's feature maps `low` and `high`, average-pooled to the student's size where that is smaller."""
    return {
        "low": pool_to(teacher.low, smaller(size_of(teacher.low), map_size(student.low, mask))),
        "high": pool_to(teacher.high, smaller(size_of(teacher.high), map_size(student.high, mask))),
    }


def attention_map(x: Tensor, power: int = 2) -> Tensor:
    """Spatial attention, the mean over channels of x^power, L2-normalised over the pixels of each sample: (N, H, W).

    Zagoruyko and Komodakis, Paying More Attention to Attention, ICLR 2017, arXiv 1612.03928.
    """
    energy = x.float().pow(power).mean(dim=1)
    return F.normalize(energy.flatten(1), dim=1).view_as(energy)


def attention_enhanced(x: Tensor, gain: float, stride: int, reference_crop: int) -> Tensor:
    """Features weighted by their own attention, x · gain · attention_map(x), in float32, where `gain` holds at a
    square crop of `reference_crop` pixels a side.

    An attention map is L2-normalised over H·W pixels, so that its values are of the order of 1/√(H·W). At other crops
    the gain is multiplied by √(H·W) · stride / reference_crop, which gives the features the same magnitude at all.
    """
    height, width = size_of(x)
    gain = gain * math.sqrt(height * width) * stride / reference_crop
    return x.float() * (gain * attention_map(x)).unsqueeze(1)


def hierarchical_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error at full size and of the maps pooled to 4×4, 2×2 and 1×1, with weights 1, ½, ¼, ⅛ divided by
    their sum. A pooling that is not smaller than the map is skipped, and the next takes its weight.

    The hierarchical context loss of Chen et al., Distilling Knowledge via Knowledge Review, CVPR 2021, arXiv
    2104.09044. Both maps are (N, C, H, W) or (N, H, W) of one size.
    """
    loss, weight, total = F.mse_loss(student, teacher), 1.0, 1.0
    for side in (4, 2, 1):
        if side < min(size_of(student)):
            weight /= 2
            loss = loss + weight * F.mse_loss(pool_to(student, (side, side)), pool_to(teacher, (side, side)))
            total += weight
    return loss / total
