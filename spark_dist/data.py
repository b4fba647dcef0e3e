"""From a slice store to batches on the training device.

Which slice is seen when, and how it is oriented, is a function of (seed, epoch, slice): nothing here has a state that
a checkpoint would need. A sample is named by its key = row in the slice table × 8 + orientation, and the teacher cache
uses the same keys.
"""

import hashlib
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from multiprocessing import forkserver
from queue import Full, Queue
from threading import Event, Thread
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from accelerate.utils import recursively_apply
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from data_tools.errors import UserError
from data_tools.location import finished
from data_tools.shards import SliceReader
from data_tools.store import TASKS, Store
from data_tools.workers import cores, end_with_parent

from .blocks import aligned, empty_array, open_outbox, packed, shared_blocks, unpacked

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What asks a job to save its state and end."""
ORIENTATIONS = 8
"""The dihedral group D4: orientation = quarter turns + 4 × (flipped left to right first)."""
UPRIGHT = (0, 2, 4, 6)
"""The orientations without quarter turns, which keep the sides of a rectangle."""
PREFETCHED, AHEAD = 2, 2
"""Batches that are asked of each worker beforehand, and that wait in the training process."""
TURNS = ((0, None), (1, 0), (0, -1), (1, 1), (0, 1), (1, None), (0, 0), (1, -1))
"""Each orientation as a transposition, or none, and then OpenCV's code of a flip (0 rows, 1 columns, −1 both)."""


@dataclass(frozen=True)
class Crop:
    """A window of fixed size in the plane of a slice, off the slice's centre by `shift` pixels (rows, columns).

    Where it reaches beyond the slice, it is filled with the intensity that maps to −1 and with background.
    """

    size: tuple[int, int]
    shift: tuple[int, int] = (0, 0)

    def overlap(self, plane: tuple[int, int]) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
        """The part of a slice of size `plane` that the crop covers, and where in the crop that part lies."""
        inside, placed = [], []
        for length, size, shift in zip(plane, self.size, self.shift, strict=True):
            start = (length - size) // 2 + shift
            low, high = max(start, 0), min(start + size, length)
            inside.append(slice(low, max(low, high)))
            placed.append(slice(low - start, max(low, high) - start))
        return tuple(inside), tuple(placed)

    def of(self, image: np.ndarray, fill: float) -> np.ndarray:
        """The crop of a slice (H, W): a view of it, or a copy with `fill` where the crop reaches beyond."""
        inside, placed = self.overlap(image.shape)
        cropped = image[inside]
        if cropped.shape == self.size:
            return cropped
        filled = np.full(self.size, fill, image.dtype)
        filled[placed] = cropped
        return filled


def orient(image: np.ndarray, orientation: int) -> np.ndarray:
    """An image (H, W) in one of the eight orientations, perhaps as a view.

    OpenCV goes through an image in blocks; a copy of NumPy's `rot90` takes ten times as long.
    """
    transposed, flip = TURNS[orientation]
    if transposed:
        image = cv2.transpose(image)
    return image if flip is None else cv2.flip(image, flip)


