"""The prediction of a network for whole slices."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from spark_dist.data.batches import windowed
from spark_dist.data.views import Crop, SliceSpec

BATCH = 16
"""Slices that go through a network at a time."""
OVERLAP = 0.25
"""Share by which neighbouring windows overlap, where a network is bound to the size of its crop."""


def probabilities(
    network: nn.Module,
    image: np.ndarray,
    window: Sequence[float],
    spec: SliceSpec,
    whole: bool = True,
    slices: Sequence[int] | None = None,
) -> np.ndarray:
    """The probability of each class but the background in every voxel of slices, (C − 1, Z, H, W) float32.

    `image` (Z, H, W) is a volume in the store's intensities, of which `window` become −1 and 1; all of its slices are
    predicted, or some. The whole plane is, or without `whole` the crop of `spec` alone, with 0 outside.
    """
    result, count = None, len(image) if slices is None else len(slices)
    for start, part in class_probabilities(network, image, window, spec, whole, slices=slices):
        if result is None:
            result = np.zeros((part.shape[1] - 1, count, *image.shape[1:]), np.float32)
        result[:, start : start + len(part)] = part[:, 1:].transpose(1, 0, 2, 3)
    return result


def predicted_classes(probabilities: np.ndarray, threshold: float) -> np.ndarray:
    """The class of each voxel (…) uint8, from the probabilities (C − 1, …) of all but the background.

    The most probable class but the background wins if it is at least threshold / (1 − threshold) times as probable as
    the background: at 0.5 this is the most probable class of all, and with two classes the target where its probability
    is at least the threshold.
    """
    if len(probabilities) == 1:
        return (probabilities[0] >= threshold).astype(np.uint8)
    best = probabilities.max(axis=0)
    others = probabilities.sum(axis=0) - best
    return np.where(best >= threshold * (1 - others), 1 + probabilities.argmax(axis=0), 0).astype(np.uint8)


@torch.no_grad()
def class_probabilities(
    network: nn.Module,
    image: np.ndarray,
    window: Sequence[float],
    spec: SliceSpec,
    whole: bool = True,
    slices: Sequence[int] | None = None,
) -> Iterator[tuple[int, np.ndarray]]:
    """The first one's position and the probabilities (N, C, H, W) float32 of each `BATCH` slices (see
    `probabilities`). The network, on whichever device, is in eval mode meanwhile, and then as it was."""
    device, plane = next(network.parameters()).device, image.shape[1:]
    crop = covering(spec.crop, plane, network.stride) if whole else spec.crop
    inside, placed = crop.overlap(plane)
    bound = getattr(network, "bound_to", None)
    was_training = network.training
    network.eval()
    try:
        channels = spec.neighbours(range(len(image)) if slices is None else slices, len(image))
        for start in range(0, len(channels), BATCH):
            part = channels[start : start + BATCH]
            batch = network_input(image, part, window, crop, device)
            logits = in_windows(network, batch, bound) if bound not in (None, crop.size) else network(batch).logits
            found = logits.float().softmax(dim=1).cpu().numpy()
            result = found[:, :, *placed]
            if result.shape[2:] != plane:
                result = np.zeros((*found.shape[:2], *plane), np.float32)
                result[:, 0] = 1
                result[:, :, *inside] = found[:, :, *placed]
            yield start, result
    finally:
        network.train(was_training)


def network_input(
    image: np.ndarray, slices: np.ndarray, window: Sequence[float], crop: Crop, device: torch.device
) -> Tensor:
    """Crops of the `slices` (N, C) of a volume (Z, H, W) as a network is given them: (N, C, rows, columns) in [−1, 1],
    −1 where a crop reaches beyond the plane."""
    inside, placed = crop.overlap(image.shape[1:])
    crops = np.full((*slices.shape, *crop.size), np.floor(window[0]), image.dtype)
    crops[:, :, *placed] = image[:, *inside][slices]
    ends = torch.tensor(window, dtype=torch.float32, device=device)
    return windowed(torch.from_numpy(crops).to(device), ends.expand(len(slices), 2))


def covering(crop: Crop, plane: tuple[int, int], stride: int) -> Crop:
    """A crop that covers a plane: along each axis the training's where that does, else one around the plane's centre
    that is as small as the network's stride and the training's size allow."""
    sizes, shifts = [], []
    for length, size, shift in zip(plane, crop.size, crop.shift, strict=True):
        start = (length - size) // 2 + shift
        covers = start <= 0 and start + size >= length
        sizes.append(size if covers else -(-max(length, size) // stride) * stride)
        shifts.append(shift if covers else 0)
    return Crop(tuple(sizes), tuple(shifts))


def in_windows(network: nn.Module, batch: Tensor, size: tuple[int, int]) -> Tensor:
    """Logits (N, C, H, W) of slices that are larger than the size that a network is bound to, from overlapping windows
    that count most in their middle."""
    from monai.inferers import sliding_window_inference

    return sliding_window_inference(
        batch, size, len(batch), lambda x: network(x).logits, overlap=OVERLAP, mode="gaussian", padding_mode="replicate"
    )


def largest_components(classes: np.ndarray) -> np.ndarray:
    """Classes (Z, H, W) of which each but the background keeps only its largest component; voxels touch by faces, edges
    or corners."""
    from scipy import ndimage

    result = np.zeros_like(classes)
    for number in np.unique(classes[classes > 0]):
        components, _ = ndimage.label(classes == number, np.ones((3,) * classes.ndim))
        sizes = np.bincount(components.ravel())
        result[components == 1 + sizes[1:].argmax()] = number
    return result
