"""SPARK: attention-enhanced features distilled across levels."""

from torch import Tensor, nn

from spark_dist import losses
from spark_dist.networks.base import NetworkOutput, Taps

from .base import Distiller
from .features import (
    attention_enhanced,
    connector,
    hierarchical_mse,
    map_size,
    pool_to,
    size_of,
    smaller,
)


class SPARK(Distiller):
    """SPARK: cross-level enhanced distillation (CED) of attention-enhanced features, and of the mask's logits.

    A feature map F becomes F̂ = F · gain · A, A being the mean over channels of F², L2-normalised over the pixels of
    each sample. CED = d(low, low) + high_low · d(high, low) + d(high, high) + low_high · d(low, high), each pair named
    student first, d being `distance`. The loss is
    segmentation · (½ focal + ½ soft Dice) + ced · CED + kl · T² KL(teacher ‖ student).

    The gain holds at a crop of `reference_crop`² pixels (the paper's 384), and grows with √(H·W) so that the term
    weighs the same at every crop (see `attention_enhanced`).

    Caches the logits, and the teacher's enhanced maps pooled to the size at which the student's largest map meets
    them. Defined per sample, but for the connectors' batch norm.
    """

    def __init__(
        self,
        student: Taps,
        teacher: Taps,
        segmentation: float = 1.0,
        ced: float = 0.08,
        high_low: float = 0.6,
        low_high: float = 0.5,
        kl: float = 0.1999,
        temperature: float = 4.0,
        gain: float = 20.0,
        reference_crop: int = 384,
    ):
        super().__init__()
        self.segmentation, self.ced, self.kl, self.temperature = segmentation, ced, kl, temperature
        self.gain, self.reference_crop = gain, reference_crop
        self.student, self.teacher = student, teacher
        self.pairs = {("low", "low"): 1.0, ("high", "low"): high_low, ("high", "high"): 1.0, ("low", "high"): low_high}
        self.connectors = nn.ModuleDict(
            {f"{s}_{t}": connector(getattr(student, s).channels, getattr(teacher, t).channels) for s, t in self.pairs}
        )

    def enhanced(self, x: Tensor, stride: int) -> Tensor:
        """The attention-enhanced features of a map with a stride."""
        return attention_enhanced(x, self.gain, stride, self.reference_crop)

    def teacher_targets(self, teacher: NetworkOutput, mask: Tensor) -> dict[str, Tensor]:
        largest = max(map_size(self.student.low, mask), map_size(self.student.high, mask))
        low = self.enhanced(teacher.low, self.teacher.low.stride)
        high = self.enhanced(teacher.high, self.teacher.high.stride)
        return {
            "logits": teacher.logits,
            "low": pool_to(low, smaller(size_of(low), largest)),
            "high": pool_to(high, smaller(size_of(high), largest)),
        }

    def forward(
        self, student: NetworkOutput, targets: dict[str, Tensor], mask: Tensor, index: Tensor
    ) -> dict[str, Tensor]:
        # The connectors take the student's number format, which is not float32 where DeepSpeed casts the model.
        maps = {
            "low": self.enhanced(student.low, self.student.low.stride).to(student.low.dtype),
            "high": self.enhanced(student.high, self.student.high.stride).to(student.high.dtype),
        }
        ced = sum(
            weight * distance(maps[s], targets[t], self.connectors[f"{s}_{t}"]) for (s, t), weight in self.pairs.items()
        )
        return {
            "segmentation": self.segmentation * losses.segmentation(student.logits, mask),
            "ced": self.ced * ced,
            "kl": self.kl * losses.kl(student.logits, targets["logits"], self.temperature),
        }


def distance(student: Tensor, teacher: Tensor, connector: nn.Module) -> Tensor:
    """How far a student's map (N, C, H, W), seen through a connector, is from a teacher's (N, C', H', W'): both pooled
    to the smaller size, then compared by `hierarchical_mse`."""
    size = smaller(size_of(student), size_of(teacher))
    return hierarchical_mse(pool_to(connector(student).float(), size), pool_to(teacher.float(), size))
