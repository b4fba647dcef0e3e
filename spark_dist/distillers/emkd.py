"""Efficient medical-image knowledge distillation."""

import torch
import torch.nn.functional as F
from torch import Tensor

from spark_dist import losses
from spark_dist.networks.base import NetworkOutput, Taps

from .base import Distiller
from .features import Size, attention_map, map_size, pool_to, size_of, smaller


class EMKD(Distiller):
    """Qin et al., Efficient Medical Image Segmentation Based on Knowledge Distillation, IEEE TMI 2021, arXiv
    2108.09987.

    segmentation · (½ focal + ½ soft Dice) + kl · T² KL(teacher ‖ student) + importance · IMD + region · RAD, the last
    two summed over low and high. IMD is the squared distance of the importance maps, which are attention maps of 4th
    powers; the student's features are bilinearly resized to the teacher's. RAD is the squared difference of
    `region_contrasts`.
    Caches the logits' differences, the two importance maps and the contrasts. Defined per sample.

    Several classes: the KL is over all classes; RAD is the mean over all pairs of classes, of which a background and a
    target have one. A pair that a slice has not costs nothing.
    """

    def __init__(
        self,
        student: Taps,
        teacher: Taps,
        segmentation: float = 1.0,
        kl: float = 0.1,
        temperature: float = 4.0,
        importance: float = 0.9,
        region: float = 0.9,
    ):
        super().__init__()
        self.segmentation, self.kl, self.temperature = segmentation, kl, temperature
        self.importance, self.region = importance, region
        self.student = student

    def teacher_targets(self, teacher: NetworkOutput, mask: Tensor) -> dict[str, Tensor]:
        return {
            "margin": losses.margin(teacher.logits),
            "low": attention_map(teacher.low, power=4),
            "high": attention_map(teacher.high, power=4),
            "contrasts": self.contrasts(teacher, mask),
        }

    def forward(
        self,
        student: NetworkOutput,
        targets: dict[str, Tensor],
        mask: Tensor,
        index: Tensor,
        known: Tensor | None = None,
    ) -> dict[str, Tensor]:
        importance = importance_distance(student.low, targets["low"]) + importance_distance(
            student.high, targets["high"]
        )
        # The columns are low and high, of each pair of classes.
        pairs = targets["contrasts"].shape[1] // 2
        region = (self.contrasts(student, mask) - targets["contrasts"]).pow(2).mean(dim=0).sum() / pairs
        return {
            "segmentation": self.segmentation * losses.segmentation(student.logits, mask, known),
            "kl": self.kl * losses.kl(student.logits, losses.logits_of(targets["margin"]), self.temperature),
            "importance": self.importance * importance,
            "region": self.region * region,
        }

    def contrasts(self, output: NetworkOutput, mask: Tensor) -> Tensor:
        """The region contrasts of low and then of high, (N, 2 · pairs of classes)."""
        low = region_contrasts(output.low.float(), mask, map_size(self.student.low, mask))
        high = region_contrasts(output.high.float(), mask, map_size(self.student.high, mask))
        return torch.cat([low, high], dim=1)


def importance_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """The squared distance, averaged over samples, of a student's importance map from the teacher's (N, H, W)."""
    resized = F.interpolate(student.float(), size_of(teacher), mode="bilinear")
    return (attention_map(resized, power=4) - teacher).pow(2).sum(dim=(1, 2)).mean()


def region_contrasts(x: Tensor, mask: Tensor, student: Size) -> Tensor:
    """Cosine similarity of the mean features of each two classes, (N, C (C − 1) / 2).

    The mask is taken at the `student` map's size (nearest neighbour); features and mask are then average-pooled to
    the smaller of their sizes.
    """
    size = smaller(size_of(x), student)
    region = pool_to(F.interpolate(mask.float(), student), size)
    with torch.autocast(x.device.type, enabled=False):
        sums = torch.einsum("nchw,nrhw->nrc", pool_to(x, size), region)
    # A class may be absent; the background is not, but for a crop that others fill.
    classes = mask.shape[1]
    area = region.sum(dim=(2, 3)) + torch.tensor([1e-6] + [1.0] * (classes - 1), device=x.device)
    means = sums / area.unsqueeze(2)
    first, second = torch.triu_indices(classes, classes, offset=1, device=x.device)
    return F.cosine_similarity(means[:, first], means[:, second], dim=2)
