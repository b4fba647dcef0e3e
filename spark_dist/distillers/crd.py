"""Contrastive representation distillation."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from data_tools.errors import UserError
from spark_dist import losses
from spark_dist.losses import processes
from spark_dist.networks.base import NetworkOutput, Taps

from .base import Distiller

MOMENTUM = 0.5
"""The share of itself that an entry of the memory keeps when its slice is met again."""


class CRD(Distiller):
    """Tian et al., Contrastive Representation Distillation, ICLR 2020, arXiv 1910.10699.

    cross_entropy · CE + contrast · CRD. Student and teacher embed the spatial mean of their high features linearly on
    the unit sphere of `dimensions`. Each embedding tells the other network's embedding of the same slice from those of
    `negatives` other slices, which a memory holds for every training slice: noise-contrastive estimation with scores
    exp(⟨·,·⟩ / temperature) / Z, Z being the mean score of the first batch times the number of slices.

    Caches the teacher's mean high features, a vector. Defined per sample, given the memory. With several processes
    each holds the whole memory (2 · samples · dimensions numbers, saved with a checkpoint) and enters the samples of
    all, and negatives are drawn for the global batch by a generator seeded with the step, so that N processes do what
    one does.

    `samples` is the number of training slices. Raises `UserError` in training if there are not two.
    """

    supervised = ("cross_entropy",)

    def __init__(
        self,
        student: Taps,
        teacher: Taps,
        samples: int,
        cross_entropy: float = 1.0,
        contrast: float = 0.8,
        dimensions: int = 128,
        negatives: int = 999,
        temperature: float = 0.07,
    ):
        super().__init__()
        self.cross_entropy, self.contrast, self.temperature = cross_entropy, contrast, temperature
        self.samples, self.negatives = samples, negatives
        self.embed_student = nn.Linear(student.high.channels, dimensions)
        self.embed_teacher = nn.Linear(teacher.high.channels, dimensions)
        self.register_buffer("student_memory", F.normalize(torch.randn(samples, dimensions), dim=1))
        self.register_buffer("teacher_memory", F.normalize(torch.randn(samples, dimensions), dim=1))
        self.register_buffer("normalisers", torch.ones(2))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def teacher_targets(self, teacher: NetworkOutput, mask: Tensor) -> dict[str, Tensor]:
        return {"high": teacher.high.mean(dim=(2, 3))}

    def forward(
        self,
        student: NetworkOutput,
        targets: dict[str, Tensor],
        mask: Tensor,
        index: Tensor,
        known: Tensor | None = None,
    ) -> dict[str, Tensor]:
        sizes = batch_sizes(index)
        # Linear layers are computed in float32, as exp(·/0.07) magnifies rounding.
        with torch.autocast(mask.device.type, enabled=False):
            of_student = embedding(self.embed_student, student.high.float().mean(dim=(2, 3)))
            of_teacher = embedding(self.embed_teacher, targets["high"].float())
            rows = self.draw(index, sizes)
            scores = torch.stack(
                [
                    self.scores(of_student, self.teacher_memory[rows]),
                    self.scores(of_teacher, self.student_memory[rows]),
                ]
            )
        if self.training:
            self.remember(index, of_student.detach(), of_teacher.detach(), scores.detach(), sizes)
        contrast = self.estimation(scores / self.normalisers.float().view(2, 1, 1))
        return {
            "cross_entropy": self.cross_entropy * losses.cross_entropy(student.logits, mask, known),
            "contrast": self.contrast * contrast,
        }

    def draw(self, index: Tensor, sizes: list[int]) -> Tensor:
        """Rows of the memory (N, 1 + negatives): each sample's own, then those of other slices. `sizes` are the
        processes' numbers of samples."""
        if self.samples < 2:
            raise UserError("method 'crd' contrasts a slice with others; it needs at least two training slices")
        first = sum(sizes[: dist.get_rank()]) if len(sizes) > 1 else 0
        generator = torch.Generator().manual_seed(int(self.step))
        steps = torch.randint(1, self.samples, (sum(sizes), self.negatives), generator=generator)
        own = index.view(-1, 1)
        return torch.cat([own, (own + steps[first : first + len(index)].to(index.device)) % self.samples], dim=1)

    def scores(self, anchors: Tensor, others: Tensor) -> Tensor:
        """exp(⟨anchor, other⟩ / temperature), (N, 1 + negatives)."""
        return (torch.einsum("nd,nkd->nk", anchors, others.float()) / self.temperature).exp()

    def estimation(self, scores: Tensor) -> Tensor:
        """The noise-contrastive loss of normalised scores (2, N, 1 + negatives), the positive first: summed over the
        two networks and the negatives, averaged over samples."""
        noise = self.negatives / self.samples
        positive, negative = scores[..., 0], scores[..., 1:]
        log_positive = (positive / (positive + noise + 1e-7)).log()
        log_negative = (noise / (negative + noise + 1e-7)).log()
        return -(log_positive + log_negative.sum(dim=2)).mean(dim=1).sum()

    @torch.no_grad()
    def remember(self, index: Tensor, of_student: Tensor, of_teacher: Tensor, scores: Tensor, sizes: list[int]) -> None:
        """Enter the embeddings of the global batch into the memory; at the first step, set the normalisers."""
        if self.step == 0:
            self.normalisers.copy_(gather(scores.mean(dim=2).T, sizes).mean(dim=0) * self.samples)
        index = gather(index, sizes)
        for memory, embeddings in ((self.student_memory, of_student), (self.teacher_memory, of_teacher)):
            entries = MOMENTUM * memory[index] + (1 - MOMENTUM) * gather(embeddings, sizes)
            memory[index] = F.normalize(entries, dim=1).to(memory.dtype)
        self.step += 1


def embedding(layer: nn.Linear, x: Tensor) -> Tensor:
    """A linear embedding on the unit sphere, (N, dimensions), in float32."""
    return F.normalize(F.linear(x, layer.weight.float(), layer.bias.float()), dim=1)


def batch_sizes(x: Tensor) -> list[int]:
    """The lengths of each process's part of the global batch."""
    if processes() == 1:
        return [len(x)]
    sizes = [torch.zeros((), dtype=torch.int64, device=x.device) for _ in range(processes())]
    dist.all_gather(sizes, torch.tensor(len(x), device=x.device))
    return [int(size) for size in sizes]


def gather(x: Tensor, sizes: list[int]) -> Tensor:
    """The rows of all processes, which have `sizes` of them, in the order of their ranks, without gradient."""
    if len(sizes) == 1:
        return x
    # Parts of unequal length are padded, as not every backend gathers them.
    padded = x.new_zeros(max(sizes), *x.shape[1:])
    padded[: len(x)] = x
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
