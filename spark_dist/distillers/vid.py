"""Variational information distillation."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spark_dist import losses
from spark_dist.networks.base import NetworkOutput, Tap, Taps

from .base import Distiller
from .features import pool_to, pooled_maps, size_of


class VID(Distiller):
    """Ahn et al., Variational Information Distillation for Knowledge Transfer, CVPR 2019, arXiv 1904.05835.

    cross_entropy · CE + information · Σ over low, high of the mean negative log-likelihood of the teacher's features
    (but for a constant) under a Gaussian whose mean is a regression on the student's and whose variance is learned,
    one for each channel. The larger features are average-pooled to the smaller size.
    Caches both feature maps, pooled to that size. Defined per sample.
    """

    supervised = ("cross_entropy",)

    def __init__(
        self,
        student: Taps,
        teacher: Taps,
        cross_entropy: float = 1.0,
        information: float = 1.0,
        initial_variance: float = 5.0,
    ):
        super().__init__()
        self.cross_entropy, self.information = cross_entropy, information
        self.student = student
        self.low = Gaussian(student.low, teacher.low, initial_variance)
        self.high = Gaussian(student.high, teacher.high, initial_variance)

    def teacher_targets(self, teacher: NetworkOutput, mask: Tensor) -> dict[str, Tensor]:
        return pooled_maps(teacher, self.student, mask)

    def forward(
        self,
        student: NetworkOutput,
        targets: dict[str, Tensor],
        mask: Tensor,
        index: Tensor,
        known: Tensor | None = None,
    ) -> dict[str, Tensor]:
        information = self.low(student.low, targets["low"]) + self.high(student.high, targets["high"])
        return {
            "cross_entropy": self.cross_entropy * losses.cross_entropy(student.logits, mask, known),
            "information": self.information * information,
        }


class Gaussian(nn.Module):
    """A teacher's features (N, C', H', W') as a student's (N, C, H, W) predict them: mean and variance."""

    def __init__(self, student: Tap, teacher: Tap, initial_variance: float):
        super().__init__()
        self.mean = nn.Sequential(
            nn.Conv2d(student.channels, teacher.channels, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(teacher.channels, teacher.channels, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(teacher.channels, teacher.channels, 1, bias=False),
        )
        # softplus of it, plus 1e-5, is the variance
        self.scale = nn.Parameter(torch.full((teacher.channels,), math.log(math.expm1(initial_variance - 1e-5))))

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Half the mean of (teacher − mean)² / variance + log variance."""
        mean = self.mean(pool_to(student, size_of(teacher))).float()
        variance = (F.softplus(self.scale.float()) + 1e-5).view(1, -1, 1, 1)
        return 0.5 * ((teacher - mean).pow(2) / variance + variance.log()).mean()
