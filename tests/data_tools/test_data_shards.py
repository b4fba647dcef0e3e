"""Slices read straight from the shards' files."""

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.codecs import BloscCodec, ZstdCodec

from data_tools.creation import create_store
from data_tools.errors import UserError
from data_tools.shards import SliceReader, damage_named
from data_tools.store import write_case

FACTS = {"affine": np.eye(4).tolist(), "spacing": [1, 1, 1], "window": [0, 1], "source": {}}


@pytest.fixture
def case(tmp_path):
    """A case of 70 slices, so that it has two shards, and its voxels."""
    create_store(tmp_path / "s.zarr", {})
    random = np.random.default_rng(0)
    image, label = random.integers(-1000, 1000, (70, 16, 9), np.int16), random.integers(0, 3, (70, 16, 9), np.uint8)
    write_case(tmp_path / "s.zarr", "a", image, label, FACTS)
    return tmp_path / "s.zarr" / "cases" / "a", {"image": image, "label": label}


def read(reader: SliceReader, z: int, name: str = "") -> np.ndarray:
    with damage_named(name):
        return reader.start(z).read()


@given(
    shape=st.tuples(st.integers(1, 130), st.integers(1, 12), st.integers(1, 12)),
    dtype=st.sampled_from(["int16", "float32"]),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=25, deadline=None)
def test_slices_are_those_that_were_written(tmp_path_factory, shape, dtype, seed):
    path = tmp_path_factory.mktemp("store") / "s.zarr"
    create_store(path, {})
    random = np.random.default_rng(seed)
    image = random.normal(0, 1000, shape).astype(dtype)
    label = np.zeros(shape, np.uint8)
    write_case(path, "a", image, label, FACTS)
    for key, voxels in (("image", image), ("label", label)):
        reader = SliceReader(path / "cases" / "a" / key)
        assert reader.direct
        for z in random.permutation(len(image)):
            np.testing.assert_array_equal(read(reader, int(z)), voxels[z])


def test_reads_that_were_started_before_are_right(case):
    folder, voxels = case
    readers = {kind: SliceReader(folder / kind) for kind in voxels}
    reads = [(kind, z, readers[kind].start(z)) for z in (69, 3, 64, 63) for kind in readers]
    for kind, z, pending in reads:
        np.testing.assert_array_equal(pending.read(), voxels[kind][z])


@pytest.mark.parametrize("kind", ["image", "label"])
def test_no_bit_of_a_shard_can_change_unseen(case, kind):
    folder, voxels = case
    shard = folder / kind / "c" / "1" / "0" / "0"
    whole = shard.read_bytes()
    random = np.random.default_rng(1)
    for place in [*random.integers(0, len(whole), 40), len(whole) - 1]:
        bad = bytearray(whole)
        bad[place] ^= 1 << random.integers(8)
        shard.write_bytes(bad)
        reader, damaged = SliceReader(folder / kind), 0
        for z in range(64, 70):
            try:
                found = read(reader, z, f"slice {z}")
            except UserError as error:
                damaged += str(error).startswith(f"slice {z} is damaged")
            else:
                np.testing.assert_array_equal(found, voxels[kind][z])
        # A flip in the entries of slices beyond the last one changes no slice, but the index's checksum.
        assert damaged
    shard.write_bytes(whole)
    assert (read(SliceReader(folder / kind), 69) == voxels[kind][69]).all()


@pytest.mark.parametrize("kept", [0, 10, 500, -1])
def test_a_shard_cut_short_is_damage(case, kept):
    folder, _ = case
    shard = folder / "image" / "c" / "0" / "0" / "0"
    reader = SliceReader(folder / "image")
    read(reader, 5)
    shard.write_bytes(shard.read_bytes()[:kept])
    if kept >= 0:  # With the index known, the last slice is still whole without the file's last byte.
        with pytest.raises(UserError, match="slice 63 is damaged"):
            read(reader, 63, "slice 63")
    with pytest.raises(UserError, match="slice 5 is damaged"):
        read(SliceReader(folder / "image"), 5, "slice 5")


def test_a_missing_shard_or_slice_is_damage(case):
    folder, _ = case
    reader = SliceReader(folder / "image")
    with pytest.raises(UserError, match="slice 64 is damaged"):
        # The second shard has room for 64 slices, of which 6 were written.
        read(reader, 70, "slice 64")
    (folder / "image" / "c" / "1" / "0" / "0").unlink()
    with pytest.raises(UserError, match=r"slice 64 is damaged .*No such file"), damage_named("slice 64"):
        SliceReader(folder / "image").start(64)
    with pytest.raises(UserError, match="can't be opened"):
        SliceReader(folder / "nothing")


@pytest.mark.parametrize(
    "layout",
    [
        {"chunks": (1, 8, 6)},
        {"chunks": (2, 8, 6), "shards": (4, 8, 6)},
        {"chunks": (1, 4, 6), "shards": (4, 8, 6)},
        {"chunks": (1, 8, 6), "shards": (4, 8, 6), "compressors": [ZstdCodec()]},
        {"chunks": (1, 8, 6), "shards": (4, 8, 6), "compressors": [BloscCodec(typesize=2)]},
    ],
)
def test_other_layouts_are_read_too(tmp_path, layout):
    voxels = np.arange(4 * 8 * 6, dtype=np.int16).reshape(4, 8, 6)
    zarr.create_array(tmp_path / "a", shape=voxels.shape, dtype="int16", **layout)[...] = voxels
    reader = SliceReader(tmp_path / "a")
    assert not reader.direct
    for z in (2, 0):
        np.testing.assert_array_equal(read(reader, z), voxels[z])
