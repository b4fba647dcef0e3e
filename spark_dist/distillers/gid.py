"""Distillation of the logits at low resolution."""

import torch
import torch.nn.functional as F
from torch import Tensor

from spark_dist import losses
from spark_dist.networks.base import NetworkOutput, Taps

from .base import Distiller

BLOCK = 8
"""Side of the blocks of pixels over which logits are averaged."""


class GID(Distiller):
    """The method that the original implementation of SPARK calls GID (not the general instance distillation of CVPR
    2021, which needs a detector's boxes).

    cross_entropy · CE + dice · Dice + kl · KL(teacher ‖ student) of the logits averaged over blocks of 8×8 pixels,
    which is summed over the batch and averaged over the blocks. The Dice is the mean over all classes of that
    with squares in its denominator (smooth 1e-5).
    Caches the averaged logits. The KL is a sum over samples, the Dice a ratio of sums over the whole batch, and both
    are those of one process with several.

    Several classes: cross entropy and KL are over all classes, the Dice is the mean over all, also the background.
    """

    supervised = ("cross_entropy", "dice")

    def __init__(self, student: Taps, teacher: Taps, cross_entropy: float = 0.5, dice: float = 0.5, kl: float = 0.01):
        super().__init__()
        self.cross_entropy, self.dice, self.kl = cross_entropy, dice, kl

    def teacher_targets(self, teacher: NetworkOutput, mask: Tensor) -> dict[str, Tensor]:
        return {"logits": F.avg_pool2d(teacher.logits, BLOCK)}

    def forward(
        self,
        student: NetworkOutput,
        targets: dict[str, Tensor],
        mask: Tensor,
        index: Tensor,
        known: Tensor | None = None,
    ) -> dict[str, Tensor]:
        logits = student.logits.float()
        samples = losses.sum_over_processes(logits.new_tensor(float(len(logits))))
        kl = samples * losses.kl(F.avg_pool2d(logits, BLOCK), targets["logits"], temperature=1.0)
        return {
            "cross_entropy": self.cross_entropy * losses.cross_entropy(logits, mask, known),
            "dice": self.dice * squared_dice(logits, mask, known),
            "kl": self.kl * kl,
        }


def squared_dice(logits: Tensor, mask: Tensor, known: Tensor | None, smooth: float = 1e-5) -> Tensor:
    """1 − the mean over all classes of 2Σpy / (Σp² + Σy²), sums being over the whole batch of all processes."""
    p, mask = losses.only_known(logits.softmax(dim=1), known), losses.only_known(mask, known)
    sums = torch.stack([(p * mask).sum(dim=(0, 2, 3)), (p * p).sum(dim=(0, 2, 3)), (mask * mask).sum(dim=(0, 2, 3))])
    overlap, predicted, true = losses.sum_over_processes(sums)
    return 1 - ((2 * overlap + smooth) / (predicted + true + smooth)).mean()
