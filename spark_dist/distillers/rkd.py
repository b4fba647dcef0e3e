"""Relational knowledge distillation."""

import torch
import torch.nn.functional as F
from torch import Tensor

from spark_dist import losses
from spark_dist.networks.base import NetworkOutput, Taps

from .base import Distiller


class RKD(Distiller):
    """Park et al., Relational Knowledge Distillation, CVPR 2019, arXiv 1904.05068.

    cross_entropy · CE + distance · (smooth L1 of the samples' mutual distances, divided by their mean) + angle ·
    (smooth L1 of the cosines of the angles that each three samples make), of the flattened high features.
    Caches the high features, whole: which samples meet in a batch is not known before.
    Defined over the batch: with several processes, over each process's own part of it. Two slices have one
    distance, which is its own mean, and no angle: there is nothing to learn from less than three.
    """

    fewest_slices = 3
    supervised = ("cross_entropy",)

    def __init__(
        self,
        student: Taps,
        teacher: Taps,
        cross_entropy: float = 1.0,
        distance: float = 25.0,
        angle: float = 50.0,
    ):
        super().__init__()
        self.cross_entropy, self.distance, self.angle = cross_entropy, distance, angle

    def teacher_targets(self, teacher: NetworkOutput, mask: Tensor) -> dict[str, Tensor]:
        return {"high": teacher.high}

    def forward(
        self,
        student: NetworkOutput,
        targets: dict[str, Tensor],
        mask: Tensor,
        index: Tensor,
        known: Tensor | None = None,
    ) -> dict[str, Tensor]:
        distances, angles = relations(student.high)
        teacher_distances, teacher_angles = relations(targets["high"])
        return {
            "cross_entropy": self.cross_entropy * losses.cross_entropy(student.logits, mask, known),
            "distance": self.distance * F.smooth_l1_loss(distances, teacher_distances),
            "angle": self.angle * F.smooth_l1_loss(angles, teacher_angles),
        }


def relations(x: Tensor) -> tuple[Tensor, Tensor]:
    """Distances (N, N) between the samples of x (N, C, H, W), divided by their mean, and cosines (N, N, N): [i, j, k]
    is that of the angle at sample i between j and k.

    All follow from the inner products of the samples, so that no tensor of N² feature maps is made.
    """
    n = len(x)
    flat = x.float().flatten(1)
    # Neither relation depends on the origin; from the mean, less is lost in the differences below.
    flat = flat - flat.detach().mean(dim=0)
    with torch.autocast(x.device.type, enabled=False):
        products = flat @ flat.T
    squares = products.diagonal()
    others = ~torch.eye(n, dtype=torch.bool, device=x.device)
    squared = squares[:, None] + squares[None, :] - 2 * products
    # Below this a distance is rounding; the cosines at equal samples stay near zero.
    smallest = (1e-6 * squares.detach().mean()).clamp(min=1e-12)
    lengths = squared.clamp(min=smallest).sqrt()
    distances = lengths * others
    # ⟨x_j − x_i, x_k − x_i⟩
    between = products[None, :, :] - products[:, :, None] - products[:, None, :] + squares[:, None, None]
    cosines = between / (lengths[:, :, None] * lengths[:, None, :])
    mean = distances.sum() / max(n * (n - 1), 1)
    return distances / mean.clamp(min=1e-6), cosines * (others[:, :, None] & others[:, None, :])
