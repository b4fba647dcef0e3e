"""From a slice store to batches on the training device."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .shared_memory import aligned, empty_array
from .slices import SliceTable, VoxelReader
from .views import ORIENTATIONS, SliceSpec, orient


class SliceDataset(Dataset):
    """Batches of oriented crops by their keys. One item is a whole batch, read at once."""

    def __init__(self, table: SliceTable, spec: SliceSpec, cache: Any = None):
        self.table = table
        self.spec = spec
        self.cache = cache
        self.reader = VoxelReader(table.store)

    def __getitems__(self, keys: Sequence[int]) -> dict[str, Any]:
        """`keys` (N,) → image (N, H, W) in the store's intensities, label (N, H, W) uint8, window (N, 2), keys (N,),
        and what the teacher cache has of them (`teacher_cache.Entries`)."""
        keys = np.asarray(keys, dtype=np.int64)
        facts, reads = [], []
        for row in keys // ORIENTATIONS:
            name, what = self.table.cases[self.table.case[row]], f"{self.table.store.path}: {self.table.name(row)}"
            facts.append(self.table.store.cases[name])
            z = int(self.table.slice[row])
            reads.append([self.reader.slices(name, kind).start(z, what) for kind in ("image", "label")])
        cached = self.cache.start_reading(keys) if self.cache is not None else None
        crop, dtype = self.spec.crop, np.result_type(*(fact.dtype for fact in facts))
        images, labels = (empty_array((len(keys), *crop.size), kind) for kind in (dtype, np.uint8))
        windows, own_keys = empty_array((len(keys), 2), np.float32), empty_array(keys.shape, np.int64)
        windows[:], own_keys[:] = [fact.window for fact in facts], keys

        def fill(n: int) -> None:
            (image, label), orientation = reads[n], keys[n] % ORIENTATIONS
            images[n] = orient(crop.of(image(), np.floor(facts[n].window[0])), orientation)
            labels[n] = orient(crop.of(label(), 0), orientation)

        self.reader.each(fill, len(keys))
        return {
            "image": torch.from_numpy(images),
            "label": torch.from_numpy(labels),
            "window": torch.from_numpy(windows),
            "keys": torch.from_numpy(own_keys),
            "entries": cached(self.reader.each) if cached is not None else None,
        }

    def batch_bytes(self, n: int) -> int:
        """What the arrays of a batch of n slices take, at most."""
        dtype = np.result_type(*(self.table.store.cases[name].dtype for name in self.table.cases))
        size = self.spec.crop.size
        shapes = {"image": (size, dtype), "label": (size, np.uint8)}
        shapes |= {"window": ((2,), np.float32), "keys": ((), np.int64)}
        if self.cache is not None:
            shapes |= self.cache.arrays()
        return sum(aligned(n * math.prod(shape) * np.dtype(kind).itemsize) for shape, kind in shapes.values())


class Batch(NamedTuple):
    """A batch on the training device."""

    image: Tensor
    """(N, 1, H, W) float32 in [−1, 1]."""
    mask: Tensor
    """(N, 2, H, W) float32 one-hot: background, target."""
    index: Tensor
    """(N,) int64 rows in the slice table."""
    keys: np.ndarray
    """(N,) int64."""
    targets: dict[str, Tensor] | None
    """Cached teacher targets as they are stored, or None if they must be computed."""
    damaged: tuple[int, ...] = ()
    """Keys of cached entries that could not be read."""


def to_device(raw: dict[str, Any], spec: SliceSpec, device: torch.device) -> Batch:
    """Window and one-hot a batch on the training device: what travels there are integers."""
    targets, damaged = raw["entries"] or (None, ())
    return Batch(
        image=windowed(raw["image"].to(device, non_blocking=True), raw["window"].to(device, non_blocking=True)),
        mask=one_hot(spec.target(raw["label"].to(device, non_blocking=True))),
        index=raw["keys"].to(device, non_blocking=True) // ORIENTATIONS,
        keys=raw["keys"].numpy().copy(),
        targets=targets and {name: t.to(device, non_blocking=True) for name, t in targets.items()},
        damaged=damaged,
    )


def support_set(table: SliceTable, spec: SliceSpec, size: int, seed: int) -> tuple[Tensor, Tensor, list[str]]:
    """Slices for a network that is shown examples: images and masks (S, 1, H, W), and the slices' names.

    `size` training slices, or all if there are fewer, drawn by the seed.
    """
    rows = np.sort(np.random.default_rng([seed, 2]).permutation(len(table))[:size])
    raw = SliceDataset(table, spec).__getitems__(rows * ORIENTATIONS)
    batch = to_device(raw, spec, torch.device("cpu"))
    return batch.image, batch.mask[:, 1:], [table.name(row) for row in rows]


def windowed(image: Tensor, window: Tensor) -> Tensor:
    """Intensities (N, H, W) to (N, 1, H, W) in [−1, 1], where window (N, 2) holds what becomes −1 and 1."""
    low, high = window[:, 0, None, None], window[:, 1, None, None]
    # In place, as fresh memory costs more than the arithmetic.
    result = image.to(torch.float32, copy=True).sub_(low).div_(high - low)
    return result.clamp_(0, 1).mul_(2).sub_(1).unsqueeze(1)


def one_hot(target: Tensor) -> Tensor:
    """Which pixels are the target, (N, H, W) bool, to (N, 2, H, W) float: background, target."""
    return torch.stack([~target, target], dim=1).float()
