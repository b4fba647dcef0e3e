"""Knowledge distillation of the logits."""

from torch import Tensor

from spark_dist import losses
from spark_dist.networks.base import NetworkOutput, Taps

from .base import PredictionDistiller


class KD(PredictionDistiller):
    """Hinton et al., Distilling the Knowledge in a Neural Network, arXiv 1503.02531.

    segmentation · (½ focal + ½ soft Dice) + kl · T² KL(teacher ‖ student), per pixel at temperature T.
    Caches the logits' differences. Defined per sample.

    Several classes: the KL is over all classes.
    """

    def __init__(
        self, student: Taps, teacher: Taps, segmentation: float = 0.1, kl: float = 0.9, temperature: float = 4.0
    ):
        super().__init__()
        self.segmentation, self.kl, self.temperature = segmentation, kl, temperature

    def forward(
        self,
        student: NetworkOutput,
        targets: dict[str, Tensor],
        mask: Tensor,
        index: Tensor,
        known: Tensor | None = None,
    ) -> dict[str, Tensor]:
        return {
            "segmentation": self.segmentation * losses.segmentation(student.logits, mask, known),
            "kl": self.kl * losses.kl(student.logits, losses.logits_of(targets["margin"]), self.temperature),
        }
