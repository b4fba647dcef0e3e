"""Soft targets: the teacher's probabilities, by KL and by overlap."""

from torch import Tensor

from data_tools.errors import UserError
from spark_dist import losses
from spark_dist.networks.base import NetworkOutput, Taps

from .base import PredictionDistiller


class Soft(PredictionDistiller):
    """The teacher's probabilities as soft labels (Hinton et al., arXiv 1503.02531), by pixel and by overlap.

    segmentation · (½ focal + ½ soft Dice) + kl · KL(teacher ‖ student) at temperature 1 + dice · Dice semimetric loss
    (Wang et al., MICCAI 2023, arXiv 2303.16296; see `losses.dice_semimetric`).

    It needs nothing of the teacher but its prediction. The temperature is 1 because with two classes a higher one pulls
    hardest on pixels that are background beyond doubt. `kl_focus`, from 0 to 1, is by how much less such pixels weigh
    in the KL, and the others more (the `focus` of `losses.kl`).
    Caches the logits' differences. Defined over the whole batch (of all processes).

    Several classes: the KL is over all classes, the Dice semimetric loss the mean over all but the background.
    """

    def __init__(
        self,
        student: Taps,
        teacher: Taps,
        segmentation: float = 0.5,
        kl: float = 0.5,
        dice: float = 0.5,
        kl_focus: float = 0.0,
    ):
        super().__init__()
        if not 0 <= kl_focus <= 1:
            raise UserError(f"method 'soft': kl_focus must be from 0 to 1, not {kl_focus:g}")
        self.segmentation, self.kl, self.dice, self.kl_focus = segmentation, kl, dice, kl_focus

    def forward(
        self,
        student: NetworkOutput,
        targets: dict[str, Tensor],
        mask: Tensor,
        index: Tensor,
        known: Tensor | None = None,
    ) -> dict[str, Tensor]:
        logits = losses.logits_of(targets["margin"])
        return {
            "segmentation": self.segmentation * losses.segmentation(student.logits, mask, known),
            "kl": self.kl * losses.kl(student.logits, logits, temperature=1, focus=self.kl_focus),
            "dice": self.dice * losses.dice_semimetric(student.logits, logits),
        }