@dataclass(frozen=True)
class SliceTable:
    """The slices of some cases, as arrays rather than objects, so that workers share their memory."""

    store: Store
    cases: tuple[str, ...]
    case: np.ndarray
    """(n,) position of each slice's case in `cases`."""
    slice: np.ndarray
    """(n,) each slice's index in its case."""

    def __len__(self) -> int:
        return len(self.case)

    def name(self, row: int) -> str:
        """A slice as a person would name it."""
        return f"{self.cases[self.case[row]]} slice {self.slice[row]}"

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the sources, windows and places of all slices."""
        facts = [[name, c.source, c.window, c.shape] for name in self.cases for c in [self.store.cases[name]]]
        digest = hashlib.sha256(json.dumps([facts, self.store.attributes["labels"]], sort_keys=True).encode())
        digest.update(np.stack([self.case, self.slice]).astype(np.int64).tobytes())
        return digest.hexdigest()[:16]


def slice_table(store: Store, split: str, part: str, task: str, slices: str = "labelled") -> SliceTable:
    """The slices of one part of a split: those with the task's target (`labelled`) or `all`.

    Raises `UserError` if there is none.
    """
    cases = tuple(store.split(split, part))
    rows = [
        (position, z)
        for position, name in enumerate(cases)
        for z in (store.cases[name].task_slices(task) if slices == "labelled" else range(store.cases[name].shape[0]))
    ]
    if not rows:
        raise UserError(
            f"{store.path}: the {part} part of split '{split}' has no slice with {task}; "
            "make another split (spark-data split --name), or train the other task"
        )
    case, index = np.array(rows, dtype=np.int32).T
    return SliceTable(store=store, cases=cases, case=case, slice=index)


class VoxelReader:
    """Reads voxels of a store.

    Arrays are opened when they are first needed, in the process that needs them: threads do not survive a fork, and
    handles are left behind when this object is sent to a worker.
    """

    def __init__(self, store: Store):
        self.path = store.path
        self._forget()

    def _forget(self) -> None:
        self._readers: dict[tuple[str, str], SliceReader] = {}
        self._threads: ThreadPoolExecutor | None = None
        self._process = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.path = state["path"]
        self._forget()

    def slices(self, case: str, kind: str) -> SliceReader:
        """What reads slices of the `image` or `label` of a case."""
        if self._process != os.getpid():
            self._forget()
        if (case, kind) not in self._readers:
            self._readers[case, kind] = SliceReader(self.path / "cases" / case / kind)
        return self._readers[case, kind]

    def each(self, work: Callable[[int], None], count: int) -> None:
        """work(0) … work(count − 1), on this process's share of the cores; in a loader's worker one after the other."""
        threads = max(1, min(decoding_threads(), count))

        def share(first: int) -> None:
            for n in range(first, count, threads):
                work(n)

        if threads > 1 and self._threads is None:
            self._threads = ThreadPoolExecutor(decoding_threads() - 1, thread_name_prefix="decode")
        others = [self._threads.submit(share, first) for first in range(1, threads)]
        share(0)
        for other in others:
            other.result()

    def case(self, case: str, kind: str) -> np.ndarray:
        """All voxels of a case, (Z, H, W)."""
        return finished(self.slices(case, kind).array.read(), f"{self.path}: case {case}")


def decoding_threads() -> int:
    """How many threads of this process may decode at a time."""
    if get_worker_info() is not None:
        return 1
    return max(1, min(8, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


class SliceDataset(Dataset):
    """Batches of oriented crops by their keys. One item is a whole batch, read at once."""

    def __init__(self, table: SliceTable, crop: Crop, cache: Any = None):
        self.table = table
        self.crop = crop
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
        dtype = np.result_type(*(fact.dtype for fact in facts))
        images, labels = (empty_array((len(keys), *self.crop.size), kind) for kind in (dtype, np.uint8))
        windows, own_keys = empty_array((len(keys), 2), np.float32), empty_array(keys.shape, np.int64)
        windows[:], own_keys[:] = [fact.window for fact in facts], keys

        def fill(n: int) -> None:
            (image, label), orientation = reads[n], keys[n] % ORIENTATIONS
            images[n] = orient(self.crop.of(image(), np.floor(facts[n].window[0])), orientation)
            labels[n] = orient(self.crop.of(label(), 0), orientation)

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
        shapes = {"image": (self.crop.size, dtype), "label": (self.crop.size, np.uint8)}
        shapes |= {"window": ((2,), np.float32), "keys": ((), np.int64)}
        if self.cache is not None:
            shapes |= self.cache.arrays()
        return sum(aligned(n * math.prod(shape) * np.dtype(kind).itemsize) for shape, kind in shapes.values())


def permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order in which an epoch visits n slices."""
    return np.random.default_rng([seed, 0, epoch]).permutation(n)


def orientations(n: int, seed: int, epoch: int, choices: Sequence[int]) -> np.ndarray:
    """Each slice's orientation in an epoch, (n,).

    A slice goes through all `choices` in a random order once per block of len(choices) epochs, so that each draw is
    uniform and everything that can be seen has been seen after the first block.
    """
    block, position = divmod(epoch, len(choices))
    orders = np.random.default_rng([seed, 1, block]).permuted(np.tile(np.asarray(choices), (n, 1)), axis=1)
    return orders[:, position]


