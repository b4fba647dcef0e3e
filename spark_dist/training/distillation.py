"""The one module that is prepared, trained and resumed, and the schedule of the distillation's weight."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from spark_dist import losses
from spark_dist.distillers.base import Distiller
from spark_dist.networks.base import NetworkOutput
from spark_dist.teacher.targets import completed


class Distillation(nn.Module):
    """A student and the distiller that teaches it, so that DDP and DeepSpeed see one model.

    A frozen teacher is no part of it: it is neither prepared nor saved. A `teacher` that trains at every step is; it
    learns from the ground truth alone, and the student from what it says at that step. `schedule` is a function of
    (step, total steps): the factor on all of the student's terms but those of the ground truth.
    """

    def __init__(
        self,
        student: nn.Module,
        distiller: Distiller,
        teacher: nn.Module | None = None,
        schedule: Callable[[int, int], float] | None = None,
    ):
        super().__init__()
        self.schedule = schedule
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

    def scheduled(self, terms: dict[str, Tensor], step: int, total: int) -> dict[str, Tensor]:
        """The terms of `forward` as they count at a step of `total`, counted from 0."""
        if self.schedule is None:
            return terms
        factor, fixed = self.schedule(step, total), (*self.distiller.supervised, "teacher")
        return {name: term if name in fixed else factor * term for name, term in terms.items()}


def distillation_factor(schedule: str, warmup: float, step: int, total: int) -> float:
    """The factor on a distillation's terms at a step of `total`, counted from 0.

    It grows from 0 to 1 in the first `warmup` steps (below 1: that part of all steps), then stays (`constant`) or falls
    to 0 by the last step's end (`linear`, `cosine`).
    """
    first = warmup * total if warmup < 1 else warmup
    if step < first:
        return step / first
    part = (step - first) / (total - first)
    return {"constant": 1.0, "linear": 1 - part, "cosine": (1 + math.cos(math.pi * part)) / 2}[schedule]
