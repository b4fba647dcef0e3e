"""The one module that is prepared, trained and resumed."""

from torch import Tensor, nn

from spark_dist.distillers.base import Distiller


class Distillation(nn.Module):
    """A student and the distiller that teaches it, so that DDP and DeepSpeed see one model.

    The frozen teacher is no part of it: it is neither prepared nor saved.
    """

    def __init__(self, student: nn.Module, distiller: Distiller):
        super().__init__()
        self.student = student
        self.distiller = distiller

    def forward(self, image: Tensor, mask: Tensor, targets: dict[str, Tensor], index: Tensor) -> dict[str, Tensor]:
        """Named, weighted loss terms of a batch (see `Distiller.forward`); image (N, 1, H, W)."""
        return self.distiller(self.student(image), targets, mask, index)
