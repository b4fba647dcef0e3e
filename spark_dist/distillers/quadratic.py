"""The distance of two maps, one seen through a 1×1 convolution and batch norm, from second moments.

For a student's map x (C channels) and a teacher's t (D channels), the plain way forms y = BN(W x), which has the
teacher's width at the student's size, and compares: Σ over pixels of ‖y − t‖². But y = A (x − m) + b with
A = diag(a) W, and the batch's mean m and covariance Σ of x give the norm's statistics, which are W m and the diagonal
of W Σ Wᵀ. So

    Σ ‖y − t‖² = tr(A S Aᵀ) + 2 bᵀA Σu + n ‖b‖² − 2 tr(A K) − 2 bᵀΣt + Σ ‖t‖²,    u = x − m, S = Σ u uᵀ, K = Σ u tᵀ,

where all but S (C×C) and K (C×D) are vectors or numbers, those of the teacher alone being constants. Average pooling
is linear, commutes with A, and leaves b as it is, so the same holds for pooled maps. Values and gradients are those of
the plain way, up to rounding.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from spark_dist import losses

from .features import full, level_weights, pooled_levels, size_of


class Centred(NamedTuple):
    """A student's map less its mean over batch and pixels, and what batch norm must know of it."""

    map: Tensor
    """(N, C, H, W), less `mean`."""
    mean: Tensor
    """(C,), a constant."""
    rest: Tensor
    """(C,): the mean of `map`. It is zero, but has the gradient that `mean` has not."""
    covariance: Tensor
    """(C, C), divided by the number of values."""


def centred(x: Tensor) -> Centred:
    """Of a map (N, C, H, W) in float32 or float64."""
    # Around the mean, little is lost where moments are subtracted from each other; any constant near it would do.
    mean = x.detach().mean(dim=(0, 2, 3))
    x = x - mean.view(1, -1, 1, 1)
    with torch.autocast(x.device.type, enabled=False):
        return Centred(x, mean, x.mean(dim=(0, 2, 3)), gram(x) / (x.numel() / x.shape[1]))


def gram(x: Tensor) -> Tensor:
    """Σ over samples and pixels of x xᵀ, (C, C), of a map (N, C, H, W)."""
    return products(x, x)


def products(x: Tensor, y: Tensor) -> Tensor:
    """Σ over samples and pixels of x yᵀ, (C, D), of maps (N, C, …) and (N, D, …)."""
    return torch.bmm(x.flatten(2), y.flatten(2).transpose(1, 2)).sum(dim=0)


def pooled_columns(x: Tensor, coarse: Tensor | None = None) -> Tensor | None:
    """A map's poolings (see `pooled_levels`), without the map itself, side by side: (N, C, P), if there are any."""
    levels = pooled_levels(x, coarse)[1:]
    return torch.cat([level.flatten(2) for level in levels], dim=2) if levels else None


def column_weights(x: Tensor) -> tuple[float, Tensor]:
    """The weights in `hierarchical_mse` of each pixel of a map (N, C, H, W), and of its pooled columns (P,), in a sum
    over samples."""
    sides = [side for side in (4, 2, 1) if side < min(size_of(x))]
    first, *weights = level_weights(1 + len(sides))
    pooled = [weight / side**2 for weight, side in zip(weights, sides, strict=True) for _ in range(side**2)]
    return first / x[0, 0].numel() / len(x), torch.tensor(pooled, dtype=x.dtype, device=x.device) / len(x)


def power(x: Tensor) -> Tensor:
    """The mean square (N,) of a map (N, C, H, W) and its poolings, weighted as in `hierarchical_mse`."""
    weights = level_weights(len(levels := pooled_levels(full(x))))
    return sum(weight * level.square().mean(dim=(1, 2, 3)) for weight, level in zip(weights, levels, strict=True))


