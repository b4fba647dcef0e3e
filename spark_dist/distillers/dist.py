"""DIST: distillation from a stronger teacher."""

import torch
from torch import Tensor

from spark_dist import losses
from spark_dist.networks.base import NetworkOutput, Taps

from .base import PredictionDistiller


class DIST(PredictionDistiller):
    """Huang et al., Knowledge Distillation from a Stronger Teacher, NeurIPS 2022, arXiv 2205.10536.

    Here because a light student cannot match the probabilities of a much larger teacher, and need not: it is asked
    for their linear relation over pixels only.

    segmentation · (½ focal + ½ soft Dice) + intra · T² (1 − r) + inter · T² (1 − s), r and s being Pearson's
    correlations of the student's and the teacher's probabilities at temperature T: r (intra-class) over all pixels of
    the batch, s (inter-class) over the classes of one pixel.
    Caches the logits' differences. Defined over the whole batch (of all processes).

    Several classes: the intra-class correlation is the mean over all classes, the inter-class one the mean over pixels,
    as in the paper. With two classes the first is the same for both, and the second is ±1 whatever they are, so that it
    teaches nothing and is left out.
    """

    def __init__(
        self,
        student: Taps,
        teacher: Taps,
        segmentation: float = 1.0,
        intra: float = 1.0,
        inter: float = 1.0,
        temperature: float = 1.0,
    ):
        super().__init__()
        self.segmentation, self.intra, self.inter, self.temperature = segmentation, intra, inter, temperature

    def forward(
        self,
        student: NetworkOutput,
        targets: dict[str, Tensor],
        mask: Tensor,
        index: Tensor,
        known: Tensor | None = None,
    ) -> dict[str, Tensor]:
        p = probabilities(losses.margin(student.logits), self.temperature)
        q = probabilities(targets["margin"].float(), self.temperature)
        terms = {
            "segmentation": self.segmentation * losses.segmentation(student.logits, mask, known),
            "intra": self.intra * self.temperature**2 * (1 - correlation_over_pixels(p, q).mean()),
        }
        if mask.shape[1] > 2:
            terms["inter"] = self.inter * self.temperature**2 * (1 - correlation_over_classes(p, q).mean())
        return terms


def probabilities(margin: Tensor, temperature: float) -> Tensor:
    """Of every class (N, C, H, W), or with two classes that of the target alone (N, 1, H, W), for a logits' `margin`
    (N, C − 1, H, W)."""
    if margin.shape[1] == 1:
        return (margin / temperature).sigmoid()
    return (losses.logits_of(margin) / temperature).softmax(dim=1)


def correlation_over_pixels(x: Tensor, y: Tensor) -> Tensor:
    """Pearson's correlation (C,) over samples and pixels, of all processes; near zero where either hardly varies."""
    pixels = (0, 2, 3)
    sums = torch.stack([x.sum(dim=pixels), y.sum(dim=pixels), torch.ones_like(x).sum(dim=pixels)])
    sum_x, sum_y, count = losses.sum_over_processes(sums)
    x, y = x - (sum_x / count).view(-1, 1, 1), y - (sum_y / count).view(-1, 1, 1)
    sums = torch.stack([(x * y).sum(dim=pixels), (x * x).sum(dim=pixels), (y * y).sum(dim=pixels)])
    return of_moments(*losses.sum_over_processes(sums) / count)


def correlation_over_classes(x: Tensor, y: Tensor) -> Tensor:
    """Pearson's correlation (N, H, W) over the classes of each pixel; near zero where either hardly varies."""
    x, y = x - x.mean(dim=1, keepdim=True), y - y.mean(dim=1, keepdim=True)
    return of_moments((x * y).mean(dim=1), (x * x).mean(dim=1), (y * y).mean(dim=1))


def of_moments(xy: Tensor, xx: Tensor, yy: Tensor) -> Tensor:
    """The correlation that follows from a covariance and two variances."""
    return xy / (xx * yy + 1e-12).sqrt()