def epoch_keys(n: int, seed: int, epoch: int, choices: Sequence[int]) -> np.ndarray:
    """The keys of the n samples of an epoch, in its order."""
    order = permutation(n, seed, epoch)
    return order * ORIENTATIONS + orientations(n, seed, epoch, choices)[order]


def visited(n: int, seed: int, epochs: Iterable[int], choices: Sequence[int]) -> np.ndarray:
    """The keys of all samples that some epochs see of n slices, in the order in which they are first seen."""
    keys = np.concatenate([epoch_keys(n, seed, epoch, choices) for epoch in epochs])
    return keys[np.sort(np.unique(keys, return_index=True)[1])]


class EpochSampler:
    """Yields this process's share of each part of each global batch of an epoch, as keys.

    An epoch is cut into ceil(n / batch_size) batches whose sizes differ by one at the most, each batch into
    `accumulate` parts likewise, and each part into the processes' shares: no slice is dropped or repeated, and no batch
    is a tiny remainder. Parts do not depend on the number of processes.
    """

    def __init__(
        self,
        n: int,
        batch_size: int,
        seed: int,
        choices: Sequence[int],
        rank: int = 0,
        world: int = 1,
        accumulate: int = 1,
    ):
        self.n, self.seed, self.choices, self.rank, self.world = n, seed, tuple(choices), rank, world
        self.accumulate = accumulate
        self.steps = -(-n // batch_size)
        if n // self.steps // accumulate < world:
            parts = f", each in {accumulate} parts," if accumulate > 1 else ""
            raise UserError(
                f"{n} training slices in batches of {batch_size}{parts} leave some of {world} processes without a "
                "slice; use fewer processes or a larger batch_size"
            )
        self.epoch = 0
        self.start = 0

    @property
    def largest(self) -> int:
        """The most slices that this process has at a time."""
        part = math.ceil(math.ceil(self.n / self.steps) / self.accumulate)
        return math.ceil(part / self.world)

    def __len__(self) -> int:
        return (self.steps - self.start) * self.accumulate

    def __iter__(self) -> Iterator[list[int]]:
        keys = epoch_keys(self.n, self.seed, self.epoch, self.choices)
        for step in range(self.start, self.steps):
            low, high = self.n * step // self.steps, self.n * (step + 1) // self.steps
            for part in np.array_split(keys[low:high], self.accumulate):
                yield np.array_split(part, self.world)[self.rank].tolist()

    def weight(self, part: int) -> float:
        """What this process's mean loss over a part counts in the average over processes and over the batch's parts,
        so that it is the global batch's mean. Parts are counted through the epoch."""
        step, place = divmod(part, self.accumulate)
        size = self.n * (step + 1) // self.steps - self.n * step // self.steps
        part = size // self.accumulate + (place < size % self.accumulate)
        share = part // self.world + (self.rank < part % self.world)
        return share * self.world * self.accumulate / size


def training_loader(dataset: SliceDataset, sampler: EpochSampler, workers: int) -> "Ahead":
    """Batches in the sampler's order, read ahead. Workers are started fresh, never forked (see `VoxelReader`).

    A batch is good until the next one is taken. Signals to stop are for the training process: what starts the workers
    blocks them, and the workers inherit that.
    """
    blocks = None
    if workers:
        blocks = shared_blocks(workers, blocks_in_use(workers), dataset.batch_bytes(sampler.largest))
        # Imported once for all workers; this starts no threads.
        forkserver.set_forkserver_preload(["spark_dist.data"])
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        forkserver.ensure_running()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=packed,
        num_workers=workers,
        prefetch_factor=PREFETCHED if workers else None,
        persistent_workers=workers > 0,
        multiprocessing_context="forkserver" if workers else None,
        worker_init_fn=partial(start_worker, blocks=blocks),
    )
    return Ahead(loader, blocks)


