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

from data_tools.errors import UserError
from data_tools.location import first_line
from data_tools.report import bytes_text

ALIGNMENT = 64
"""Bytes. Where an array begins is a multiple of it."""

_outbox: "Outbox | None" = None
"""This process's, if it is a worker."""


def shared_blocks(workers: int, number: int, size: int) -> Tensor:
    """(workers, number, size) uint8 in shared memory. Raises `UserError` if that has no room for it."""
    shape = (workers, number, aligned(size))
    try:
        # As torch's default_collate does it.
        storage = torch.UntypedStorage._new_shared(math.prod(shape))
    except RuntimeError as error:
        raise UserError(
            f"shared memory has no room for {bytes_text(math.prod(shape))} of batches ({first_line(error)}); use fewer "
            "--workers or a smaller --batch-size, or give the container more (docker run --shm-size)"
        ) from None
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, shape)


def aligned(size: int) -> int:
    """A number of bytes, rounded up."""
    return -(-size // ALIGNMENT) * ALIGNMENT


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
        self.used += aligned(size)
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
