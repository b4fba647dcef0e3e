"""Several networks, or several views of a slice, as one network: the mean of their probabilities."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from data_tools.errors import UserError

from .base import NetworkOutput

FLIPS = ((), (-2,), (-1,), (-2, -1))
"""Test-time augmentation by flips: the axes of a slice that are reversed in each of its views."""


class Ensemble(nn.Module):
    """Networks whose probabilities are averaged, with `flips` each over the four flips of a slice too.

    It is a network as any other. The softmax of its logits is the mean of all members' softmax; its feature maps are
    the first network's, of the slice as it is.
    """

    def __init__(self, networks: Sequence[nn.Module], flips: bool = False):
        """Raises `UserError` for networks that are bound to slices of different sizes."""
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.views = FLIPS if flips else FLIPS[:1]
        self.taps = networks[0].taps
        self.stride = math.lcm(*(network.stride for network in networks))
        sizes = {size for network in networks if (size := getattr(network, "bound_to", None))}
        if len(sizes) > 1:
            raise UserError(f"networks that are bound to slices of {sorted(sizes)} can't be averaged; leave one out")
        self.bound_to = next(iter(sizes), None)

    def forward(self, x: Tensor) -> NetworkOutput:
        outputs = [network(x.flip(axes) if axes else x) for axes in self.views for network in self.networks]
        upright = (
            output.logits.flip(axes) if axes else output.logits
            for output, axes in zip(outputs, (axes for axes in self.views for _ in self.networks), strict=True)
        )
        return NetworkOutput(mean_logits(upright), outputs[0].low, outputs[0].high)


def averaged(networks: Sequence[nn.Module], flips: bool = False) -> nn.Module:
    """The only network as it is, or an `Ensemble` where there is something to average."""
    return Ensemble(networks, flips) if flips or len(networks) > 1 else networks[0]


def mean_logits(logits: Iterable[Tensor]) -> Tensor:
    """Logits (N, C, H, W) whose softmax is the mean of the softmax of several; those of one are left as they are."""
    logits = list(logits)
    if len(logits) == 1:
        return logits[0]
    return torch.stack([x.float().log_softmax(dim=1) for x in logits]).logsumexp(dim=0) - math.log(len(logits))
