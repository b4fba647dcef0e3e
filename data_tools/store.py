"""The slice store: its schema, how a case is written, and how a store is opened.

    STORE/                      Zarr v3 group; attributes: format, version, identity, labels, regions, window, layout
    STORE/cases/, STORE/splits/ groups; two more copies of the store's attributes, should the first be damaged
    STORE/cases/<case>/         group; attributes: see `Case`; they are written last and make the case visible
    STORE/cases/<case>/image    (Z, H, W) int16 or float32
    STORE/cases/<case>/label    (Z, H, W) uint8: 0 background, k the k-th of `labels`; not there without labels
    STORE/known/<case>          empty file: the case was complete (see `identity`)
    STORE/splits/<name>/        group; attributes: train, val, test (case names), seed and how it was made
    STORE/splits/<name>/copy/   group; a second copy of them, as nothing else could bring a split back

Slices are axial. The axes run to (inferior, posterior, left), which is the way KiTS19 is stored. One chunk is one
slice and one shard is up to 64 slices, compressed with lz4 (see `shuffle_of`), with a crc32c over every chunk.
Empty chunks are written, so that a chunk that is not there is always damage. `checksum` among a group's attributes is
a hash of its metadata and, in a case, of its arrays' metadata, so that no byte of a store can change unseen.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from .arrays import write_arrays
from .errors import UserError, unknown_name
from .identity import (
    attributes_of,
    check_belongs,
    gone,
    is_known,
    known_cases,
    mark_of,
    owns,
    remove_folder,
    set_known,
    strangers,
)
from .labels import Task, in_order, make_task, regions_of
from .location import exists, is_local, located, remove, zarr_place
from .sealed import is_sealed, read_json, read_sealed, write_sealed

FORMAT = "spark-dist slice store"
VERSION = 2
AXES = ("I", "P", "L")

NAME = re.compile(r"\w[\w .+=@-]*")
"""Names of cases and splits: they are folders of the store."""


@dataclass(frozen=True)
class Case:
    """A case of a store, without its voxels."""

    name: str
    shape: tuple[int, int, int]
    """Slices, rows, columns."""
    dtype: str
    affine: np.ndarray
    """4×4, from (slice, row, column) to world coordinates in mm (RAS+)."""
    spacing: tuple[float, float, float]
    """mm between slices, rows, columns."""
    window: tuple[float, float]
    """The intensities that training maps to −1 and 1."""
    label_counts: np.ndarray
    """(Z, 1 + L) voxels of the background and of each of the store's L labels in each slice; (0, 1 + L) in a case
    without labels."""
    source: dict[str, Any]
    """The files that the case was made of: image_sha256 and label_sha256, and `image` and `label` with each file's
    name, orientation, shape, affine and dtype."""
    regions: Mapping[str, tuple[int, ...]]
    """The stored values of each region of the store."""

    @property
    def labelled(self) -> bool:
        """Whether there is a label array. Without one, a case is for prediction only."""
        return len(self.label_counts) > 0

    def voxels(self, *regions: str) -> np.ndarray:
        """(Z, R) voxels of each of some regions in each slice."""
        sums = [self.label_counts[:, self.regions[name]].sum(axis=1) for name in regions]
        return np.stack(sums, axis=1) if sums else np.zeros((len(self.label_counts), 0), np.int64)

    def slices_with(self, *regions: str) -> np.ndarray:
        """Indices of the slices that have voxels of any of some regions."""
        return np.flatnonzero(self.voxels(*regions).any(axis=1))

    def volume_ml(self, region: str) -> float:
        """The volume of a region in ml."""
        return float(self.voxels(region).sum() * np.prod(self.spacing) / 1000)


@dataclass(frozen=True)
class Store:
    """An opened slice store. Voxels are read from `path` by whoever needs them."""

    path: Path
    attributes: dict[str, Any]
    cases: dict[str, Case]
    """Complete cases, sorted by name."""
    splits: dict[str, dict[str, Any]]

    def split(self, name: str, part: str) -> list[str]:
        """The cases of one part (train, val, test, unlabelled) of the named split."""
        if name not in self.splits:
            if not self.splits:
                raise UserError(f"{self.path}: the store has no split yet; make one with: spark-data split {self.path}")
            raise UserError(f"{self.path}: {unknown_name('split', name, self.splits)}")
        cases = self.splits[name].get(part, [])
        if missing := [case for case in cases if case not in self.cases]:
            raise UserError(
                f"{self.path}: split '{name}' names cases that are not in the store: {', '.join(missing[:5])}; "
                "prepare them, or make another split with --name"
            )
        return cases

    @property
    def labels(self) -> list[str]:
        """The labels by their stored values, from 1."""
        return list(in_order(self.attributes.get("labels", {})))

    @property
    def regions(self) -> dict[str, tuple[int, ...]]:
        """The stored values of each region."""
        return regions_of(self.attributes)

    def task(self, names: str) -> Task:
        """The task that names regions of the store, `anterior,posterior` or `all`. Raises `UserError`."""
        return make_task(names, self.regions, str(self.path))

    @property
    def identity(self) -> str | None:
        """A name that this store and its copies have and no other has; None if an earlier version made it."""
        return self.attributes.get("identity")

    def fingerprint(self) -> str:
        """A hash of everything that voxels follow from: sources' hashes, label mapping, window. That of another store
        is the same if it was prepared from the same files in the same way."""
        cases = {name: [case.source, case.window, case.shape] for name, case in self.cases.items()}
        facts = {key: value for key, value in self.attributes.items() if key != "identity"}
        return hashlib.sha256(json.dumps([facts, cases], sort_keys=True).encode()).hexdigest()[:16]


def write_case(
    path: Path,
    name: str,
    image: np.ndarray,
    label: np.ndarray | None,
    attributes: Mapping[str, Any],
    replace: bool = False,
) -> None:
    """Write one case whole. It becomes visible when its last byte is in place, and replaces one of the same name.

    `image` (Z, H, W) int16 or float32; `label` (Z, H, W) uint8, or None; `attributes`: affine, spacing, window, source
    (see `Case`). The label counts are added here. What is there of a case that can't be written (a full
    disk) is removed. One process at a time may write a case. Raises `UserError` if its folder is not the store's, which
    `replace` removes all the same if it is a case's.
    """
    check_name("case", name)
    delete_case(path, name, replace)
    try:
        # Opened at the case: through its parents, Zarr would put temporary files into them that a kill leaves behind.
        path = located(path)
        folder, facts = path / "cases" / name, attributes_of(path)
        identity = facts.get("identity")
        mark = mark_of(identity, name)
        group = zarr.create_group(zarr_place(folder), attributes=mark)
        counts = write_arrays(group, image, label, len(facts.get("labels", {})))
        write_sealed(group, folder, {**mark, **attributes, "label_counts": counts})
        if identity:
            set_known(path, name)
    except BaseException:
        delete_case(path, name)
        raise


def delete_case(path: Path, name: str, foreign: bool = False) -> None:
    """Remove a case, its marks of completeness first.

    Raises `UserError`, and removes nothing, if its folder is not the store's, or, with `foreign`, is no case's.
    """
    path = located(path)
    if not owns(path, name) and not (foreign and is_sealed(path / "cases" / name)):
        raise UserError(
            f"{path / 'cases' / name}: is no case that this store has made; move it away, and prepare the case again"
        )
    remove_folder(path, name)


def write_split(path: Path, name: str, record: Mapping[str, Any]) -> None:
    """Record a split under a name that is not taken. A split never changes."""
    write_splits(path, {name: record})


def write_splits(path: Path, records: Mapping[str, Mapping[str, Any]]) -> None:
    """Record several splits, or none of them if a name is taken."""
    path = located(path)
    splits = path / "splits"
    for name in records:
        check_name("split", name)
        # One whose writing was interrupted has no record.
        if exists(splits / name / "zarr.json") and read_sealed(splits / name):
            raise UserError(f"{path}: a split '{name}' exists and a split never changes; give another --name")
        if other := next(strangers(splits / name, ("zarr.json", "copy")), None):
            raise UserError(f"{splits / name}: holds {other}, which is no part of a split; move it away")
    for name, record in records.items():
        remove(splits / name)
        groups = {folder: zarr.create_group(zarr_place(folder)) for folder in (splits / name, splits / name / "copy")}
        # The copy first: a split that has its record is whole.
        for folder in reversed(groups):
            write_sealed(groups[folder], folder, record)


def check_name(kind: str, name: str) -> None:
    """Raise `UserError` for a name of a case or split that can't be a folder's."""
    if not NAME.fullmatch(name):
        raise UserError(f"'{name}' can't be the name of a {kind}: use letters, digits and . _ - + = @")


def open_store(path: Path) -> Store:
    """Open a store for reading.

    Raises `UserError` if there is no store at `path`, it was made by another version, or it holds no case; and if a
    case's folder was removed, renamed, or copied from another store.
    """
    path = located(path)
    attributes = read_attributes(path)
    known = known_cases(path)
    names = sorted(file.parent.name for file in path.glob("cases/*/zarr.json"))
    # Each request to an object store takes a while.
    with ThreadPoolExecutor(1 if is_local(path) else 32) as threads:
        read = partial(read_case, path, attributes=attributes)
        cases = {case.name: case for case in threads.map(read, names) if case}
    for name in known:
        # Somebody may be preparing it again right now.
        if name not in names and is_known(path, name) and not (path / "cases" / name / "zarr.json").exists():
            raise UserError(gone(path, name))
    if not cases:
        raise UserError(f"{path}: the store holds no complete case; run spark-data prepare")
    return Store(path=path, attributes=attributes, cases=cases, splits=read_splits(path))


def read_splits(path: Path) -> dict[str, dict[str, Any]]:
    """The records of the splits by their names. Raises `UserError` if one is damaged."""
    records = {file.parent.name: read_sealed(file.parent) for file in sorted(located(path).glob("splits/*/zarr.json"))}
    return {name: record for name, record in records.items() if record}


def read_case(path: Path, name: str, attributes: Mapping[str, Any] | None = None) -> Case | None:
    """A case of the store at `path`, which has these `attributes`; None if it is not complete.

    Raises `UserError` if its metadata are damaged, and `Conflict` if they are those of another store or case.
    """
    path = located(path)
    folder = path / "cases" / name
    try:
        facts = read_sealed(folder)
    except UserError:
        if (folder / "zarr.json").exists():
            raise
        facts = {}  # It is not there, or somebody is preparing it again right now.
    if not facts:
        return None
    attributes = attributes or attributes_of(path)
    check_belongs(folder, facts, attributes.get("identity"))
    array = read_json(folder / "image" / "zarr.json")
    return Case(
        name=folder.name,
        shape=tuple(array["shape"]),
        dtype=array["data_type"],
        affine=np.array(facts["affine"]),
        spacing=tuple(facts["spacing"]),
        window=tuple(facts["window"]),
        label_counts=label_counts(facts["label_counts"], len(attributes.get("labels", {}))),
        source=facts["source"],
        regions=regions_of(attributes),
    )


def label_counts(counts: list[list[int]], labels: int) -> np.ndarray:
    """(Z, 1 + L) from what a case's attributes say. Earlier versions counted two labels even where there was one."""
    return np.array(counts, dtype=np.int64).reshape(len(counts), -1 if counts else 1 + labels)


def read_attributes(path: Path) -> dict[str, Any]:
    """The attributes of the store at `path`.

    Raises `UserError` if there is none, it was made by another version, or its metadata are damaged.
    """
    attributes = root_attributes(path)
    if attributes.get("version") != VERSION:
        raise UserError(
            f"{path}: a slice store of version {attributes.get('version')}, and this program reads version {VERSION}; "
            "prepare it again from the NIfTI files"
        )
    return read_sealed(path)


def root_attributes(path: Path) -> dict[str, Any]:
    """The attributes of the store at `path`, of whatever version. Raises `UserError` if there is no store."""
    if not exists(path / "zarr.json"):
        raise UserError(f"{path}: no slice store here; make one with: spark-data prepare INPUT {path} --layout …")
    document = read_json(path / "zarr.json")
    attributes = document.get("attributes") if isinstance(document, dict) else None
    if not isinstance(attributes, dict) or attributes.get("format") != FORMAT:
        raise UserError(f"{path}: a Zarr group, but no slice store")
    return attributes
