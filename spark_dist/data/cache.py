"""Teacher targets on disk, exact for every slice and orientation.

    ROOT/<fingerprint>/description.json        what the cache belongs to, for people
    ROOT/<fingerprint>/segments/<name>/        Zarr v3 group; visible once it is complete (written aside, renamed)
    ROOT/<fingerprint>/segments/<name>/keys    (n,) int64: which sample each row is (see `order`)
    ROOT/<fingerprint>/segments/<name>/<target>  (n, …): one entry is one chunk, the segment is one shard

Entries are written in the order in which training meets them. A segment is written whole by one process, so that any
number of processes and jobs can fill one cache at the same time. The folder's name is a hash of everything that the
entries follow from, so a stale cache is never found. Every chunk has a crc32c; an entry that is missing or damaged is
computed again, and of two segments that hold an entry the later counts.
"""

import json
import logging
import os
import shutil
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorstore as ts
from torch import Tensor

from data_tools.errors import UserError
from data_tools.location import first_line, kvstore, open_array
from data_tools.shards import DAMAGE, PendingSlice, SliceReader

from .number_formats import as_tensor, decode, encode, numpy_dtype, stored_arrays
from .shared_memory import empty_array
from .views import ORIENTATIONS

log = logging.getLogger(__name__)
SEGMENT_BYTES = 64 * 2**20
"""About how large a segment grows before it is written."""
SEGMENT = f"{'[0-9]' * 20}-{'[0-9a-f]' * 8}"
"""The names of segments, as a pattern."""


class Entries(NamedTuple):
    """The cached targets of a batch."""

    arrays: dict[str, Tensor] | None
    """As stored (see `number_formats.decode`), (N, …) each, or None if any entry is missing or damaged."""
    damaged: tuple[int, ...] = ()
    """Keys of entries that are there and can't be read."""


@dataclass(frozen=True)
class PendingEntries:
    """Entries whose reads have been started, and the arrays that they are put into."""

    keys: np.ndarray
    """(N,) of the entries."""
    reads: list[list[PendingSlice]]
    """Of each entry, its slice of each array; nothing if it could not be started."""
    arrays: dict[str, np.ndarray]
    """(N, …) each."""
    damaged: dict[int, Exception]
    """Keys of entries that can't be read, and why."""

    def fill(self, n: int) -> None:
        """Decode entry n, or note its damage."""
        try:
            for read, array in zip(self.reads[n], self.arrays.values(), strict=False):
                read.read(array[n, ...])
        except DAMAGE as error:
            self.damaged[int(self.keys[n])] = error


