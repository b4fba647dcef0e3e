"""The prediction of a network for the slices of a case."""

import numpy as np
import torch
from torch import nn

from data_tools.store import Case
from spark_dist.data.batches import windowed
from spark_dist.data.views import SliceSpec


@torch.no_grad()
def probabilities(
    network: nn.Module, image: np.ndarray, case: Case, spec: SliceSpec, batch_size: int = 16
) -> np.ndarray:
    """The target's probability in every voxel of slices of a case, (Z, H, W) float32; 0 outside the crop.

    `image` (Z, H, W) in the store's intensities. The network, on whichever device, is put into eval mode and left as it
    was.
    """
    device, crop = next(network.parameters()).device, spec.crop
    inside, placed = crop.overlap(case.shape[1:])
    result = np.zeros((len(image), *case.shape[1:]), np.float32)
    window = torch.tensor(case.window, dtype=torch.float32, device=device)
    was_training = network.training
    network.eval()
    for start in range(0, len(image), batch_size):
        part = image[start : start + batch_size]
        crops = np.full((len(part), *crop.size), np.floor(case.window[0]), image.dtype)
        crops[:, *placed] = part[:, *inside]
        batch = windowed(torch.from_numpy(crops).to(device), window.expand(len(part), 2))
        target = network(batch).logits.float().softmax(dim=1)[:, 1].cpu().numpy()
        result[start : start + len(part), *inside] = target[:, *placed]
    network.train(was_training)
    return result
