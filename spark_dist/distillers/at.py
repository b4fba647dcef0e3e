"""Attention transfer."""

import torch.nn.functional as F
from torch import Tensor

from spark_dist import losses
from spark_dist.networks.base import NetworkOutput, Taps

from .base import Distiller
from .features import attention_map, pool_to, pooled_maps, size_of


class AT(Distiller):
    """Zagoruyko and Komodakis, Paying More Attention to Attention, ICLR 2017, arXiv 1612.03928.

    segmentation · (½ focal + ½ soft Dice) + attention · Σ over low, high of the mean squared difference of the
    attention maps (`attention_map`), the larger features being average-pooled to the smaller size first.
    Caches the two attention maps. Defined per sample.
    """

    def __init__(
        self, student: Taps, teacher: Taps, segmentation: float = 1.0, attention: float = 1000.0, power: int = 2
    ):
        super().__init__()
        self.segmentation, self.attention, self.power = segmentation, attention, power
        self.student = student

    def teacher_targets(self, teacher: NetworkOutput, mask: Tensor) -> dict[str, Tensor]:
        maps = pooled_maps(teacher, self.student, mask)
        return {name: attention_map(x, self.power) for name, x in maps.items()}

    def forward(
        self,
        student: NetworkOutput,
        targets: dict[str, Tensor],
        mask: Tensor,
        index: Tensor,
        known: Tensor | None = None,
    ) -> dict[str, Tensor]:
        attention = self.difference(student.low, targets["low"]) + self.difference(student.high, targets["high"])
        return {
            "segmentation": self.segmentation * losses.segmentation(student.logits, mask, known),
            "attention": self.attention * attention,
        }

    def difference(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Between a student's features (N, C, H, W) and a teacher's attention map (N, H', W')."""
        return F.mse_loss(attention_map(pool_to(student.float(), size_of(teacher)), self.power), teacher)
