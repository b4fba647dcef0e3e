"""What a method needs of the teacher, on disk, exact for every slice and orientation.

    ROOT/<fingerprint>/description.json        what the cache belongs to, for people
    ROOT/<fingerprint>/segments/<name>/        Zarr v3 group; visible once it is complete (written aside, renamed)
    ROOT/<fingerprint>/segments/<name>/keys    (n,) int64: which sample each row is (`data.ORIENTATIONS`)
    ROOT/<fingerprint>/segments/<name>/<target>  (n, …): one entry is one chunk, the segment is one shard

Entries are written in the order in which training meets them. A segment is written whole by one process, so that any
number of processes and jobs can fill one cache at the same time. The folder's name is a hash of everything that the
entries follow from, so a stale cache is never found. Every chunk has a crc32c; an entry that is missing or damaged is
computed again.
"""

import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts
import torch
from torch import Tensor, nn

from data_tools.location import finished, first_line, open_array

from .checkpoint import write_text
from .data import Batch
from .distillers.base import Distiller
from .networks.base import NetworkOutput, Taps

log = logging.getLogger(__name__)

VERSION = 1
SEGMENT_BYTES = 64 * 2**20
"""About how large a segment grows before it is written."""


class TeacherCache:
    """The entries under one folder. Handles are opened where they are used, so that it can be sent to workers."""

    def __init__(self, folder: Path, size: int, targets: Sequence[str], dtype: str):
        """`size` is one more than the largest key; `targets` are the names of what an entry holds."""
        self.folder = Path(folder)
        self.size = size
        self.targets = tuple(targets)
        self.dtype = np.dtype(dtype)
        self.damaged = 0
        self.full = False
        self._forget()

    def _forget(self) -> None:
        self._process = os.getpid()
        self._names: list[str] = []
        self._arrays: dict[tuple[str, str], ts.TensorStore] = {}
        self._segment = np.full(self.size, -1, np.int32)
        self._row = np.zeros(self.size, np.int32)
        self._changed = -1
        self._pending: list[tuple[np.ndarray, dict[str, np.ndarray]]] = []

    def __getstate__(self) -> dict[str, Any]:
        kept = {name: getattr(self, name) for name in ("folder", "size", "targets", "dtype")}
        return {**kept, "damaged": 0, "full": True}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def __contains__(self, key: int) -> bool:
        return bool(self._segment[key] >= 0)

    def refresh(self) -> None:
        """Learn of segments that this or another process has completed."""
        segments = self.folder / "segments"
        if not segments.is_dir() or segments.stat().st_mtime_ns == self._changed:
            return
        self._changed = segments.stat().st_mtime_ns
        known = set(self._names)
        for path in sorted(p for p in segments.iterdir() if p.suffix != ".tmp" and p.name not in known):
            try:
                keys = open_array(path / "keys").read().result()
            except Exception as error:
                log.warning("teacher cache: segment %s is damaged and left out (%s)", path.name, first_line(error))
                keys = np.zeros(0, np.int64)
            self._segment[keys] = len(self._names)
            self._row[keys] = np.arange(len(keys))
            self._names.append(path.name)

    def start_reading(self, keys: np.ndarray) -> Callable[[], dict[str, Tensor] | None]:
        """Begin to read entries; the result is called for them: target name → (N, …), or None if any is missing or
        damaged."""
        if self._process != os.getpid():
            self._forget()
        if (self._segment[keys] < 0).any():
            self.refresh()
        if (self._segment[keys] < 0).any():
            return lambda: None
        places = [(self._names[s], int(r)) for s, r in zip(self._segment[keys], self._row[keys], strict=True)]
        reads = {}
        for target in self.targets:
            reads[target] = [self._array(segment, target)[row].read() for segment, row in places]

        def result() -> dict[str, Tensor] | None:
            try:
                return {
                    target: torch.from_numpy(np.stack([finished(read, "entry") for read in futures]))
                    for target, futures in reads.items()
                }
            except Exception as error:
                self.damaged += 1
                log.warning("teacher cache: %s; it is computed again", first_line(error))
                return None

        return result

    def _array(self, segment: str, target: str) -> ts.TensorStore:
        if (segment, target) not in self._arrays:
            self._arrays[segment, target] = open_array(self.folder / "segments" / segment / target)
        return self._arrays[segment, target]

    def add(self, keys: np.ndarray, targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Keep a batch's targets, and return them as reading them back would: rounded to the cache's number format,
        so that it makes no difference to training whether an entry was already there."""
        stored = {name: t.detach().cpu().numpy().astype(self.dtype) for name, t in targets.items()}
        new = np.flatnonzero(self._segment[keys] < 0)
        if not self.full and len(new):
            self._pending.append((keys[new], {name: values[new] for name, values in stored.items()}))
            if sum(v.nbytes for _, entry in self._pending for v in entry.values()) >= SEGMENT_BYTES:
                self.flush()
        return {
            name: torch.from_numpy(values).to(targets[name].device, targets[name].dtype)
            for name, values in stored.items()
        }

    def flush(self) -> None:
        """Write what was added as a segment. On a full disk, caching ends with a warning and training goes on."""
        if not self._pending or self.full:
            return
        keys = np.concatenate([keys for keys, _ in self._pending])
        values = {name: np.concatenate([v[name] for _, v in self._pending]) for name in self._pending[0][1]}
        self._pending = []
        name = uuid.uuid4().hex[:16]
        aside = self.folder / "segments" / f"{name}.tmp"
        try:
            write_segment(aside, keys, values)
            aside.rename(aside.with_suffix(""))
        except (OSError, ValueError) as error:
            shutil.rmtree(aside, ignore_errors=True)
            log.warning("teacher cache: writing ends here, training goes on without (%s)", first_line(error))
            self.full = True
        self.refresh()

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
            "kvstore": {"driver": "file", "path": str((folder / name).absolute())},
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


class TeacherTargets:
    """The frozen teacher: a batch's targets from the cache, or from a forward pass where they are not in it.

    Without a teacher (`None`) there are no targets.
    """

    def __init__(self, teacher: nn.Module | None, distiller: Distiller, cache: TeacherCache | None, autocast: Callable):
        self.teacher = teacher and teacher.eval().requires_grad_(False)
        self.distiller = distiller
        self.cache = cache
        self.autocast = autocast
        self.forwards = 0
        self.hits = 0

    @torch.no_grad()
    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """The method's targets for a batch (see `Distiller.teacher_targets`)."""
        if self.teacher is None:
            return {}
        if batch.targets is not None:
            self.hits += len(batch.keys)
            return batch.targets
        self.forwards += len(batch.keys)
        with self.autocast():
            output = self.teacher(batch.image)
        targets = self.distiller.teacher_targets(NetworkOutput(*(t.float() for t in output)), batch.mask)
        return self.cache.add(batch.keys, targets) if self.cache is not None else targets

    def flush(self) -> None:
        """Write what was computed, so that it can be read."""
        if self.cache is not None:
            self.cache.flush()


def weights_hash(network: nn.Module) -> str:
    """A hash of a network's parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def probe_targets(distiller: Distiller, taps: Taps, crop: tuple[int, int]) -> tuple[str, dict[str, list[int]]]:
    """What a method makes of a fixed, random teacher output: a hash of the values, and each target's shape.

    The hash stands for the method and those of its settings that matter to the teacher's side: another loss weight
    leaves a cache valid, another attention gain does not.
    """
    random = np.random.default_rng(0)

    def noise(channels: int, stride: int) -> Tensor:
        return torch.from_numpy(random.standard_normal((1, channels, crop[0] // stride, crop[1] // stride)))

    output = NetworkOutput(noise(2, 1), noise(*taps.low), noise(*taps.high))
    target = torch.zeros(1, *crop, dtype=torch.float64)
    target[:, : crop[0] // 2] = 1
    targets = distiller.teacher_targets(output, torch.stack([1 - target, target], dim=1))
    digest = hashlib.sha256()
    for name, values in sorted(targets.items()):
        digest.update(name.encode())
        digest.update(values.cpu().numpy().astype(np.float16).tobytes())
    return digest.hexdigest()[:16], {name: list(values.shape[1:]) for name, values in targets.items()}


def cache_fingerprint(description: Mapping[str, Any]) -> str:
    """The name of the cache that a description belongs to."""
    facts = {"version": VERSION, **description}
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def entry_bytes(shapes: Mapping[str, list[int]], dtype: str) -> int:
    """Bytes of one entry, uncompressed."""
    return sum(int(np.prod(shape)) for shape in shapes.values()) * np.dtype(dtype).itemsize


def open_cache(
    root: Path, description: Mapping[str, Any], size: int, targets: Sequence[str], dtype: str
) -> TeacherCache:
    """The cache that belongs to a description, made if it is not there."""
    folder = Path(root) / cache_fingerprint(description)
    (folder / "segments").mkdir(parents=True, exist_ok=True)
    write_text(folder / "description.json", json.dumps(description, indent=1, default=str))
    cache = TeacherCache(folder, size, targets, dtype)
    cache.refresh()
    return cache