def normalisation(connector: nn.Sequential, student: Centred) -> tuple[Tensor, Tensor]:
    """The connector's effect as an affine map of the centred features, A (D, C) and b (D,): batch statistics in
    training, when the running ones take their step, and running statistics in evaluation."""
    convolution, norm = connector
    dtype = student.map.dtype
    weight = convolution.weight.flatten(1).to(dtype)
    if norm.training:
        together = isinstance(norm, nn.SyncBatchNorm) and losses.processes() > 1
        mean, covariance, offset, count = of_all_processes(student) if together else of_this_process(student)
        # Rounding may leave a variance of zero a little below it.
        variance = ((weight @ covariance) * weight).sum(dim=1).clamp(min=0)
        scale = norm.weight.to(dtype) * (variance + norm.eps).rsqrt()
        shift = norm.bias.to(dtype) + scale * (weight @ offset)
        update_running_statistics(norm, weight @ mean, variance, count)
    else:
        scale = norm.weight.to(dtype) * (norm.running_var.to(dtype) + norm.eps).rsqrt()
        shift = norm.bias.to(dtype) + scale * (weight @ student.mean - norm.running_mean.to(dtype))
    return scale.unsqueeze(1) * weight, shift


def of_this_process(student: Centred) -> tuple[Tensor, Tensor, Tensor, int]:
    """The mean and covariance that batch norm uses, what the centred map's values lie above that mean, and the number
    of values."""
    return student.mean, student.covariance, -student.rest, student.map.numel() // student.map.shape[1]


def of_all_processes(student: Centred) -> tuple[Tensor, Tensor, Tensor, int]:
    """The same for a norm whose statistics are those of the global batch."""
    own = student.map.numel() // student.map.shape[1]
    with torch.enable_grad():  # sums are taken over processes only while gradients are
        count = int(losses.sum_over_processes(student.mean.new_tensor([float(own)])).item())
        mean = losses.sum_over_processes(own / count * student.mean).detach()
        apart = student.mean - mean
        cross = torch.outer(student.rest, apart)
        second = student.covariance + cross + cross.T + torch.outer(apart, apart)
        sums = losses.sum_over_processes(own / count * torch.cat([(student.rest + apart)[None], second]))
    return mean, sums[1:], apart - sums[0], count


@torch.no_grad()
def update_running_statistics(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor, count: int) -> None:
    """As batch norm does after a forward pass over `count` values a channel: the running variance is unbiased."""
    norm.num_batches_tracked.add_(1)
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), norm.momentum)
    unbiased = variance * (count / max(count - 1, 1))
    norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), norm.momentum)


def distance_through(
    connector: nn.Sequential, student: Centred, pooled: Tensor, teacher: Tensor, columns: Tensor | None, power: Tensor
) -> Tensor:
    """`hierarchical_mse` of a student's map, seen through a connector, and a teacher's.

    `pooled` (N, C, h, w) is the student's centred map at the size at which the two are compared; the teacher's map
    (N, D, h, w) has its pooled `columns` (N, D, P), if there are any, and its `power` (N,).
    """
    with torch.autocast(pooled.device.type, enabled=False):
        scales, shift = normalisation(connector, student)
        pixel, weights = column_weights(pooled)
        values = pooled.numel() // pooled.shape[1]
        # The full map's moments are known from the norm's statistics.
        whole = pooled is student.map
        second = pixel * (student.covariance * values if whole else gram(pooled))
        first = pixel * (student.rest * values if whole else pooled.sum(dim=(0, 2, 3)))
        cross = pixel * products(pooled, teacher)
        if columns is None:
            teacher_first = pixel * teacher.sum(dim=(0, 2, 3))
        else:
            own = pooled_columns(pooled)
            weighted = own * weights
            second = second + products(weighted, own)
            first = first + weighted.sum(dim=(0, 2))
            cross = cross + products(weighted, columns)
            # The last column is the map's mean.
            pixels = values // len(pooled)
            teacher_first = pixel * pixels * columns[:, :, -1].sum(dim=0) + (columns * weights).sum(dim=(0, 2))
        squares = (scales @ second * scales).sum() - 2 * (scales * cross.T).sum()
        shifts = (shift * (2 * (scales @ first) + shift - 2 * teacher_first)).sum()
        return (squares + shifts) / len(shift) + power.mean()


def distance(student: Tensor, teacher: Tensor, columns: Tensor | None) -> Tensor:
    """`hierarchical_mse` of two maps (N, C, H, W), the teacher's with its pooled `columns` (N, C, P)."""
    pixel, weights = column_weights(student)
    squares = pixel * (student - teacher).square().sum()
    if columns is not None:
        squares = squares + ((pooled_columns(student) - columns).square() * weights).sum()
    return squares / student.shape[1]
