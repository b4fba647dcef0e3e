"""Teacher-free knowledge distillation."""

from torch import Tensor

from data_tools.errors import UserError
from spark_dist import losses
from spark_dist.networks.base import NetworkOutput, Taps

from .base import PredictionDistiller


class TfKD(PredictionDistiller):
    """Yuan et al., Revisiting Knowledge Distillation via Label Smoothing Regularization, CVPR 2020, arXiv 1909.11723
    (Tf-KD by self-training).

    segmentation · (½ focal + ½ soft Dice) + kl · T² KL(teacher ‖ student), the KL's mean being over pixels and
    classes. The teacher is a trained copy of the student's own network.
    Caches the logits' differences. Defined per sample.

    Several classes: the KL is over all classes, divided by their number.

    Raises `UserError` if the taps show that teacher and student are not the same network. Equal taps do not prove
    that they are: the names of the networks, which a method does not see, must be compared by the caller.
    """

    def __init__(
        self, student: Taps, teacher: Taps, segmentation: float = 0.05, kl: float = 0.95, temperature: float = 40.0
    ):
        super().__init__()
        if student != teacher:
            raise UserError(
                "method 'tfkd': the teacher must be the student's own network and width; "
                "give both the same, or use method 'kd'"
            )
        self.segmentation, self.kl, self.temperature = segmentation, kl, temperature

    def forward(
        self,
        student: NetworkOutput,
        targets: dict[str, Tensor],
        mask: Tensor,
        index: Tensor,
        known: Tensor | None = None,
    ) -> dict[str, Tensor]:
        logits = student.logits
        kl = losses.kl(logits, losses.logits_of(targets["margin"]), self.temperature) / logits.shape[1]
        return {"segmentation": self.segmentation * losses.segmentation(logits, mask, known), "kl": self.kl * kl}
