"""Batches handed over in shared memory."""

import pickle

import numpy as np
import pytest
import torch

from data_tools.errors import UserError
from spark_dist.data.cache import Entries
from spark_dist.data.shared_memory import SharedMemoryRing, shared_blocks, unpack


def batch_in(ring: SharedMemoryRing, value: int) -> dict:
    """A nested batch of which some lies in the ring, and some does not."""
    arrays = [ring.empty_array(shape, np.dtype(kind)) for shape, kind in (((3, 5), "i2"), ((7,), "u1"), ((2, 2), "f4"))]
    for array in arrays:
        array[...] = value
    image, label, target = map(torch.from_numpy, arrays)
    return {"image": image, "label": label, "own": torch.tensor([value]), "entries": Entries({"t": target}, (value,))}


def same(a: dict, b: dict) -> bool:
    tensors = [(a[k], b[k]) for k in ("image", "label", "own")] + [(a["entries"].arrays["t"], b["entries"].arrays["t"])]
    return all(torch.equal(x, y) and x.dtype == y.dtype for x, y in tensors) and a["entries"][1] == b["entries"][1]


def test_a_batch_is_filled_in_place_and_comes_out_as_it_went_in():
    blocks = shared_blocks(2, 3, 192)
    ring = SharedMemoryRing(1, blocks[1])
    for value in range(7):
        batch = batch_in(ring, value)
        packed = ring.pack(batch)
        assert (packed.worker, packed.block) == (1, value % 3)
        received = unpack(pickle.loads(pickle.dumps(packed)), blocks)
        assert same(batch, received)
        assert received["image"].data_ptr() == batch["image"].data_ptr()
    assert not blocks[0].any()


def test_earlier_batches_stay_until_their_block_comes_round():
    blocks = shared_blocks(1, 3, 192)
    ring = SharedMemoryRing(0, blocks[0])
    received = [unpack(ring.pack(batch_in(ring, value)), blocks) for value in range(5)]
    assert [int(batch["image"][0, 0]) for batch in received] == [3, 4, 2, 3, 4]


@pytest.mark.parametrize("size", [64, 128])
def test_what_has_no_room_is_sent_as_it_is(size):
    blocks = shared_blocks(1, 2, size)
    ring = SharedMemoryRing(0, blocks[0])
    for value in range(4):
        batch = batch_in(ring, value)
        assert same(batch, unpack(ring.pack(batch), blocks))


def test_a_batch_that_was_not_packed_is_left_alone():
    batch = {"image": torch.zeros(2)}
    assert unpack(batch, None) is batch


def test_shared_memory_without_room_is_an_error_that_says_what_to_do():
    with pytest.raises(UserError, match=r"no room for .*--workers"):
        shared_blocks(1, 4, 2**50)
