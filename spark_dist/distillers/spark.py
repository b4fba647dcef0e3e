"""SPARK: attention-enhanced features distilled across levels."""

from torch import Tensor, nn

from spark_dist.losses import kl, segmentation
from spark_dist.networks.base import NetworkOutput, Taps

from .base import Distiller
from .features import (
    attention_enhanced,
    connector,
    crop_free_gain,
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
    weighs the same at every crop (see `crop_free_gain`).

    Caches the logits, and the teacher's enhanced maps pooled to the size at which the student's largest map meets
    them. Defined per sample, but for the batch norm of the connectors, which takes each process's own batch.
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
        self.student_taps, self.teacher_taps = student, teacher
        self.pairs = {("low", "low"): 1.0, ("high", "low"): high_low, ("high", "high"): 1.0, ("low", "high"): low_high}
        self.connectors = nn.ModuleDict(
            {f"{s}_{t}": connector(getattr(student, s).channels, getattr(teacher, t).channels) for s, t in self.pairs}
        )

    def enhanced(self, output: NetworkOutput, taps: Taps) -> dict[str, Tensor]:
        """The attention-enhanced maps `low` and `high` of a network."""
        maps = {"low": (output.low, taps.low), "high": (output.high, taps.high)}
        return {
            name: attention_enhanced(x, crop_free_gain(self.gain, x, tap.stride, self.reference_crop))
            for name, (x, tap) in maps.items()
        }

    def teacher_targets(self, teacher: NetworkOutput, mask: Tensor) -> dict[str, Tensor]:
        largest = max(map_size(self.student_taps.low, mask), map_size(self.student_taps.high, mask))
        maps = self.enhanced(teacher, self.teacher_taps)
        return {
            "logits": teacher.logits,
            **{name: pool_to(x, smaller(size_of(x), largest)) for name, x in maps.items()},
        }

    def forward(
        self, student: NetworkOutput, targets: dict[str, Tensor], mask: Tensor, index: Tensor
    ) -> dict[str, Tensor]:
        maps = self.enhanced(student, self.student_taps)
        # The connectors take the student's number format, which is not float32 where DeepSpeed casts the model.
        ced = sum(
            weight * distance(maps[s].to(student.low.dtype), targets[t], self.connectors[f"{s}_{t}"])
            for (s, t), weight in self.pairs.items()
        )
        return {
            "segmentation": self.segmentation * segmentation(student.logits, mask),
            "ced": self.ced * ced,
            "kl": self.kl * kl(student.logits, targets["logits"], self.temperature),
        }


def distance(student: Tensor, teacher: Tensor, connector: nn.Module) -> Tensor:
    """How far a student's map (N, C, H, W), seen through a connector, is from a teacher's (N, C', H', W'): both pooled
    to the smaller size, then compared by `hierarchical_mse`."""
    size = smaller(size_of(student), size_of(teacher))
    return hierarchical_mse(pool_to(connector(student).float(), size), pool_to(teacher.float(), size))
