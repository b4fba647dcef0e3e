"""Batches read ahead, in workers and in a thread."""

import math
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from multiprocessing import forkserver
from queue import Full, Queue
from threading import Event, Thread

import torch
from accelerate.utils import recursively_apply
from torch import Tensor
from torch.utils.data import DataLoader

from data_tools.workers import STOP_SIGNALS, end_with_parent

from .batches import RawBatch, SliceDataset
from .order import EpochSampler
from .shared_memory import open_ring, pack, shared_blocks, unpack

PREFETCH_FACTOR = 2
"""Batches that are asked of each worker beforehand."""
QUEUE_SIZE = 2
"""Batches that wait in the training process."""


def training_loader(dataset: SliceDataset, sampler: EpochSampler, workers: int) -> "Prefetcher":
    """Batches in the sampler's order, read ahead. Workers are started fresh, never forked (see `VoxelReader`).

    A batch is good until the next one is taken. Signals to stop are for the training process: what starts the workers
    blocks them, and the workers inherit that.
    """
    blocks = None
    if workers:
        blocks = shared_blocks(workers, blocks_per_worker(workers), dataset.batch_bytes(sampler.largest_share))
        # Imported once for all workers; this starts no threads.
        forkserver.set_forkserver_preload(["spark_dist.data.batches"])
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        forkserver.ensure_running()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=pack,
        num_workers=workers,
        prefetch_factor=PREFETCH_FACTOR if workers else None,
        persistent_workers=workers > 0,
        multiprocessing_context="forkserver" if workers else None,
        worker_init_fn=partial(start_worker, blocks=blocks),
    )
    return Prefetcher(loader, blocks)


def blocks_per_worker(workers: int) -> int:
    """How many blocks a worker needs so that none is filled anew while its batch is still wanted."""
    in_worker = PREFETCH_FACTOR
    in_training_process = QUEUE_SIZE + 2  # besides those in the queue, one that is to go there and one in use
    # Workers take turns, so that each has made an even share of the latter.
    return in_worker + math.ceil(in_training_process / workers)


def start_worker(worker: int, blocks: Tensor) -> None:
    """Prepare this process to be a loader's worker."""
    end_with_parent()
    open_ring(worker, blocks)


class Prefetcher:
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

    def __iter__(self) -> Iterator[RawBatch]:
        # Before the thread starts: a loader draws its seed from the global random numbers.
        batches = iter(self.loader)
        queue: Queue = Queue(maxsize=QUEUE_SIZE)
        left = Event()
        gpu = torch.cuda.current_device() if torch.cuda.is_available() else None

        def read() -> None:
            try:
                if gpu is not None:
                    torch.cuda.set_device(gpu)  # a thread's own setting
                for packed in batches:
                    batch = unpack(packed, self.blocks)
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