@dataclass(frozen=True)
class CacheLayout:
    """The entries that a cache has room for, and how their targets are stored."""

    size: int
    """One more than the largest key."""
    shapes: Mapping[str, Sequence[int]]
    """Shape of each target of an entry."""
    dtype: str
    """Number format of the targets (see `number_formats`)."""
    canonical: bool = False
    """One entry for a slice, its first view, which `TeacherTargets` turns into the others; that is not exact."""
    views: int = ORIENTATIONS
    """Views of each slice."""
    orientations: Sequence[int] = tuple(range(ORIENTATIONS))
    """Those that the views of a canonical cache are."""

    def arrays(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """The arrays of an entry, with their shapes and number formats."""
        return {
            name: (shape, numpy_dtype(kind)) for name, (shape, kind) in stored_arrays(self.shapes, self.dtype).items()
        }

    def stored(self, keys: np.ndarray) -> np.ndarray:
        """The keys of the entries that hold what samples with these keys need."""
        return keys // self.views * self.views if self.canonical else keys

    def turns(self, keys: np.ndarray) -> np.ndarray:
        """The orientations of samples, where their views are orientations (see `Views.of`)."""
        return np.asarray(self.orientations)[keys % self.views % len(self.orientations)]


class TeacherCache:
    """The entries under one folder. Handles are opened where they are used, so that it can be sent to workers."""

    def __init__(self, folder: Path, layout: CacheLayout, memory: int = 0):
        """`memory` bytes of decoded entries are kept by TensorStore."""
        self.folder = Path(folder)
        self.layout = layout
        self.memory = memory
        self.idle = False
        """Nothing is read or written any more; targets are still rounded as if it were."""
        self._reset_handles()

    def _reset_handles(self) -> None:
        self.full = False
        self._process = os.getpid()
        self._context = ts.Context({"cache_pool": {"total_bytes_limit": self.memory}}) if self.memory else None
        self._names: list[str] = []
        self._readers: dict[tuple[str, str], SliceReader] = {}
        self._segment = np.full(self.layout.size, -1, np.int32)
        self._row = np.zeros(self.layout.size, np.int32)
        self._changed = -1
        self._lock = threading.Lock()
        self._waiting = np.zeros(self.layout.size, bool)
        self._pending: list[tuple[np.ndarray, dict[str, np.ndarray]]] = []

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "full" and not key.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset_handles()

    def refresh(self) -> None:
        """Learn of segments that this or another process has completed."""
        segments = self.folder / "segments"
        with self._lock:  # batches are read in a thread of their own
            if not segments.is_dir() or segments.stat().st_mtime_ns == self._changed:
                return
            # A folder's time is coarse: only one that had passed when the folder was listed says that nothing is new.
            changed = segments.stat().st_mtime_ns
            self._changed = changed if time.time_ns() - changed > 2e9 else -1
            known = set(self._names)
            for path in sorted(p for p in segments.iterdir() if p.suffix != ".tmp" and p.name not in known):
                try:
                    keys = open_array(path / "keys").read().result()
                except (ValueError, OSError, UserError) as error:
                    log.warning("teacher cache: segment %s is damaged and left out (%s)", path.name, first_line(error))
                    keys = np.zeros(0, np.int64)
                self._names.append(path.name)
                self._row[keys] = np.arange(len(keys))
                self._segment[keys] = len(self._names) - 1

    def start_reading(self, keys: np.ndarray) -> PendingEntries | None:
        """Have the entries fetched that samples with these keys need; None if they are not all there."""
        if self.idle:
            return None
        if self._process != os.getpid():
            self._reset_handles()
        stored = self.layout.stored(keys)
        if (self._segment[stored] < 0).any():
            self.refresh()
        if (self._segment[stored] < 0).any():
            return None
        kinds, reads, damaged = self.layout.arrays(), [], {}
        for key in stored.tolist():
            segment, row = self._names[self._segment[key]], int(self._row[key])
            try:
                reads.append([self._reader(segment, name).start(row) for name in kinds])
            except (UserError, *DAMAGE) as error:
                reads.append([])
                damaged[key] = error
        arrays = {name: empty_array((len(keys), *shape), dtype) for name, (shape, dtype) in kinds.items()}
        return PendingEntries(stored, reads, arrays, damaged)

    def finish_reading(self, pending: PendingEntries | None) -> Entries:
        """Entries that have been filled. Damaged ones count as missing from now on, with a warning."""
        if pending is None:
            return Entries(None)
        if not pending.damaged:
            return Entries({name: as_tensor(array) for name, array in pending.arrays.items()})
        for key, error in sorted(pending.damaged.items()):
            log.warning("teacher cache: entry %d: %s; it is computed again", key, first_line(error))
        damaged = tuple(sorted(pending.damaged))
        self.mark_missing(damaged)
        return Entries(None, damaged)

    def read(self, keys: np.ndarray) -> Entries:
        """The entries that samples with these keys need."""
        pending = self.start_reading(keys)
        if pending is not None:
            for n in range(len(keys)):
                pending.fill(n)
        return self.finish_reading(pending)

    def mark_missing(self, keys: Sequence[int]) -> None:
        """Take entries for missing, until a segment is found that has them and was not known."""
        self._segment[np.asarray(keys, int)] = -1

    def _reader(self, segment: str, name: str) -> SliceReader:
        """The reader of one array of a segment, opened once."""
        if (segment, name) not in self._readers:
            path = self.folder / "segments" / segment / name
            self._readers[segment, name] = SliceReader(path, self._context)
        return self._readers[segment, name]

    def add(self, keys: np.ndarray, targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Keep the targets of the entries `keys`, and return them as reading them back would: rounded to the cache's
        number format, so that it makes no difference to training whether an entry was already there."""
        arrays = encode(targets, self.layout.dtype)
        new = np.flatnonzero((self._segment[keys] < 0) & ~self._waiting[keys])
        if not self.full and not self.idle and len(new):
            self._waiting[keys[new]] = True
            self._pending.append((keys[new], {name: values[new] for name, values in arrays.items()}))
            if sum(v.nbytes for _, entry in self._pending for v in entry.values()) >= SEGMENT_BYTES:
                self.flush()
        device = next(iter(targets.values())).device if targets else None
        return decode({name: as_tensor(x).to(device) for name, x in arrays.items()})

    def flush(self) -> None:
        """Write what was added as a segment. On a full disk, caching ends with a warning and training goes on."""
        if not self._pending or self.full:
            return
        keys = np.concatenate([keys for keys, _ in self._pending])
        values = {name: np.concatenate([v[name] for _, v in self._pending]) for name in self._pending[0][1]}
        self._pending = []
        self._waiting[:] = False
        # Names sort as segments were written.
        name = f"{time.time_ns():020}-{uuid.uuid4().hex[:8]}"
        aside = self.folder / "segments" / f"{name}.tmp"
        try:
            write_segment(aside, keys, values)
            aside.rename(aside.with_suffix(""))
        except (OSError, ValueError) as error:
            shutil.rmtree(aside, ignore_errors=True)
            log.warning("teacher cache: writing ends here, training goes on without (%s)", first_line(error))
            self.full = True
        self.refresh()

    def missing(self, keys: np.ndarray) -> np.ndarray:
        """Which of the samples (N,) have no entry yet."""
        self.refresh()
        return self._segment[self.layout.stored(keys)] < 0

    def entries(self) -> int:
        """How many entries can be read."""
        self.refresh()
        return int((self._segment >= 0).sum())


def write_segment(folder: Path, keys: np.ndarray, values: Mapping[str, np.ndarray]) -> None:
    """A Zarr v3 group of the keys and one array for each target, each array one shard."""
    folder.mkdir(parents=True)
    (folder / "zarr.json").write_text(json.dumps({"zarr_format": 3, "node_type": "group", "attributes": {}}))
    arrays = {"keys": (keys, keys.shape), **{name: (v, (1, *v.shape[1:])) for name, v in values.items()}}
    writes = []
    for name, (array, chunk) in arrays.items():
        spec = {
            "driver": "zarr3",
            "kvstore": kvstore(folder / name),
            "metadata": {
                "shape": array.shape,
                "data_type": array.dtype.name,
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": array.shape}},
                "codecs": [{"name": "sharding_indexed", "configuration": sharding(chunk, array.dtype.itemsize)}],
            },
            "store_data_equal_to_fill_value": True,
        }
        writes.append(ts.open(spec, create=True).result().write(array))
    for write in writes:
        write.result()


def sharding(chunk: tuple[int, ...], itemsize: int) -> dict[str, Any]:
    """A shard's configuration: lz4 after a bit shuffle, a crc32c over every chunk and over the index."""
    blosc = {"cname": "lz4", "clevel": 5, "shuffle": "bitshuffle", "typesize": itemsize, "blocksize": 0}
    return {
        "chunk_shape": chunk,
        "codecs": [
            {"name": "bytes", "configuration": {"endian": "little"}},
            {"name": "blosc", "configuration": blosc},
            {"name": "crc32c"},
        ],
        "index_codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
    }
