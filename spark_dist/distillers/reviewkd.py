"""Knowledge review."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spark_dist import losses
from spark_dist.networks.base import NetworkOutput, Taps

from .base import Distiller
from .features import convolution, hierarchical_mse, pool_to, pooled_maps, size_of


class ReviewKD(Distiller):
    """Chen et al., Distilling Knowledge via Knowledge Review, CVPR 2021, arXiv 2104.09044.

    segmentation · (½ focal + ½ soft Dice) + review · Σ over low, high of `hierarchical_mse` between the student's
    fused features (`ReviewFusion`) and the teacher's, the larger being average-pooled to the smaller size.
    Caches both feature maps, pooled to that size. Defined per sample, but for the fusion's batch norm.
    """

    def __init__(
        self, student: Taps, teacher: Taps, segmentation: float = 1.0, review: float = 1.0, channels: int = 256
    ):
        super().__init__()
        self.segmentation, self.review = segmentation, review
        self.student = student
        self.fusion = ReviewFusion(student, teacher, channels)

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
        low, high = self.fusion(student.low, student.high)
        review = sum(
            hierarchical_mse(pool_to(x.float(), size_of(y)), y.float())
            for x, y in ((low, targets["low"]), (high, targets["high"]))
        )
        return {
            "segmentation": self.segmentation * losses.segmentation(student.logits, mask, known),
            "review": self.review * review,
        }


class ReviewFusion(nn.Module):
    """The attention-based fusion (ABF) of a student's two levels: the teacher's low level is compared with both of
    them, its high level with the high one.

    Both levels are brought to `channels`; the high one, upsampled, is added to the low one with weights for each pixel
    which a 1×1 convolution and a sigmoid make of both; 3×3 convolutions lead to the teacher's channels.
    """

    def __init__(self, student: Taps, teacher: Taps, channels: int):
        super().__init__()
        self.low_in = convolution(student.low.channels, channels, 1)
        self.high_in = convolution(student.high.channels, channels, 1)
        self.weights = nn.Conv2d(2 * channels, 2, 1)
        self.low_out = convolution(channels, teacher.low.channels, 3)
        self.high_out = convolution(channels, teacher.high.channels, 3)

    def forward(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        low, high = self.low_in(low), self.high_in(high)
        upsampled = F.interpolate(high, size_of(low))
        weights = self.weights(torch.cat([low, upsampled], dim=1)).sigmoid()
        fused = low * weights[:, :1] + upsampled * weights[:, 1:]
        return self.low_out(fused), self.high_out(high)