def blocks_in_use(workers: int) -> int:
    """The most of one worker's batches that are wanted at a time: those asked of it beforehand, and its share (workers
    take turns) of those that wait, of one that has just arrived and of one that is computed on."""
    return PREFETCHED + -(-(AHEAD + 2) // workers)


def start_worker(worker: int, blocks: Tensor) -> None:
    """What a loader's worker does first."""
    end_with_parent()
    open_outbox(worker, blocks)


class Ahead:
    """A loader whose next batches are read by a thread while the one before is computed on.

    What comes out is pinned where there is a GPU.
    """

    def __init__(self, loader: DataLoader, blocks: Tensor | None = None):
        self.loader, self.blocks = loader, blocks
        self.batch_sampler, self.dataset = loader.batch_sampler, loader.dataset
        self.waited = 0.0
        """Seconds for which a batch was waited for."""

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        # Before the thread starts: a loader draws its seed from the global random numbers.
        batches = iter(self.loader)
        queue: Queue = Queue(maxsize=AHEAD)
        left = Event()
        gpu = torch.cuda.current_device() if torch.cuda.is_available() else None

        def read() -> None:
            try:
                if gpu is not None:
                    torch.cuda.set_device(gpu)  # a thread's own setting
                for parcel in batches:
                    batch = unpacked(parcel, self.blocks)
                    if gpu is not None:
                        batch = recursively_apply(Tensor.pin_memory, batch)
                    if put((batch, None)):
                        return
                put((None, None))
            except BaseException as error:
                put((None, error))

        def put(item: tuple) -> bool:
            """Hand over a batch; whether nobody wants it any more."""
            while not left.is_set():
                with suppress(Full):
                    queue.put(item, timeout=0.1)
                    return False
            return True

        thread = Thread(target=read, daemon=True)
        thread.start()
        try:
            while True:
                start = time.perf_counter()
                batch, error = queue.get()
                self.waited += time.perf_counter() - start
                if error is not None:
                    raise error
                if batch is None:
                    return
                yield batch
        finally:
            left.set()
            thread.join()


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


def to_device(raw: dict[str, Any], task: str, device: torch.device) -> Batch:
    """Window and one-hot a batch on the training device: what travels there are integers."""
    targets, damaged = raw["entries"] or (None, ())
    return Batch(
        image=windowed(raw["image"].to(device, non_blocking=True), raw["window"].to(device, non_blocking=True)),
        mask=one_hot(raw["label"].to(device, non_blocking=True), task),
        index=raw["keys"].to(device, non_blocking=True) // ORIENTATIONS,
        keys=raw["keys"].numpy().copy(),
        targets=targets and {name: t.to(device, non_blocking=True) for name, t in targets.items()},
        damaged=damaged,
    )


def support_set(table: SliceTable, crop: Crop, task: str, size: int, seed: int) -> tuple[Tensor, Tensor, list[str]]:
    """Slices for a network that is shown examples: images and masks (S, 1, H, W), and the slices' names.

    `size` training slices, or all if there are fewer, drawn by the seed.
    """
    rows = np.sort(np.random.default_rng([seed, 2]).permutation(len(table))[:size])
    raw = SliceDataset(table, crop).__getitems__(rows * ORIENTATIONS)
    batch = to_device(raw, task, torch.device("cpu"))
    return batch.image, batch.mask[:, 1:], [table.name(row) for row in rows]


def windowed(image: Tensor, window: Tensor) -> Tensor:
    """Intensities (N, H, W) to (N, 1, H, W) in [−1, 1], where window (N, 2) holds what becomes −1 and 1."""
    low, high = window[:, 0, None, None], window[:, 1, None, None]
    # In place, as fresh memory costs more than the arithmetic.
    result = image.to(torch.float32, copy=True).sub_(low).div_(high - low)
    return result.clamp_(0, 1).mul_(2).sub_(1).unsqueeze(1)


def one_hot(label: Tensor, task: str) -> Tensor:
    """Stored labels (N, H, W) to (N, 2, H, W) float: background, target."""
    target = label >= min(TASKS[task])
    return torch.stack([~target, target], dim=1).float()
