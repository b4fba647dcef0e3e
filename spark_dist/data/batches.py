"""From a slice store to batches on the training device."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from threading import Lock
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data_tools.labels import Task
from data_tools.shards import PendingSlice, damage_named

from .augmentation import Views
from .cache import Entries, PendingEntries, TeacherCache
from .shared_memory import aligned, empty_array
from .slices import SliceTable, VoxelReader
from .views import SliceSpec


class RawBatch(NamedTuple):
    """A batch as the store has it, on the CPU: what travels to the training device are integers."""

    image: Tensor
    """(N, C, H, W) in the intensities of `window`: a slice and its neighbours (see `SliceSpec.neighbours`)."""
    label: Tensor
    """(N, H, W) uint8; 0 where there is no ground truth."""
    window: Tensor
    """(N, 2) float32: the intensities that become −1 and 1."""
    keys: Tensor
    """(N,) int64."""
    entries: Entries
    """Cached teacher targets."""


class SharedSlice:
    """A slice that several samples of a batch need, fetched and decoded once."""

    def __init__(self, pending: PendingSlice, name: str):
        self._pending, self._name, self._voxels, self._lock = pending, name, None, Lock()

    def read(self) -> np.ndarray:
        """The slice (H, W). Raises `UserError` naming it if it is damaged."""
        with self._lock, damage_named(self._name):
            if self._voxels is None:
                self._voxels = self._pending.read().copy()
            return self._voxels


@dataclass(frozen=True)
class PendingBatch:
    """Slices and cache entries whose reads have been started, and the arrays of the batch that they are put into."""

    task: Task
    views: Views
    names: list[str]
    """(N,) of the slices, for errors."""
    images: list[list[PendingSlice | SharedSlice]]
    """(N, C)"""
    labels: list[PendingSlice | None]
    """None where there is no ground truth."""
    entries: PendingEntries | None
    batch: dict[str, np.ndarray]
    """The arrays of a `RawBatch`, of which `window` and `keys` are filled already."""

    def fill(self, n: int) -> None:
        """Decode sample n. Raises `UserError` naming the slice if it is damaged."""
        row, number = divmod(int(self.batch["keys"][n]), self.views.count)
        with damage_named(self.names[n]):
            # A copy, as what is read is good until the next slice.
            label = None if self.labels[n] is None else self.labels[n].read().copy()
            image = [channel.read() for channel in self.images[n]]
            label = np.zeros(image[0].shape, np.uint8) if label is None else label
            target = self.task.classes_of(label) > 0 if self.views.anywhere else None
            seen = self.views.of(row, number, image, label, self.batch["window"][n], target)
        for channel, plane in enumerate(seen[0]):
            self.batch["image"][n, channel] = plane
        self.batch["label"][n] = seen[1]
        if self.views.in_window:
            self.batch["window"][n] = 0, 1
        if self.entries is not None:
            self.entries.fill(n)


class SliceDataset(Dataset):
    """Batches of views of slices by their keys. One item is a whole batch, read at once."""

    def __init__(
        self, table: SliceTable, spec: SliceSpec, cache: TeacherCache | None = None, views: Views | None = None
    ):
        """`views` are the orientations of the crop unless they are given."""
        self.table = table
        self.spec = spec
        self.task = table.store.task(spec.task)
        self.views = views or Views(spec.crop, "flips")
        self.cache = cache
        self.reader = VoxelReader(table.store)

    def __getitems__(self, keys: Sequence[int]) -> RawBatch:
        """The samples `keys` (N,), and what the teacher cache has of them."""
        pending = self.start(np.asarray(keys, dtype=np.int64))
        self.reader.each(pending.fill, len(keys))
        entries = Entries(None) if self.cache is None else self.cache.finish_reading(pending.entries)
        return RawBatch(**{name: torch.from_numpy(x) for name, x in pending.batch.items()}, entries=entries)

    def start(self, keys: np.ndarray) -> PendingBatch:
        """Have everything fetched that the samples `keys` (N,) need."""
        cases, names, images, labels = [], [], [], []
        shared: dict[tuple[str, int], SharedSlice] = {}
        for row in keys // self.views.count:
            case, z = self.table.cases[self.table.case[row]], int(self.table.slice[row])
            cases.append(self.table.store.cases[case])
            names.append(f"{self.table.store.path}: {self.table.name(row)}")
            with damage_named(names[-1]):
                images.append(self.start_image(case, z, shared))
                known = row < self.table.with_ground_truth
                labels.append(self.reader.slices(case, "label").start(z) if known else None)
        entries = self.cache.start_reading(keys) if self.cache is not None else None
        arrays = self.arrays(np.result_type(*(case.dtype for case in cases)))
        batch = {name: empty_array((len(keys), *shape), dtype) for name, (shape, dtype) in arrays.items()}
        batch["window"][:], batch["keys"][:] = [case.window for case in cases], keys
        return PendingBatch(self.task, self.views, names, images, labels, entries, batch)

    def start_image(
        self, case: str, z: int, shared: dict[tuple[str, int], SharedSlice]
    ) -> list[PendingSlice | SharedSlice]:
        """Have a slice and its neighbours fetched, but for those that are in `shared` already."""
        reader = self.reader.slices(case, "image")
        if not self.spec.context:
            return [reader.start(z)]  # of use to one sample only, which saves a copy
        fetched = []
        for near in self.spec.neighbours([z], self.table.store.cases[case].shape[0])[0].tolist():
            if (case, near) not in shared:
                name = f"{self.table.store.path}: {case} slice {near}"
                with damage_named(name):
                    shared[case, near] = SharedSlice(reader.start(near), name)
            fetched.append(shared[case, near])
        return fetched

    def arrays(self, intensities: np.dtype) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """The arrays of a `RawBatch`: shape a sample and number format."""
        size = self.spec.crop.size
        return {
            "image": ((self.spec.channels, *size), np.dtype(np.float32) if self.views.in_window else intensities),
            "label": (size, np.dtype(np.uint8)),
            "window": ((2,), np.dtype(np.float32)),
            "keys": ((), np.dtype(np.int64)),
        }

    def batch_bytes(self, n: int) -> int:
        """Bytes of the arrays of a batch of n slices, at most."""
        arrays = self.arrays(np.result_type(*(self.table.store.cases[name].dtype for name in self.table.cases)))
        if self.cache is not None:
            arrays |= self.cache.layout.arrays()
        return sum(aligned(n * math.prod(shape) * dtype.itemsize) for shape, dtype in arrays.values())


class Batch(NamedTuple):
    """A batch on the training device."""

    image: Tensor
    """(N, C, H, W) float32 in [−1, 1]: a slice between its neighbours (see `SliceSpec.neighbours`)."""
    mask: Tensor
    """(N, C, H, W) float32 one-hot: background, then the task's regions; background where there is no ground truth."""
    index: Tensor
    """(N,) int64 rows in the slice table."""
    known: Tensor | None
    """(N,) bool: which masks are ground truth; None if all are."""
    keys: np.ndarray
    """(N,) int64."""
    targets: dict[str, Tensor] | None
    """Cached teacher targets as they are stored, or None if they must be computed."""
    damaged: tuple[int, ...] = ()
    """Keys of cached entries that could not be read."""


