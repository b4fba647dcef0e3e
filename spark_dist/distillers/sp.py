"""Similarity-preserving distillation."""

import torch
import torch.nn.functional as F
from torch import Tensor

from spark_dist import losses
from spark_dist.networks.base import NetworkOutput, Taps

from .base import Distiller


class SP(Distiller):
    """Tung and Mori, Similarity-Preserving Knowledge Distillation, ICCV 2019, arXiv 1907.09682.

    segmentation · (½ focal + ½ soft Dice) + similarity · Σ over low, high of the mean squared difference of the
    samples' similarities: the N×N inner products of their flattened features, each row L2-normalised.
    Caches both feature maps, whole: which samples meet in a batch is not known before.
    Defined over the batch: with several processes, over each process's own part of it. A slice alone is like
    itself, whatever its features.
    """

    fewest_slices = 2

    def __init__(self, student: Taps, teacher: Taps, segmentation: float = 1.0, similarity: float = 3000.0):
        super().__init__()
        self.segmentation, self.similarity = segmentation, similarity

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
        similarity = sum(
            F.mse_loss(similarities(x), similarities(y))
            for x, y in ((student.low, targets["low"]), (student.high, targets["high"]))
        )
        return {
            "segmentation": self.segmentation * losses.segmentation(student.logits, mask, known),
            "similarity": self.similarity * similarity,
        }


def similarities(x: Tensor) -> Tensor:
    """Row-normalised inner products (N, N) of the samples of x (N, C, H, W), in float32."""
    flat = x.float().flatten(1)
    with torch.autocast(x.device.type, enabled=False):
        return F.normalize(flat @ flat.T, dim=1)
