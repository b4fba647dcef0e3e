"""The one module that is prepared, trained and resumed."""

import torch
from torch import Tensor, nn

from spark_dist import losses
from spark_dist.distillers.base import Distiller
from spark_dist.networks.base import NetworkOutput
from spark_dist.teacher.targets import completed


class Distillation(nn.Module):
    """A student and the distiller that teaches it, so that DDP and DeepSpeed see one model.

    A frozen teacher is no part of it: it is neither prepared nor saved. A `teacher` that trains at every step is; it
    learns from the ground truth alone, and the student from what it says at that step.
    """

    def __init__(self, student: nn.Module, distiller: Distiller, teacher: nn.Module | None = None):
        super().__init__()
        self.student = student
        self.distiller = distiller
        self.teacher = teacher

    def forward(
        self, image: Tensor, mask: Tensor, targets: dict[str, Tensor], index: Tensor, known: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Named, weighted loss terms of a batch (see `Distiller.forward`); image (N, channels, H, W). A teacher's own
        is called `teacher`, and its `targets` take the place of those given."""
        if self.teacher is None:
            return self.distiller(self.student(image), targets, mask, index, known)
        output = self.teacher(image)
        loss = losses.segmentation(output.logits, mask, known)
        with torch.no_grad():
            if known is not None:
                mask = completed(mask, known, output.logits.argmax(dim=1))
            targets = self.distiller.teacher_targets(NetworkOutput(*(t.detach().float() for t in output)), mask)
        return self.distiller(self.student(image), targets, mask, index, known) | {"teacher": loss}
