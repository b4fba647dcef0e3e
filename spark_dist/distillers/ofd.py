"""Overhaul of feature distillation."""

import torch
from torch import Tensor

from spark_dist import losses
from spark_dist.networks.base import NetworkOutput, Taps

from .base import Distiller
from .features import convolution, resize_to, size_of


class OFD(Distiller):
    """Heo et al., A Comprehensive Overhaul of Feature Distillation, ICCV 2019, arXiv 1904.01866.

    segmentation · (½ focal + ½ soft Dice) + features · mean over low, high of the partial L2 between the student's
    features, through a 1×1 convolution and batch norm and resized, and the teacher's after a margin ReLU (`margin`).
    A place where the teacher does not respond and the student responds still less costs nothing.
    Caches both feature maps, whole, as the margins need the negative responses. The margins are each channel's mean
    negative response in the batch (of all processes); all else is defined per sample, but for the batch norm.
    """

    def __init__(self, student: Taps, teacher: Taps, segmentation: float = 1.0, features: float = 1.0):
        super().__init__()
        self.segmentation, self.features = segmentation, features
        self.low = convolution(student.low.channels, teacher.low.channels, 1)
        self.high = convolution(student.high.channels, teacher.high.channels, 1)

    def teacher_targets(self, teacher: NetworkOutput, mask: Tensor) -> dict[str, Tensor]:
        return {"low": teacher.low, "high": teacher.high}

    def forward(
        self,
        student: NetworkOutput,
        targets: dict[str, Tensor],
        mask: Tensor,
        index: Tensor,
        known: Tensor | None = None,
    ) -> dict[str, Tensor]:
        low = partial_l2(self.low(student.low).float(), targets["low"].float())
        high = partial_l2(self.high(student.high).float(), targets["high"].float())
        return {
            "segmentation": self.segmentation * losses.segmentation(student.logits, mask, known),
            "features": self.features * (low + high) / 2,
        }


def partial_l2(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of a student's features (N, C, H, W) from the teacher's (N, C, H', W') after the margin
    ReLU, leaving out where student ≤ teacher ≤ 0."""
    target = torch.maximum(teacher, margin(teacher))
    student = resize_to(student, size_of(target))
    counted = (student > target) | (target > 0)
    return ((student - target).pow(2) * counted).mean()


def margin(teacher: Tensor) -> Tensor:
    """Each channel's mean negative response (1, C, 1, 1) over the batch of all processes; zero if there is none."""
    negative = teacher.clamp(max=0)
    sums = torch.stack([negative.sum(dim=(0, 2, 3)), (teacher < 0).float().sum(dim=(0, 2, 3))])
    total, count = losses.sum_over_processes(sums)
    return (total / (count + 1e-6)).view(1, -1, 1, 1)
