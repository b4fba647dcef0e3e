"""Losses between a batch's logits and its truth, or between two networks' logits.

Throughout, logits are (N, C, H, W), the first of the C ≥ 2 classes being the background, the mask is the one-hot truth
(N, C, H, W) in float, and a loss is a scalar. All compute in float32, also under autocast. Means are over samples and
pixels, so that the means of several processes, weighted by their numbers of samples, give the mean of the whole batch;
the Dice losses are ratios of sums, so their sums are taken over all processes.

`known` (N,) bool says of which samples the mask is the truth; the others count nothing where it is given. It is given
by all processes or by none, since they count together. Without any known sample a loss is 0, and so is its gradient.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def processes() -> int:
    """The number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return _AllReduce.forward(ctx, gradient)


def sum_over_processes(x: Tensor) -> Tensor:
    """The sum S of `x` over all processes while training, `x` itself in evaluation.

    A function f(S) then has the gradient that one process with the whole batch would have, f'(S) · dx summed over the
    processes. For that the gradient is summed over the processes as well: process r goes back from w_r · f(S), w_r
    being the weight of its loss (`EpochSampler.weight`), so that the sum is W · f'(S), W being the sum of the weights,
    which is the number of processes; and DDP averages over the processes, which takes the factor W away again.
    """
    return _AllReduce.apply(x) if torch.is_grad_enabled() and processes() > 1 else x


def only_known(x: Tensor, known: Tensor | None = None) -> Tensor:
    """x (N, …) with zeros in the place of the samples that are not `known`."""
    return x if known is None else x * known.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


def samples_per_known(known: Tensor | None = None) -> Tensor | float:
    """The number of samples, of all processes, over the number of the `known` ones.

    Times this, a process's mean over samples of which the others are zeros becomes what, weighted by the processes'
    numbers of samples, is the mean over the known samples of the whole batch.
    """
    if known is None:
        return 1.0
    known = known.float()
    samples, counted = sum_over_processes(torch.stack([torch.ones_like(known).sum(), known.sum()]))
    return samples / counted.clamp(min=1)


def mean_over_known(x: Tensor, known: Tensor | None = None) -> Tensor:
    """The mean of x (N, H, W) over the pixels of the `known` samples."""
    return only_known(x, known).mean() * samples_per_known(known)


def focal(logits: Tensor, mask: Tensor, known: Tensor | None = None, gamma: float = 2.0) -> Tensor:
    """Focal loss, the mean over pixels of (1 − p)^γ · −log p, p being the true class's probability.

    Lin et al., Focal Loss for Dense Object Detection, ICCV 2017.
    """
    log_p = (F.log_softmax(logits.float(), dim=1) * mask).sum(dim=1)
    return -mean_over_known((1 - log_p.exp()) ** gamma * log_p, known)


def cross_entropy(logits: Tensor, mask: Tensor, known: Tensor | None = None) -> Tensor:
    """Mean over pixels of −log p, p being the true class's probability."""
    return F.cross_entropy(logits.float(), only_known(mask, known)) * samples_per_known(known)


def soft_dice(logits: Tensor, mask: Tensor, known: Tensor | None = None, smooth: float = 1.0) -> Tensor:
    """The mean over classes 1 to C − 1 of 1 − soft Dice, whose sums are taken over the whole batch (of all processes).

    Milletari et al., V-Net, 3DV 2016, with the sum of p (not of p²) in the denominator; the mean over the classes but
    for the background as in nnU-Net (Isensee et al., Nature Methods 2021).
    """
    p, truth = only_known(logits.float().softmax(dim=1)[:, 1:], known), only_known(mask[:, 1:].float(), known)
    sums = torch.stack([(p * truth).sum(dim=(0, 2, 3)), p.sum(dim=(0, 2, 3)), truth.sum(dim=(0, 2, 3))])
    overlap, predicted, true = sum_over_processes(sums)
    return (1 - (2 * overlap + smooth) / (predicted + true + smooth)).mean()


def dice_semimetric(student: Tensor, teacher: Tensor, smooth: float = 1.0) -> Tensor:
    """Dice semimetric loss Σ|p − q| / (Σp + Σq + smooth) of the class probabilities p of `student` and q of `teacher`.

    Takes logits (N, C, H, W). The mean over classes 1 to C − 1, the sums of each being over the whole batch (of all
    processes). Wang et al., Dice Semimetric Losses, MICCAI 2023, arXiv 2303.16296: Δ_DML,1 = 1 − (‖p + q‖₁ − ‖p − q‖₁)
    / ‖p + q‖₁. It is least where p is q, while soft Dice is least at a p of 0 or 1 whatever q is; where q is 0 or 1
    everywhere, it is the soft Dice loss.
    """
    p, q = (logits.float().softmax(dim=1)[:, 1:] for logits in (student, teacher))
    sums = torch.stack([(p - q).abs().sum(dim=(0, 2, 3)), (p + q).sum(dim=(0, 2, 3))])
    apart, total = sum_over_processes(sums)
    return (apart / (total + smooth)).mean()


def segmentation(logits: Tensor, mask: Tensor, known: Tensor | None = None) -> Tensor:
    """The loss against the truth: half focal loss (γ = 2), half soft Dice."""
    return 0.5 * focal(logits, mask, known) + 0.5 * soft_dice(logits, mask, known)


def kl(student: Tensor, teacher: Tensor, temperature: float, known: Tensor | None = None, focus: float = 0.0) -> Tensor:
    """Mean over pixels of KL(teacher ‖ student) of the class probabilities at `temperature`, times its square.

    Takes logits (N, C, H, W). Hinton et al., Distilling the Knowledge in a Neural Network, arXiv 1503.02531.

    `focus` f from 0 to 1 makes it a weighted mean, so that background beyond doubt does not drown the boundary: a pixel
    weighs 1 − f · min(p₀, q₀), p₀ and q₀ being the student's and the teacher's probability of the background. The
    weights are constants whose mean over the whole batch (of all processes) is made one, unless they sum to less than
    one pixel. Edges and bodies of objects in losses of their own: Liu et al., BPKD, arXiv 2306.08075.
    """
    log_p = F.log_softmax(student.float() / temperature, dim=1)
    q = F.softmax(teacher.float() / temperature, dim=1)
    divergence = F.kl_div(log_p, q, reduction="none").sum(dim=1)
    if not focus:
        return mean_over_known(divergence, known) * temperature**2
    weight = only_known(1 - focus * torch.minimum(log_p[:, 0].exp(), q[:, 0]).detach(), known)
    pixels, total = sum_over_processes(torch.stack([weight.new_tensor(weight.numel()), weight.sum()]))
    return (weight * divergence).mean() * pixels / total.clamp(min=1) * temperature**2


def margin(logits: Tensor) -> Tensor:
    """By how much each class's logit exceeds the background's, (N, C − 1, H, W): all that probabilities depend on."""
    return logits[:, 1:].float() - logits[:, :1].float()


def logits_of(margin: Tensor) -> Tensor:
    """Logits (N, C, H, W) with a given `margin` (N, C − 1, H, W), whose mean over the classes is 0."""
    logits = torch.cat([torch.zeros_like(margin[:, :1]), margin], dim=1)
    return logits - logits.mean(dim=1, keepdim=True)
