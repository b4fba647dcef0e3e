"""Shared memory in which a loader's workers hand over their batches, filled over and over.

Torch sends each tensor of a worker in new shared memory, whose pages the system has to clear, and its handle through a
socket: with two workers on two cores that took half as long as everything else (`benchmarks/store.py`). Here the
training process lays out some blocks for each worker once, a ring; the worker fills them in turn and sends only where
in a block the tensors lie.
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

_ring: "SharedMemoryRing | None" = None
"""The ring that this process fills, if it is a worker."""


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
class TensorLocation:
    """Stands for a tensor that lies in a block."""

    offset: int
    """Bytes from the block's start."""
    shape: torch.Size
    dtype: torch.dtype


@dataclass(frozen=True)
class PackedBatch:
    """A batch on its way from a worker: with locations instead of the tensors that lie in one of its blocks."""

    worker: int
    block: int
    batch: Any


class SharedMemoryRing:
    """A worker's blocks (number, size), each filled with one batch, in turn."""

    def __init__(self, worker: int, blocks: Tensor):
        self.worker, self.blocks = worker, blocks
        self.turn = 0
        """The block that is filled now."""
        self.used = 0
        """Bytes of it that are taken."""

    def empty_array(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """An array in the block whose turn it is; elsewhere if that is full."""
        begin, size = self.used, math.prod(shape) * dtype.itemsize
        if begin + size > self.blocks.shape[1]:
            return np.empty(shape, dtype)
        self.used += aligned(size)
        return self.blocks[self.turn, begin : begin + size].numpy().view(dtype).reshape(shape)

    def pack(self, batch: Any) -> PackedBatch:
        """The batch as it is sent; the next one goes into the next block."""
        block, turn = self.blocks[self.turn], self.turn

        def locate(tensor: Tensor) -> TensorLocation | Tensor:
            offset = tensor.data_ptr() - block.data_ptr()
            inside = 0 <= offset < len(block) and tensor.is_contiguous()
            return TensorLocation(offset, tensor.shape, tensor.dtype) if inside else tensor

        self.turn, self.used = (turn + 1) % len(self.blocks), 0
        return PackedBatch(self.worker, turn, recursively_apply(locate, batch))


def open_ring(worker: int, blocks: Tensor) -> None:
    """Make this process the worker that fills its share of blocks (workers, number, size)."""
    global _ring
    _ring = SharedMemoryRing(worker, blocks[worker])


def empty_array(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array to be filled for a batch; in a worker with a ring it lies there."""
    dtype = np.dtype(dtype)
    return np.empty(shape, dtype) if _ring is None else _ring.empty_array(shape, dtype)


def pack(batch: Any) -> Any:
    """A loader's `collate_fn` for a dataset that makes whole batches."""
    return batch if _ring is None else _ring.pack(batch)


def unpack(packed: Any, blocks: Tensor | None) -> Any:
    """The batch that a worker packed, its tensors views of the blocks; anything else as it is."""
    if not isinstance(packed, PackedBatch):
        return packed
    block = blocks[packed.worker, packed.block]

    def view(location: TensorLocation) -> Tensor:
        size = location.shape.numel() * location.dtype.itemsize
        return block[location.offset : location.offset + size].view(location.dtype).view(location.shape)

    return recursively_apply(view, packed.batch, test_type=lambda x: isinstance(x, TensorLocation))
