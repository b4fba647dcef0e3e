"""Channel-wise distillation."""

import torch.nn.functional as F
from torch import Tensor

from spark_dist import losses
from spark_dist.networks.base import NetworkOutput, Taps

from .base import Distiller


class CWD(Distiller):
    """Shu et al., Channel-wise Knowledge Distillation for Dense Prediction, ICCV 2021, arXiv 2011.13256.

    segmentation · (½ focal + ½ soft Dice) + channel · T² KL(teacher ‖ student) of the logits, each class's map being
    made a distribution over the pixels by a softmax at temperature T; averaged over samples and classes.
    Caches the logits, less each class's mean over the pixels, which makes no difference to the loss and loses less in
    half precision. Defined per sample.

    Several classes: each class's map is a distribution of its own; the mean over all classes.
    """

    def __init__(
        self, student: Taps, teacher: Taps, segmentation: float = 1.0, channel: float = 3.0, temperature: float = 4.0
    ):
        super().__init__()
        self.segmentation, self.channel, self.temperature = segmentation, channel, temperature

    def teacher_targets(self, teacher: NetworkOutput, mask: Tensor) -> dict[str, Tensor]:
        return {"logits": teacher.logits - teacher.logits.mean(dim=(2, 3), keepdim=True)}

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
            "channel": self.channel * channel_kl(student.logits, targets["logits"], self.temperature),
        }


def channel_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Mean over samples and channels of KL(teacher ‖ student) of the distributions over pixels, times T²."""
    log_p = F.log_softmax(student.float().flatten(2) / temperature, dim=2)
    log_q = F.log_softmax(teacher.float().flatten(2) / temperature, dim=2)
    return (log_q.exp() * (log_q - log_p)).sum(dim=2).mean() * temperature**2
