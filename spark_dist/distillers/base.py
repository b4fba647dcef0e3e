"""The interface of all distillation methods."""

from torch import Tensor, nn

from spark_dist import losses
from spark_dist.networks.base import NetworkOutput


class Distiller(nn.Module):
    """A distillation method: what it needs of the teacher, and the loss terms it asks of the student.

    Its parameters (connectors) are built once and train with the student. Every keyword of a subclass's
    constructor that is not `student`, `teacher` or `samples` is a weight or setting of the method which recipes
    and the command line can set by that name.

    `fewest_slices` is the least share of a batch from which the method learns anything of the teacher: more than one
    where it compares slices with each other.

    Throughout, N is the batch, C ≥ 2 the number of classes and `mask` the one-hot ground truth (N, C, H, W) in float,
    the background first. A method learns C from these tensors.
    """

    fewest_slices = 1
    supervised: tuple[str, ...] = ("segmentation",)
    """Loss terms of the ground truth alone, which a schedule of the distillation's weight leaves as they are."""

    def teacher_targets(self, teacher: NetworkOutput, mask: Tensor) -> dict[str, Tensor]:
        """All that this method needs to know of the teacher, per sample, batch first, and nothing more.

        This is what the teacher cache stores: a pure function of one sample's teacher output and mask, free of
        this module's parameters and of the other samples in the batch.
        """
        raise NotImplementedError

    def forward(
        self,
        student: NetworkOutput,
        targets: dict[str, Tensor],
        mask: Tensor,
        index: Tensor,
        known: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Named, weighted loss terms (scalars). Their sum is the training loss.

        `index` (N,) int64 is each sample's position among the training slices. `known` (N,) bool says of which samples
        the mask is the truth (see `losses`): terms between the student and the truth are over these alone, terms
        between the student and the teacher over all. Where it is not given, all are known.
        """
        raise NotImplementedError


class PredictionDistiller(Distiller):
    """A method that needs nothing of the teacher but its prediction: as a rule, the differences of its logits, `margin`
    (N, C − 1, H, W). Of such teachers any number can be averaged."""

    def teacher_targets(self, teacher: NetworkOutput, mask: Tensor) -> dict[str, Tensor]:
        return {"margin": losses.margin(teacher.logits)}
