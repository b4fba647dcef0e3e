"""SPARK: attention-enhanced features distilled across levels."""

import torch
from torch import Tensor, nn

from spark_dist import losses
from spark_dist.networks.base import NetworkOutput, Taps

from .base import Distiller
from .features import Size, attention_enhanced, connector, has_coarse, map_size, pool_to, size_of, smaller
from .quadratic import centred, distance, distance_through, pooled_columns, power


class SPARK(Distiller):
    """SPARK: cross-level enhanced distillation (CED) of attention-enhanced features, and of the mask's logits.

    A feature map F becomes F̂ = F · gain · A, A being the mean over channels of F², L2-normalised over the pixels of
    each sample. CED = d(low, low) + high_low · d(high, low) + d(high, high) + low_high · d(low, high), each pair named
    student first, d being the `hierarchical_mse` of the student's map, seen through a connector where the numbers of
    channels differ, and the teacher's, both pooled to the smaller size. The loss is
    segmentation · (½ focal + ½ soft Dice) + ced · CED + kl · T² KL(teacher ‖ student).

    The gain holds at a crop of `reference_crop`² pixels (the paper's 384), and grows with √(H·W) so that the term
    weighs the same at every crop (see `attention_enhanced`).

    Caches the logits' differences, and the teacher's enhanced maps pooled to the size at which a student's map meets
    them, with a further pooling and mean squares. Defined per sample, but for the connectors' batch norm, whose
    statistics are those of each process's part of the batch at the student's own size. The teacher-wide maps that the
    connectors stand for are never formed (see `quadratic`).

    Several classes: the KL is over all classes; CED does not know classes.
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
        self.connected = [(s, t) for s, t in self.pairs if not isinstance(self.connectors[f"{s}_{t}"], nn.Identity)]

    def enhanced(self, x: Tensor, stride: int) -> Tensor:
        """The attention-enhanced features of a map with a stride."""
        return attention_enhanced(x, self.gain, stride, self.reference_crop)

    def meeting(self, student: str, teacher: str, mask: Tensor) -> Size:
        """(H, W) at which a student's and a teacher's map are compared."""
        return smaller(map_size(getattr(self.student, student), mask), map_size(getattr(self.teacher, teacher), mask))

    def target(self, student: str, teacher: str, mask: Tensor) -> str:
        """The name of the teacher's map that a student's meets: one serves both where the sizes are equal."""
        shared = self.meeting("high", teacher, mask) == self.meeting("low", teacher, mask)
        return teacher if shared or student == "low" else f"{teacher}_at_high"

    def teacher_targets(self, teacher: NetworkOutput, mask: Tensor) -> dict[str, Tensor]:
        targets, powers = {"margin": losses.margin(teacher.logits)}, []
        for t in ("low", "high"):
            x = self.enhanced(getattr(teacher, t), getattr(self.teacher, t).stride)
            for s in ("low", "high"):
                name = self.target(s, t, mask)
                if name in targets:
                    continue
                targets[name] = pool_to(x, self.meeting(s, t, mask))
                if has_coarse(size_of(targets[name])):
                    targets[f"{name}_coarse"] = pool_to(targets[name], (4, 4))
        for s, t in self.connected:
            powers.append(power(targets[self.target(s, t, mask)]))
        return targets | ({"power": torch.stack(powers, dim=1)} if powers else {})

    def forward(
        self,
        student: NetworkOutput,
        targets: dict[str, Tensor],
        mask: Tensor,
        index: Tensor,
        known: Tensor | None = None,
    ) -> dict[str, Tensor]:
        maps = {s: self.enhanced(getattr(student, s), getattr(self.student, s).stride) for s in ("low", "high")}
        around_mean = {s: centred(maps[s]) for s, _ in self.connected}
        ced = torch.zeros((), device=mask.device)
        for (s, t), weight in self.pairs.items():
            name, size = self.target(s, t, mask), self.meeting(s, t, mask)
            teacher = targets[name], pooled_columns(targets[name], targets.get(f"{name}_coarse"))
            if (s, t) in self.connected:
                x = around_mean[s]
                squares = targets["power"][:, self.connected.index((s, t))]
                d = distance_through(self.connectors[f"{s}_{t}"], x, pool_to(x.map, size), *teacher, squares)
            else:
                d = distance(pool_to(maps[s], size), *teacher)
            ced = ced + weight * d
        return {
            "segmentation": self.segmentation * losses.segmentation(student.logits, mask, known),
            "ced": self.ced * ced,
            "kl": self.kl * losses.kl(student.logits, losses.logits_of(targets["margin"]), self.temperature),
        }
