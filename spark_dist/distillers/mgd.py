"""Masked generative distillation."""

import torch
from torch import Tensor, nn

from spark_dist import losses
from spark_dist.networks.base import NetworkOutput, Taps

from .base import Distiller
from .features import pool_to, pooled_maps, size_of


class MGD(Distiller):
    """Yang et al., Masked Generative Distillation, ECCV 2022, arXiv 2205.01529.

    segmentation · (½ focal + ½ soft Dice) + generation · the sum of squares, averaged over samples, between the
    teacher's high features and those that two 3×3 convolutions generate from the student's, aligned to the teacher's
    channels, with each pixel blanked at a chance of `masked`. The larger map is average-pooled to the smaller size.
    Caches the high features, pooled to that size. Defined per sample. Which pixels are blanked is drawn from torch's
    global generator, in each process for itself.
    """

    def __init__(
        self,
        student: Taps,
        teacher: Taps,
        segmentation: float = 1.0,
        generation: float = 2e-5,
        masked: float = 0.75,
    ):
        super().__init__()
        self.segmentation, self.generation, self.masked = segmentation, generation, masked
        self.student = student
        channels, wanted = student.high.channels, teacher.high.channels
        self.align = nn.Identity() if channels == wanted else nn.Conv2d(channels, wanted, 1)
        self.generate = nn.Sequential(
            nn.Conv2d(wanted, wanted, 3, padding=1), nn.ReLU(), nn.Conv2d(wanted, wanted, 3, padding=1)
        )

    def teacher_targets(self, teacher: NetworkOutput, mask: Tensor) -> dict[str, Tensor]:
        return {"high": pooled_maps(teacher, self.student, mask)["high"]}

    def forward(
        self,
        student: NetworkOutput,
        targets: dict[str, Tensor],
        mask: Tensor,
        index: Tensor,
        known: Tensor | None = None,
    ) -> dict[str, Tensor]:
        target = targets["high"].float()
        aligned = self.align(pool_to(student.high, size_of(target)))
        seen = torch.rand(len(target), 1, *size_of(target), device=target.device) >= self.masked
        generated = self.generate(aligned * seen).float()
        return {
            "segmentation": self.segmentation * losses.segmentation(student.logits, mask, known),
            "generation": self.generation * (generated - target).pow(2).sum() / len(target),
        }
