"""The interface of all networks: their output and where their features are taken."""

from typing import NamedTuple

from torch import Tensor

from data_tools.errors import UserError


class NetworkOutput(NamedTuple):
    """A network's output for a batch of slices."""

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


def rgb_channels(in_channels: int) -> int:
    """Input channels of a stem that was made for colour images: three for a one-channel slice."""
    return 3 if in_channels == 1 else in_channels


def rgb(x: Tensor) -> Tensor:
    """A slice (N, 1, H, W) repeated to (N, 3, H, W), without a copy; other inputs as they are."""
    return x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x


def check_size(name: str, x: Tensor, stride: int) -> None:
    """Raises `UserError` if the sides of `x` (N, C, H, W) are not multiples of the `stride` of the network `name`."""
    height, width = x.shape[-2:]
    if height % stride or width % stride:
        raise UserError(f"{name} needs slices whose sides are multiples of {stride}, not {height}×{width}")


def check_batch(name: str, x: Tensor, training: bool) -> None:
    """Raises `UserError` for a training batch of one slice: batch norm on a globally pooled map needs two."""
    if training and len(x) == 1:
        raise UserError(f"{name} cannot train on one slice at a time; give each process a batch of two or more")
