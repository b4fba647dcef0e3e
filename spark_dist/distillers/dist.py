"""DIST: distillation from a stronger teacher."""

import torch
from torch import Tensor

from spark_dist import losses
from spark_dist.networks.base import NetworkOutput, Taps

from .base import Distiller


class DIST(Distiller):
    """Huang et al., Knowledge Distillation from a Stronger Teacher, NeurIPS 2022, arXiv 2205.10536.

    Here because a light student cannot match the probabilities of a much larger teacher, and need not: it is asked
    for their linear relation over pixels only.

    segmentation · (½ focal + ½ soft Dice) + intra · T² (1 − r), r being Pearson's correlation over all pixels of the
    batch between the student's and the teacher's probability of the target at temperature T. That is the paper's
    intra-class relation; with two classes it is the same for both. Its inter-class relation, the correlation over the
    classes of one pixel, is ±1 for any two classes and teaches nothing, so it is left out.

    Caches the difference of the two logits. Defined over the whole batch (of all processes).
    """

    def __init__(
        self, student: Taps, teacher: Taps, segmentation: float = 1.0, intra: float = 1.0, temperature: float = 1.0
    ):
        super().__init__()
        self.segmentation, self.intra, self.temperature = segmentation, intra, temperature

    def teacher_targets(self, teacher: NetworkOutput, mask: Tensor) -> dict[str, Tensor]:
        return {"margin": losses.margin(teacher.logits)}

    def forward(
        self, student: NetworkOutput, targets: dict[str, Tensor], mask: Tensor, index: Tensor
    ) -> dict[str, Tensor]:
        p = (losses.margin(student.logits) / self.temperature).sigmoid()
        q = (targets["margin"].float() / self.temperature).sigmoid()
        return {
            "segmentation": self.segmentation * losses.segmentation(student.logits, mask),
            "intra": self.intra * self.temperature**2 * (1 - correlation(p, q)),
        }


def correlation(x: Tensor, y: Tensor) -> Tensor:
    """Pearson's correlation over all values of x and y, of all processes; near zero where either hardly varies."""
    count = x.new_tensor(float(x.numel()))
    sum_x, sum_y, count = losses.sum_over_processes(torch.stack([x.sum(), y.sum(), count]))
    x, y = x - sum_x / count, y - sum_y / count
    xy, xx, yy = losses.sum_over_processes(torch.stack([(x * y).sum(), (x * x).sum(), (y * y).sum()])) / count
    return xy / (xx * yy + 1e-12).sqrt()
