"""Attention-enhanced channel means."""

import torch.nn.functional as F
from torch import Tensor

from spark_dist import losses
from spark_dist.networks.base import NetworkOutput, Taps

from .base import Distiller
from .features import hierarchical_mse, resize_to, size_of


class EhcdAtt(Distiller):
    """A forerunner of SPARK in its original implementation: distillation of the channel means of attention-enhanced
    features, which needs no connector.

    segmentation · (½ focal + ½ soft Dice) + features · Σ over low, high of `hierarchical_mse` between the channel
    means of F · A, A being the mean over channels of F². Both A and the channel means are L2-normalised over the rows
    of each column, as in the original. Its gain of 10 is missing here because the normalisation cancels it. The
    student's features are resized to the teacher's.
    Caches the two normalised channel means. Defined per sample.
    """

    def __init__(self, student: Taps, teacher: Taps, segmentation: float = 1.0, features: float = 1.0):
        super().__init__()
        self.segmentation, self.features = segmentation, features

    def teacher_targets(self, teacher: NetworkOutput, mask: Tensor) -> dict[str, Tensor]:
        return {"low": normalised_mean(enhanced(teacher.low)), "high": normalised_mean(enhanced(teacher.high))}

    def forward(
        self,
        student: NetworkOutput,
        targets: dict[str, Tensor],
        mask: Tensor,
        index: Tensor,
        known: Tensor | None = None,
    ) -> dict[str, Tensor]:
        features = sum(
            hierarchical_mse(normalised_mean(resize_to(enhanced(x), size_of(y))), y)
            for x, y in ((student.low, targets["low"]), (student.high, targets["high"]))
        )
        return {
            "segmentation": self.segmentation * losses.segmentation(student.logits, mask, known),
            "features": self.features * features,
        }


def enhanced(x: Tensor) -> Tensor:
    """Features (N, C, H, W) weighted by their attention, which is normalised over the rows of each column."""
    x = x.float()
    return x * F.normalize(x.pow(2).mean(dim=1), dim=1).unsqueeze(1)


def normalised_mean(x: Tensor) -> Tensor:
    """The mean over channels (N, H, W), L2-normalised over the rows of each column."""
    return F.normalize(x.mean(dim=1), dim=1)
