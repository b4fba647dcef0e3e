"""Shared memory in which a loader's workers hand over their batches, filled over and over.

Torch sends each tensor of a worker in new shared memory, whose pages the system has to clear, and its handle through a
socket: with two workers on two cores that took half as long as everything else (`benchmarks/store.py`). Here the
training process lays out some blocks for each worker once; a worker fills them in turn and sends only where in a block
its arrays lie.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils import recursively_apply
from torch import Tensor

BLOCK_BYTES = 2**28
"""Size of a block. Only the pages that are written to take memory."""
ALIGNMENT = 64

_outbox: "Outbox | None" = None
"""This process's, if it is a worker."""


def shared_blocks(workers: int, number: int, size: int = BLOCK_BYTES) -> Tensor:
    """(workers, number, size) uint8 in shared memory."""
    # Not `share_memory_`, which writes to every page.
    storage = torch.UntypedStorage._new_shared(workers * number * size)
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, (workers, number, size))


@dataclass(frozen=True)
class Place:
    """Where in a block a tensor lies."""

    offset: int
    shape: torch.Size
    dtype: torch.dtype


@dataclass(frozen=True)
class Parcel:
    """A batch, with places instead of its tensors."""

    worker: int
    block: int
    batch: Any


class Outbox:
    """A worker's blocks (number, size), taken in turn."""

    def __init__(self, worker: int, blocks: Tensor):
        self.worker, self.blocks, self.turn, self.used = worker, blocks, 0, 0

    def array(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Room in the block whose turn it is; a new array if that is full."""
        begin, size = self.used, math.prod(shape) * dtype.itemsize
        if begin + size > self.blocks.shape[1]:
            return np.empty(shape, dtype)
        self.used += -(-size // ALIGNMENT) * ALIGNMENT
        return self.blocks[self.turn, begin : begin + size].numpy().view(dtype).reshape(shape)

    def pack(self, batch: Any) -> Parcel:
        """What is to be sent of a batch; the next one goes into the next block."""
        block, turn = self.blocks[self.turn], self.turn

        def place(tensor: Tensor) -> Place | Tensor:
            offset = tensor.data_ptr() - block.data_ptr()
            inside = 0 <= offset < len(block) and tensor.is_contiguous()
            return Place(offset, tensor.shape, tensor.dtype) if inside else tensor

        self.turn, self.used = (turn + 1) % len(self.blocks), 0
        return Parcel(self.worker, turn, recursively_apply(place, batch))


def open_outbox(worker: int, blocks: Tensor) -> None:
    """Make this process one that fills its share of blocks (workers, number, size)."""
    global _outbox
    _outbox = Outbox(worker, blocks[worker])


def empty_array(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array to be filled for a batch; in a worker with an outbox it lies there."""
    dtype = np.dtype(dtype)
    return np.empty(shape, dtype) if _outbox is None else _outbox.array(shape, dtype)


def packed(batch: Any) -> Any:
    """A loader's `collate_fn` for a dataset that makes whole batches."""
    return batch if _outbox is None else _outbox.pack(batch)


def unpacked(parcel: Any, blocks: Tensor | None) -> Any:
    """The batch of a parcel, whose tensors are views of the blocks; anything else as it is."""
    if not isinstance(parcel, Parcel):
        return parcel
    block = blocks[parcel.worker, parcel.block]

    def view(place: Place) -> Tensor:
        size = place.shape.numel() * place.dtype.itemsize
        return block[place.offset : place.offset + size].view(place.dtype).view(place.shape)

    return recursively_apply(view, parcel.batch, test_type=lambda x: isinstance(x, Place))
