"""Knowledge distillation of standardised logits."""

from torch import Tensor

from spark_dist import losses
from spark_dist.networks.base import NetworkOutput, Taps

from .base import PredictionDistiller


class LSKD(PredictionDistiller):
    """Sun et al., Logit Standardization in Knowledge Distillation, CVPR 2024, arXiv 2403.01427.

    Here because at one temperature for both, the student is asked to match the range of a much larger teacher's
    logits; standardised, it is asked for their shape only.

    segmentation · (½ focal + ½ soft Dice) + kl · T² KL(teacher ‖ student) of logits that were divided by their
    standard deviation (`standardised`), each network's by its own. The weights are the paper's.
    Caches the logits, standardised. Defined per sample.

    Several classes: the deviation is over the classes of one pixel, as in the paper. With two classes that leaves
    nothing but the sign of a pixel's logits, so then it is over the classes and pixels of a slice.
    """

    def __init__(
        self, student: Taps, teacher: Taps, segmentation: float = 0.1, kl: float = 9.0, temperature: float = 2.0
    ):
        super().__init__()
        self.segmentation, self.kl, self.temperature = segmentation, kl, temperature

    def teacher_targets(self, teacher: NetworkOutput, mask: Tensor) -> dict[str, Tensor]:
        return {"logits": standardised(teacher.logits)}

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
            "kl": self.kl * losses.kl(standardised(student.logits), targets["logits"], self.temperature),
        }


def standardised(logits: Tensor) -> Tensor:
    """Logits (N, C, H, W) less their mean over classes, over their standard deviation over classes (with two: over
    classes and pixels)."""
    centred = logits.float() - logits.float().mean(dim=1, keepdim=True)
    over = (1, 2, 3) if logits.shape[1] == 2 else 1
    return centred / (centred.pow(2).mean(dim=over, keepdim=True) + 1e-12).sqrt()
