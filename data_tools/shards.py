"""Single slices out of a store's files, with no more work than to read and to decode them.

A training loader reads one slice here and one there, and one entry of the teacher cache here and one there, which is a
slice of an array with any number of axes. TensorStore reads a shard's index anew for each, and passes the slice on
through several fresh buffers. Here the index is kept, and a slice goes from the file into two buffers that a thread
uses again and again. What is not laid out as `store.write_case` does it, or not in a local folder, goes through
TensorStore.
"""

import json
import math
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import google_crc32c
import numpy as np
from numcodecs import blosc

from .errors import UserError
from .location import damaged, first_line, is_local, open_array

if TYPE_CHECKING:
    import tensorstore

CHECKSUM = 4
"""Bytes of the crc32c that ends a chunk, and the index."""
MISSING = 2**64 - 1
"""Where a chunk begins that was not written."""

DAMAGE = (OSError, ValueError, RuntimeError)
"""Raised where a slice is damaged or missing; RuntimeError is numcodecs' for bytes that can't be unpacked."""

# Slices are decoded in parallel, and not each in threads of its own.
blosc.use_threads = False


@contextmanager
def damage_named(what: str) -> Iterator[None]:
    """Turn `DAMAGE` within the block into a `UserError` naming `what`."""
    try:
        yield
    except DAMAGE as error:
        raise damaged(what, error) from None


@dataclass(slots=True)
class PendingChunk:
    """A slice that the system was told to read ahead from a shard's file."""

    file: FileIO
    begin: int
    length: int
    shape: tuple[int, ...]
    dtype: np.dtype

    def read(self, out: np.ndarray | None = None) -> np.ndarray:
        """The slice, in `out` (contiguous) if given, else in this thread's own memory: good until the thread reads
        another slice, of whichever reader. Raises one of `DAMAGE`."""
        if out is None:
            size = math.prod(self.shape) * self.dtype.itemsize
            out = scratch("voxels", size).view(self.dtype).reshape(self.shape)
        with self.file:
            chunk = checked(self.file, self.begin, scratch("packed", self.length))
            blosc.decompress(chunk, out.reshape(-1).view(np.uint8))
        return out


@dataclass(slots=True)
class PendingFuture:
    """A slice that TensorStore fetches."""

    future: "tensorstore.Future"

    def read(self, out: np.ndarray | None = None) -> np.ndarray:
        """The slice, in `out` if given. Raises one of `DAMAGE`."""
        voxels = self.future.result()
        if out is None:
            return voxels
        out[...] = voxels
        return out


PendingSlice = PendingChunk | PendingFuture


class SliceReader:
    """Reads single slices along the first axis of one array, of a store (Z, H, W) or of a teacher cache.

    `context` is TensorStore's, which reads then. Raises `UserError` if there is no such array.
    """

    def __init__(self, path: Path, context: "tensorstore.Context | None" = None):
        self._path, self._context, metadata = path, context, read_metadata(path)
        self._shape, self._dtype = tuple(metadata["shape"][1:]), np.dtype(metadata["data_type"])
        self._per_shard = slices_per_shard(metadata) if is_local(path) and context is None else 0
        self._indices: dict[int, np.ndarray] = {}

    @property
    def direct(self) -> bool:
        """Whether slices are read without TensorStore, which aborts a process that is forked after its first use."""
        return self._per_shard > 0

    @cached_property
    def array(self) -> "tensorstore.TensorStore":
        """The whole array, unread."""
        return open_array(self._path, self._context)

    def start(self, z: int) -> PendingSlice:
        """Have slice `z` fetched. Raises one of `DAMAGE`."""
        if not self.direct:
            return PendingFuture(self.array[z].read())
        shard, place = divmod(z, self._per_shard)
        file = FileIO(f"{self._path}/c/{shard}" + "/0" * len(self._shape))
        if shard not in self._indices:
            self._indices[shard] = read_index(file, self._per_shard)
        begin, length = map(int, self._indices[shard][place])
        if begin == MISSING:
            raise ValueError("it is missing")
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), begin, length, os.POSIX_FADV_WILLNEED)
        return PendingChunk(file, begin, length, self._shape, self._dtype)


_scratch = threading.local()


def scratch(role: str, size: int) -> np.ndarray:
    """(size,) uint8, the same memory each time that a thread asks for this role."""
    if len(getattr(_scratch, role, ())) < size:
        setattr(_scratch, role, np.empty(size, np.uint8))
    return getattr(_scratch, role)[:size]


def read_metadata(path: Path) -> dict[str, Any]:
    """An array's metadata. Raises `UserError`."""
    try:
        return json.loads((path / "zarr.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: can't be opened ({first_line(error)}); prepare this case again") from None


def slices_per_shard(metadata: dict[str, Any]) -> int:
    """Number of slices in a shard of an array, if this module can read it, else 0."""
    shard, codecs = metadata["chunk_grid"]["configuration"]["chunk_shape"], metadata["codecs"]
    if names(codecs) != ["sharding_indexed"]:
        return 0
    sharding = codecs[0]["configuration"]
    as_written = (
        metadata["shape"][1:] == shard[1:] == sharding["chunk_shape"][1:]
        and sharding["chunk_shape"][0] == 1
        and names(sharding["codecs"]) == ["bytes", "blosc", "crc32c"]
        and names(sharding["index_codecs"]) == ["bytes", "crc32c"]
        and sharding.get("index_location", "end") == "end"
        and metadata["chunk_key_encoding"]["name"] == "default"
        and metadata["chunk_key_encoding"].get("configuration", {}).get("separator", "/") == "/"
        and sharding["codecs"][0].get("configuration", {}).get("endian", "little") == "little"
    )
    return shard[0] if as_written else 0


def names(codecs: list[dict]) -> list[str]:
    """The codecs' names."""
    return [codec["name"] for codec in codecs]


def read_index(file: FileIO, slices: int) -> np.ndarray:
    """(slices, 2) uint64: where each chunk of a shard begins, and how many bytes it has. Raises `ValueError`."""
    size = slices * 16 + CHECKSUM
    end = os.fstat(file.fileno()).st_size
    return checked(file, max(0, end - size), np.empty(size, np.uint8)).view("<u8").reshape(slices, 2)


def checked(file: FileIO, begin: int, buffer: np.ndarray) -> np.ndarray:
    """As many bytes of a file as `buffer` has, without the checksum at their end.

    Raises `ValueError` if that is wrong, or the file ends before.
    """
    if len(buffer) <= CHECKSUM or os.preadv(file.fileno(), [buffer], begin) != len(buffer):
        raise ValueError("the file is too short")
    content, checksum = buffer[:-CHECKSUM], buffer[-CHECKSUM:]
    content.flags.writeable = False  # else it would have to be copied for the checksum
    if google_crc32c.value(content) != int.from_bytes(checksum.tobytes(), "little"):
        raise ValueError("its checksum is wrong")
    return content
