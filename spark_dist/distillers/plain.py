"""Training without a teacher, in the form of a distiller."""

from torch import Tensor

from spark_dist import losses
from spark_dist.networks.base import NetworkOutput

from .base import Distiller


class Plain(Distiller):
    """The segmentation loss alone. It is no method of distillation, and so not in `DISTILLERS`."""

    def teacher_targets(self, teacher: NetworkOutput, mask: Tensor) -> dict[str, Tensor]:
        return {}

    def forward(
        self,
        student: NetworkOutput,
        targets: dict[str, Tensor],
        mask: Tensor,
        index: Tensor,
        known: Tensor | None = None,
    ) -> dict[str, Tensor]:
        return {"segmentation": losses.segmentation(student.logits, mask, known)}
