"""What every network returns and declares."""

from typing import NamedTuple

from torch import Tensor


class NetworkOutput(NamedTuple):
    """What a network computes for a batch of slices."""

    logits: Tensor
    """Raw class scores, (N, classes, H, W), at the size of the input."""
    low: Tensor
    """An early feature map, (N, taps.low.channels, H / taps.low.stride, W / taps.low.stride)."""
    high: Tensor
    """A deep feature map, (N, taps.high.channels, H / taps.high.stride, W / taps.high.stride)."""


class Tap(NamedTuple):
    """Where a feature map is taken from, as a distiller must know it."""

    channels: int
    stride: int
    """Input pixels for each pixel of the map."""


class Taps(NamedTuple):
    """The two feature maps of a network that distillation uses."""

    low: Tap
    high: Tap


def scaled(channels: int, width: float) -> int:
    """`channels` times `width`, at least one."""
    return max(1, round(channels * width))
