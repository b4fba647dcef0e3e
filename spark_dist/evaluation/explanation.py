"""Maps of where a network looks in a slice: Grad-CAM and attention, at both of its feature maps."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spark_dist.data.views import SliceSpec
from spark_dist.distillers.features import attention_map
from spark_dist.networks.base import NetworkOutput

from .inference import covering, network_input
from .panel import ShownSlice

TAPS = ("low", "high")


def grad_cam(output: NetworkOutput, classes: Sequence[int]) -> dict[str, Tensor]:
    """Grad-CAM of classes at both feature maps, (N, H, W) ≥ 0 of each map's own size: the channels' sum, each weighted
    by the mean over pixels of the gradient by it of the classes' logits, summed over all pixels; 0 where that is
    negative.

    Selvaraju et al., Grad-CAM, ICCV 2017, arXiv 1610.02391, with the score that MONAI's GradCAM takes. MONAI's finds
    feature maps by the names of layers; here they are the network's own output.
    """
    maps = [getattr(output, tap) for tap in TAPS]
    gradients = torch.autograd.grad(output.logits[:, list(classes)].sum(), maps)
    weighted = [(g.mean(dim=(2, 3), keepdim=True) * x).sum(dim=1) for g, x in zip(gradients, maps, strict=True)]
    return dict(zip(TAPS, [F.relu(x).detach() for x in weighted], strict=True))


def explain(network: nn.Module, shown: ShownSlice, spec: SliceSpec, classes: Sequence[int]) -> dict[str, np.ndarray]:
    """Maps (H, W) of a slice by their names: Grad-CAM of some classes, and the attention maps that SPARK's features are
    weighted by, at both taps. They are enlarged bilinearly, and NaN outside the crop of a network that is bound to a
    size, which sees no more. The network is in eval mode meanwhile."""
    plane, device, was_training = shown.image.shape[1:], next(network.parameters()).device, network.training
    crop = spec.crop if getattr(network, "bound_to", None) else covering(spec.crop, plane, network.stride)
    slices = spec.neighbours([shown.position], len(shown.image))
    network.eval()
    try:
        output = network(network_input(shown.image, slices, shown.window, crop, device))
        maps = {f"Grad-CAM, {tap}": found for tap, found in grad_cam(output, classes).items()}
        maps |= {f"attention, {tap}": attention_map(getattr(output, tap).detach()) for tap in TAPS}
    finally:
        network.train(was_training)
    inside, placed = crop.overlap(plane)
    result = {}
    for name, found in maps.items():
        enlarged = F.interpolate(found[None].float(), crop.size, mode="bilinear")[0, 0].cpu().numpy()
        result[name] = np.full(plane, np.nan, np.float32)
        result[name][inside] = enlarged[placed]
    return result
