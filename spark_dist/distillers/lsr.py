"""Label smoothing as distillation."""

from torch import Tensor

from spark_dist import losses
from spark_dist.networks.base import NetworkOutput, Taps

from .base import PredictionDistiller


class LSR(PredictionDistiller):
    """Label smoothing regularisation in the form that Yuan et al. (CVPR 2020, arXiv 1909.11723) show it to be: a
    teacher that is the mask itself, at a high temperature, beside a little of the real one.

    truth · T² KL(mask ‖ student) + kl · T² KL(teacher ‖ student), the mask being taken for logits.
    Caches the logits' differences. Defined per sample.

    Several classes: both KL are over all classes.
    """

    supervised = ("truth",)

    def __init__(self, student: Taps, teacher: Taps, truth: float = 0.95, kl: float = 0.05, temperature: float = 40.0):
        super().__init__()
        self.truth, self.kl, self.temperature = truth, kl, temperature

    def forward(
        self,
        student: NetworkOutput,
        targets: dict[str, Tensor],
        mask: Tensor,
        index: Tensor,
        known: Tensor | None = None,
    ) -> dict[str, Tensor]:
        return {
            "truth": self.truth * losses.kl(student.logits, mask, self.temperature, known),
            "kl": self.kl * losses.kl(student.logits, losses.logits_of(targets["margin"]), self.temperature),
        }
