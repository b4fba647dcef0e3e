"""The name of a teacher cache: a hash of everything that its entries follow from."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data_tools.ownership import fingerprint, mark
from spark_dist.data.cache import CacheLayout, TeacherCache
from spark_dist.distillers.base import Distiller
from spark_dist.networks.base import NetworkOutput, Taps

VERSION = 4


def weights_hash(network: nn.Module) -> str:
    """A hash of a network's parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def probe_targets(
    distiller: Distiller, taps: Taps, crop: tuple[int, int], classes: int = 2
) -> tuple[str, dict[str, list[int]]]:
    """A method's targets for a fixed, random teacher output: a hash of the values, and each target's shape.

    The hash stands for the method and those of its settings that matter to the teacher's side: another loss weight
    leaves a cache valid, another attention gain does not.
    """
    random = np.random.default_rng(0)

    def noise(channels: int, stride: int) -> Tensor:
        return torch.from_numpy(random.standard_normal((1, channels, crop[0] // stride, crop[1] // stride)))

    output = NetworkOutput(noise(classes, 1), noise(*taps.low), noise(*taps.high))
    # Each class fills a band of rows.
    rows = torch.arange(crop[0]) * classes // crop[0] == torch.arange(classes).unsqueeze(1)
    targets = distiller.teacher_targets(output, rows.double().view(1, classes, -1, 1).expand(-1, -1, -1, crop[1]))
    digest = hashlib.sha256()
    for name, values in sorted(targets.items()):
        digest.update(name.encode())
        digest.update(values.cpu().numpy().astype(np.float16).tobytes())
    return digest.hexdigest()[:16], {name: list(values.shape[1:]) for name, values in targets.items()}


def open_cache(root: Path, description: Mapping[str, Any], layout: CacheLayout, memory: int = 0) -> TeacherCache:
    """The cache that belongs to a description, made if it is not there. Opening it counts as its use."""
    facts = {"version": VERSION, **description}
    folder = Path(root).resolve() / fingerprint(facts)  # TensorStore takes no path with `..`
    # The mark first: a folder that bears none is nobody's, and is never removed.
    mark(folder, "cache", **facts)
    (folder / "segments").mkdir(exist_ok=True)
    cache = TeacherCache(folder, layout, memory)
    cache.refresh()
    return cache