def to_device(raw: RawBatch, dataset: SliceDataset, device: torch.device) -> Batch:
    """Window and one-hot a batch of a dataset on the training device."""
    image, label, window, keys = (x.to(device, non_blocking=True) for x in raw[:4])
    (targets, damaged), table = raw.entries, dataset.table
    return Batch(
        image=windowed(image, window),
        mask=one_hot(label, dataset.task),
        index=keys // dataset.views.count,
        known=keys // dataset.views.count < table.with_ground_truth if table.with_ground_truth < len(table) else None,
        keys=raw.keys.numpy().copy(),
        targets=targets and {name: t.to(device, non_blocking=True) for name, t in targets.items()},
        damaged=damaged,
    )


def support_set(table: SliceTable, spec: SliceSpec, size: int, seed: int) -> tuple[Tensor, Tensor, list[str]]:
    """Slices for a network that is shown examples: images (S, C, H, W), the class of each of their pixels (S, 1, H, W),
    and the slices' names.

    `size` training slices, or all if there are fewer, drawn by the seed.
    """
    rows = np.sort(np.random.default_rng([seed, 2]).permutation(table.with_ground_truth)[:size])
    dataset = SliceDataset(table, spec, views=Views(spec.crop))
    batch = to_device(dataset.__getitems__(rows), dataset, torch.device("cpu"))
    return batch.image, batch.mask.argmax(dim=1, keepdim=True), [table.name(row) for row in rows]


def windowed(image: Tensor, window: Tensor) -> Tensor:
    """Intensities (N, C, H, W) to float32 in [−1, 1], where window (N, 2) holds what becomes −1 and 1."""
    low, high = window[:, :, None, None, None].unbind(1)
    # In place, as fresh memory costs more than the arithmetic.
    result = image.to(torch.float32, copy=True).sub_(low).div_(high - low)
    return result.clamp_(0, 1).mul_(2).sub_(1)


def one_hot(label: Tensor, task: Task) -> Tensor:
    """Stored labels (N, H, W) to the classes of a task, (N, C, H, W) float."""
    regions = [any_of(label == value for value in values) for values in task.values]
    return torch.stack([~any_of(regions), *regions], dim=1).float()


def any_of(masks: Iterable[Tensor]) -> Tensor:
    """Where any of some masks is true."""
    return reduce(torch.logical_or, masks)
