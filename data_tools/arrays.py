"""Slices as Zarr v3 arrays, and how they are compressed."""

from collections.abc import Sequence

import cv2
import numpy as np
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec

SHARD_SLICES = 64


def write_arrays(group: zarr.Group, image: np.ndarray, label: np.ndarray | None, labels: int) -> list[list[int]]:
    """The arrays of a case (see `write_case`). Returns how many voxels of the background and of each of so many labels
    its slices have; [] without a label."""
    _write_array(group, "image", image, 0)
    return [] if label is None else _write_array(group, "label", label, 1 + labels)


def _write_array(group: zarr.Group, key: str, voxels: np.ndarray, values: int) -> list[list[int]]:
    """An array of slices, shard by shard: of `voxels` in another order of axes there is never a second copy.

    Returns how many voxels of each value below `values` the slices have.
    """
    array = create_array_of_slices(group, key, voxels, ("slice", "row", "column"))
    counts = []
    for start in range(0, len(voxels), SHARD_SLICES):
        block = in_rows(voxels[start : start + SHARD_SLICES])
        array[start : start + SHARD_SLICES] = block
        if values:
            counts += [[int(np.count_nonzero(image == value)) for value in range(values)] for image in block]
    return counts


def create_array_of_slices(
    group: zarr.Group, key: str, voxels: np.ndarray, dimensions: Sequence[str] | None = None
) -> zarr.Array:
    """An empty array for `voxels` (Z, …): a chunk for each slice, in shards, compressed and with checksums."""
    return group.create_array(
        key,
        shape=voxels.shape,
        dtype=voxels.dtype,
        chunks=(1, *voxels.shape[1:]),
        shards=(min(SHARD_SLICES, len(voxels)), *voxels.shape[1:]),
        compressors=[
            BloscCodec(typesize=voxels.dtype.itemsize, cname="lz4", clevel=5, shuffle=shuffle_of(voxels)),
            Crc32cCodec(),
        ],
        config={"write_empty_chunks": True},
        dimension_names=dimensions,
    )


def in_rows(voxels: np.ndarray) -> np.ndarray:
    """Slices (Z, H, W) with their rows in order in memory; turned ones plane by plane, where OpenCV is fastest."""
    fastest = int(np.argmin(np.abs(voxels.strides)))
    if fastest == 2:
        return np.ascontiguousarray(voxels)
    turned = np.empty(voxels.shape, voxels.dtype)
    # OpenCV would copy what is stored backwards.
    forward = tuple(slice(None, None, -1 if stride < 0 else 1) for stride in voxels.strides)
    planes = (np.moveaxis(x[forward], 1 - fastest, 0) for x in (voxels, turned))
    for plane, target in zip(*planes, strict=True):
        target[...] = cv2.transpose(plane.T)
    return turned


def shuffle_of(voxels: np.ndarray) -> str:
    """Shuffle of slices (Z, H, W) before lz4.

    A CT's bits take a tenth less than its bytes. Only multiples of eight voxels can be shuffled by bits; and labels
    become no smaller by any shuffle, and decode ten times as fast without.
    """
    if voxels.dtype.itemsize == 1:
        return "noshuffle"
    return "bitshuffle" if voxels[0].size % 8 == 0 else "shuffle"
