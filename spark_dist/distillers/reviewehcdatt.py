"""Knowledge review of attention-enhanced features."""

from torch import Tensor

from spark_dist import losses
from spark_dist.networks.base import NetworkOutput, Taps

from .base import Distiller
from .features import attention_enhanced, hierarchical_mse, resize_to, size_of
from .reviewkd import ReviewFusion


class ReviewEhcdAtt(Distiller):
    """A forerunner of SPARK in its original implementation: knowledge review (see `ReviewKD`) of attention-enhanced
    features.

    segmentation · (½ focal + ½ soft Dice) + review · Σ over low, high of `hierarchical_mse` between the student's
    features, enhanced (`attention_enhanced`), fused (`ReviewFusion`) and resized, and the teacher's, enhanced. The
    gain holds at a crop of `reference_crop`² pixels.
    Caches both enhanced feature maps. Defined per sample, but for the fusion's batch norm.
    """

    def __init__(
        self,
        student: Taps,
        teacher: Taps,
        segmentation: float = 1.0,
        review: float = 1.0,
        channels: int = 64,
        gain: float = 10.0,
        reference_crop: int = 384,
    ):
        super().__init__()
        self.segmentation, self.review = segmentation, review
        self.gain, self.reference_crop = gain, reference_crop
        self.student, self.teacher = student, teacher
        self.fusion = ReviewFusion(student, teacher, channels)

    def enhanced(self, x: Tensor, stride: int) -> Tensor:
        """The attention-enhanced features of a map with a stride."""
        return attention_enhanced(x, self.gain, stride, self.reference_crop)

    def teacher_targets(self, teacher: NetworkOutput, mask: Tensor) -> dict[str, Tensor]:
        return {
            "low": self.enhanced(teacher.low, self.teacher.low.stride),
            "high": self.enhanced(teacher.high, self.teacher.high.stride),
        }

    def forward(
        self,
        student: NetworkOutput,
        targets: dict[str, Tensor],
        mask: Tensor,
        index: Tensor,
        known: Tensor | None = None,
    ) -> dict[str, Tensor]:
        # The fusion takes the student's number format, which is not float32 where DeepSpeed casts the model.
        low, high = self.fusion(
            self.enhanced(student.low, self.student.low.stride).to(student.low.dtype),
            self.enhanced(student.high, self.student.high.stride).to(student.high.dtype),
        )
        review = sum(
            hierarchical_mse(resize_to(x.float(), size_of(y)), y.float())
            for x, y in ((low, targets["low"]), (high, targets["high"]))
        )
        return {
            "segmentation": self.segmentation * losses.segmentation(student.logits, mask, known),
            "review": self.review * review,
        }
