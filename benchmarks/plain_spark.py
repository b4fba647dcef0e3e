"""SPARK's loss as its formulas say it, without any of what makes the method's own class cheap: what it is measured by
and compared with."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spark_dist import losses
from spark_dist.distillers.features import full, pool_to, size_of, smaller
from spark_dist.distillers.spark import SPARK
from spark_dist.networks.base import NetworkOutput


class PlainSPARK(SPARK):
    """The same weights and connectors; every map is formed at its full width and pooled from its full size."""

    def teacher_targets(self, teacher: NetworkOutput, mask: Tensor) -> dict[str, Tensor]:
        """The teacher's output as it is; attention maps and poolings are computed at every step."""
        return teacher._asdict()

    def forward(
        self, student: NetworkOutput, targets: dict[str, Tensor], mask: Tensor, index: Tensor, known: None = None
    ) -> dict[str, Tensor]:
        return self.terms(
            student, {t: self.plain_enhanced(targets[t], self.teacher, t) for t in ("low", "high")}, targets, mask
        )

    def plain_enhanced(self, x: Tensor, taps, name: str) -> Tensor:
        """x · gain · (mean over channels of x², L2-normalised over the pixels of each sample)."""
        x = full(x)
        height, width = size_of(x)
        energy = x.pow(2).mean(dim=1)
        attention = F.normalize(energy.flatten(1), dim=1).view_as(energy)
        gain = self.gain * (height * width) ** 0.5 * getattr(taps, name).stride / self.reference_crop
        return x * (gain * attention).unsqueeze(1)

    def terms(self, student: NetworkOutput, maps: dict[str, Tensor], targets: dict[str, Tensor], mask: Tensor):
        """The loss's terms, with a teacher's enhanced `maps`."""
        ced = torch.zeros((), device=mask.device)
        for (s, t), weight in self.pairs.items():
            x = self.plain_enhanced(getattr(student, s), self.student, s)
            ced = ced + weight * plain_distance(x, maps.get(f"{s}_{t}", maps.get(t)), self.connectors[f"{s}_{t}"])
        return {
            "segmentation": self.segmentation * losses.segmentation(student.logits, mask),
            "ced": self.ced * ced,
            "kl": self.kl * losses.kl(student.logits, targets["logits"], self.temperature),
        }


class TeacherMapsSPARK(PlainSPARK):
    """PlainSPARK with the teacher's attention-enhanced maps, pooled to where they are compared, as constants."""

    def teacher_targets(self, teacher: NetworkOutput, mask: Tensor) -> dict[str, Tensor]:
        maps = {
            f"{s}_{t}": pool_to(self.plain_enhanced(getattr(teacher, t), self.teacher, t), self.meeting(s, t, mask))
            for s, t in self.pairs
        }
        return {"logits": teacher.logits} | maps

    def forward(
        self, student: NetworkOutput, targets: dict[str, Tensor], mask: Tensor, index: Tensor, known: None = None
    ) -> dict[str, Tensor]:
        return self.terms(student, targets, targets, mask)


def plain_distance(x: Tensor, y: Tensor, connector: nn.Module) -> Tensor:
    """Both maps pooled to the smaller size, the student's behind its connector, and compared at that size and at
    4×4, 2×2 and 1×1, each pooled from there."""
    x = connector(x)
    size = smaller(size_of(x), size_of(y))
    x, y = pool_to(x, size), pool_to(y, size)
    loss, weight, total = F.mse_loss(x, y), 1.0, 1.0
    for side in (4, 2, 1):
        if side < min(size):
            weight /= 2
            loss = loss + weight * F.mse_loss(pool_to(x, (side, side)), pool_to(y, (side, side)))
            total += weight
    return loss / total


def plain_levels(x: Tensor, coarse: Tensor | None = None) -> list[Tensor]:
    """The levels of `features.pooled_levels`, each from the map itself."""
    return [x, *(pool_to(x, (side, side)) for side in (4, 2, 1) if side < min(size_of(x)))]
