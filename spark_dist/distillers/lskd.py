"""Knowledge distillation of standardised logits."""

from torch import Tensor

from spark_dist import losses
from spark_dist.networks.base import NetworkOutput, Taps

from .base import Distiller


class LSKD(Distiller):
    """Sun et al., Logit Standardization in Knowledge Distillation, CVPR 2024, arXiv 2403.01427.

    Here because at one temperature for both, the student is asked to match the range of a much larger teacher's
    logits; standardised, it is asked for their shape only.

    segmentation · (½ focal + ½ soft Dice) + kl · T² KL(teacher ‖ student) of logits that were divided by their
    standard deviation (`standardised`), each network's by its own. The paper takes the deviation over the classes of
    one prediction. With two classes that leaves nothing but the sign of a pixel's logits, so it is taken over the
    classes and pixels of a slice here. The weights are the paper's.

    Caches the logits, standardised. Defined per sample.
    """

    def __init__(
        self, student: Taps, teacher: Taps, segmentation: float = 0.1, kl: float = 9.0, temperature: float = 2.0
    ):
        super().__init__()
        self.segmentation, self.kl, self.temperature = segmentation, kl, temperature

    def teacher_targets(self, teacher: NetworkOutput, mask: Tensor) -> dict[str, Tensor]:
        return {"logits": standardised(teacher.logits)}

    def forward(
        self, student: NetworkOutput, targets: dict[str, Tensor], mask: Tensor, index: Tensor
    ) -> dict[str, Tensor]:
        return {
            "segmentation": self.segmentation * losses.segmentation(student.logits, mask),
            "kl": self.kl * losses.kl(standardised(student.logits), targets["logits"], self.temperature),
        }


def standardised(logits: Tensor) -> Tensor:
    """Logits (N, C, H, W) less their mean over classes, over their standard deviation over classes and pixels."""
    centred = logits.float() - logits.float().mean(dim=1, keepdim=True)
    return centred / (centred.pow(2).mean(dim=(1, 2, 3), keepdim=True) + 1e-12).sqrt()
