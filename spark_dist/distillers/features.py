"""Operations on feature maps (N, C, H, W) that several methods share."""

import math

import torch
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


def full(x: Tensor) -> Tensor:
    """In float32, or in float64 where it is that already."""
    return x if x.dtype == torch.float64 else x.float()


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
    x = full(x)
    # A square's square costs a fraction of a general power.
    energy = (x.square().square() if power == 4 else x.pow(power)).mean(dim=1)
    return F.normalize(energy.flatten(1), dim=1).view_as(energy)


def attention_enhanced(x: Tensor, gain: float, stride: int, reference_crop: int) -> Tensor:
    """Features weighted by their own attention, x · gain · attention_map(x), in float32, where `gain` holds at a
    square crop of `reference_crop` pixels a side.

    An attention map is L2-normalised over H·W pixels, so that its values are of the order of 1/√(H·W). At other crops
    the gain is multiplied by √(H·W) · stride / reference_crop, which gives the features the same magnitude at all.
    """
    height, width = size_of(x)
    gain = gain * math.sqrt(height * width) * stride / reference_crop
    x = full(x)
    return x * (gain * attention_map(x)).unsqueeze(1)


def hierarchical_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error at full size and of the maps pooled to 4×4, 2×2 and 1×1, with weights 1, ½, ¼, ⅛ divided by
    their sum. A pooling that is not smaller than the map is skipped, and the next takes its weight.

    The hierarchical context loss of Chen et al., Distilling Knowledge via Knowledge Review, CVPR 2021, arXiv
    2104.09044. Both maps are (N, C, H, W) or (N, H, W) of one size.
    """
    levels = [F.mse_loss(x, y) for x, y in zip(pooled_levels(student), pooled_levels(teacher), strict=True)]
    return sum(weight * loss for weight, loss in zip(level_weights(len(levels)), levels, strict=True))


def pooled_levels(x: Tensor, coarse: Tensor | None = None) -> list[Tensor]:
    """A map (…, H, W) and its poolings to 4×4, 2×2 and 1×1, without those that are not smaller than the map.

    A level is built from the one before wherever that is the same. `coarse` is the map's pooling to 4×4, if it is
    there already (see `has_coarse`).
    """
    levels, source = [x], x
    for side in (4, 2, 1):
        if side < min(size_of(x)):
            levels.append(coarse if coarse is not None and side == 4 else pool_to(source, (side, side)))
            # Pooling in two steps equals pooling in one if the first has windows that do not overlap.
            if size_of(x)[0] % side == size_of(x)[1] % side == 0:
                source = levels[-1]
    return levels


def has_coarse(size: Size) -> bool:
    """Whether all further poolings of a map of this size follow from the one to 4×4."""
    return min(size) > 4 and size[0] % 4 == size[1] % 4 == 0


def level_weights(levels: int) -> list[float]:
    """The weights 1, ½, ¼ … of a map and its poolings, divided by their sum."""
    weights = [0.5**k for k in range(levels)]
    return [weight / sum(weights) for weight in weights]
