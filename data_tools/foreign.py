"""Predictions by a foreign model for the cases of a store, prepared beside them (see `predictions`)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from nibabel.orientations import apply_orientation

from .arrays import SHARD_SLICES, create_array_of_slices, in_rows
from .creation import aside, left_behind
from .errors import UserError, say_error, unknown_name
from .identity import strangers
from .labels import in_order
from .layouts import named
from .location import first_line, is_local, remove, zarr_place
from .nifti import Header, read_header, read_voxels
from .ownership import owned, remove_owned
from .predictions import FORMAT
from .progress import console, progress
from .sealed import is_sealed, read_sealed, write_group, write_sealed
from .store import Case, Store, check_name
from .volumes import check_same_grid, resized, sha256, stored_label

SUM_TOLERANCE = 0.01
"""How far the probabilities of a voxel may be from a sum of 1."""
PARTS = ("zarr.json", "label", "probabilities")
"""All that is in the folder of a case's prediction."""
NPZ_KEYS = ("probabilities", "softmax")
"""Names of the array in the .npz files of nnU-Net, version 2 and 1."""


@dataclass(frozen=True)
class Foreign:
    """Where the predictions lie, and what their values mean."""

    folder: Path
    name: str
    """What the predictions are called in the store."""
    labels: Mapping[str, Sequence[int]]
    """The values (in .npz files: channels) of the store's labels in the predictions."""
    other: bool = False
    """Other values are background."""


def prepare_predictions(store: Store, foreign: Foreign, only: str | None = None, replace: bool = False) -> int:
    """Prepare the predictions of all cases that have a file in the folder, and return how many failed.

    Predictions that are there, of the same files, stay. Raises `UserError` for labels that the store does not have, and
    for a folder without a prediction.
    """
    check_name("prediction", foreign.name)
    if not is_local(store.path):
        raise UserError(f"{store.path}: predictions are prepared into stores in a folder, and this one is in a bucket")
    known = list(store.attributes["labels"])
    if unknown := [label for label in foreign.labels if label not in known]:
        raise UserError(f"--labels: {unknown_name('label', unknown[0], known)} ({store.path})")
    cases = named(store.cases, only)
    files = {case: file for case in cases if (file := prediction_file(foreign.folder, case))}
    if not files:
        raise UserError(
            f"{foreign.folder}: no prediction of a case of {store.path}; they are named CASE.nii.gz, CASE.nii or "
            f"CASE.npz, like {cases[0]}.nii.gz"
        )
    done, failed = 0, 0
    with progress(len(files), "predictions") as bar:
        for case, file in files.items():
            try:
                done += prepare_prediction(store, store.cases[case], file, foreign, replace)
            except (UserError, OSError) as error:
                failed += 1
                say_error(f"{case}: {error}")
            bar.advance(bar.task_ids[0])
    missing = len(cases) - len(files)
    console.print(
        f"predictions '{foreign.name}': {done} prepared, {len(files) - done - failed} unchanged, {failed} failed"
        + (f"; {missing} cases without a file" if missing else "")
    )
    return failed


def prediction_file(folder: Path, case: str) -> Path | None:
    """A case's file: probabilities if they are there, else the label map."""
    files = (folder / f"{case}{ending}" for ending in (".npz", ".nii.gz", ".nii"))
    return next((file for file in files if file.is_file()), None)


def prepare_prediction(store: Store, case: Case, file: Path, foreign: Foreign, replace: bool) -> bool:
    """Write a case's prediction unless it is there already; whether it was written. Raises `UserError`."""
    folder = store.path / "predictions" / foreign.name / case.name
    bring_back(folder)
    facts = {
        "format": FORMAT,
        "case": case.name,
        "image_sha256": case.source.get("image_sha256"),
        "file": file.name,
        "file_sha256": sha256(file),
        "labels": {name: list(values) for name, values in foreign.labels.items()},
        "other": foreign.other,
    }
    if folder.exists():
        before = read_sealed(folder) if is_sealed(folder) else {}
        if before == facts:
            return False
        if before.get("format") != FORMAT or not replace:
            raise UserError(
                f"{folder}: holds {'another prediction' if before else 'something else, or is damaged'}; "
                + ("pass --replace, or give another --name" if before else "move it away")
            )
        if other := next(strangers(folder, PARTS), None):
            raise UserError(f"{folder}: holds {other}, which is no part of a prediction; move it away")
    names = list(in_order(store.attributes["labels"]))
    if file.suffix == ".npz":
        voxels, key = read_probabilities(file, case, names, foreign), "probabilities"
    else:
        voxels, key = read_labels(file, case, names, foreign), "label"
    write_prediction_of(folder, key, voxels, facts)
    return True


def bring_back(folder: Path) -> None:
    """Give a case's prediction its name, if a kill left it aside while another took its place."""
    whole = [left for left in left_behind(folder) if is_sealed(left) and owned(left, "prediction")]
    if whole and not folder.exists():
        max(whole, key=lambda left: left.stat().st_mtime).rename(folder)


def write_prediction_of(folder: Path, key: str, voxels: np.ndarray, facts: Mapping[str, Any]) -> None:
    """The folder of a case's prediction, whole or not at all."""
    for left in left_behind(folder):
        if owned(left, "prediction"):
            remove_owned(left, "prediction")
    new, old = aside(folder), aside(folder)
    try:
        # What a kill leaves bears the mark by which the next run removes it.
        write_group(new, {"format": FORMAT})
        group = zarr.open_group(zarr_place(new))
        array = create_array_of_slices(group, key, voxels)
        for start in range(0, len(voxels), SHARD_SLICES):
            block = voxels[start : start + SHARD_SLICES]
            array[start : start + SHARD_SLICES] = in_rows(block) if block.ndim == 3 else np.ascontiguousarray(block)
        write_sealed(group, new, facts)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)
        for made in (new, old):
            remove(made)


def read_labels(file: Path, case: Case, names: Sequence[str], foreign: Foreign) -> np.ndarray:
    """A label map (Z, H, W) uint8 in the store's labels and on its grid.

    Raises `UserError` for a damaged file, another grid, and values that are not declared.
    """
    image = source_header(case)
    spacing = np.linalg.norm(image.affine[:3, :3], axis=0) if image.lacks_spacing else None
    header = read_header(file, spacing=spacing)
    check_same_grid(image, header, f"{file} and its image {image.path}")
    mapping = {name: foreign.labels.get(name, ()) for name in names}
    voxels, _ = read_voxels(header, stored_label(mapping, foreign.other))
    return resized(voxels, case.shape[1:], nearest=True)


def read_probabilities(file: Path, case: Case, names: Sequence[str], foreign: Foreign) -> np.ndarray:
    """The probabilities (Z, L, H, W) float16 of the store's labels, on its grid, from nnU-Net's (C, z, y, x).

    Raises `UserError` for a damaged file, another grid, classes that are not declared, and what are no probabilities.
    """
    try:
        arrays = np.load(file, allow_pickle=False)
        if not isinstance(arrays, np.lib.npyio.NpzFile):
            raise ValueError("it is a single array; save it with numpy.savez")
        with arrays:
            key = next((key for key in NPZ_KEYS if key in arrays), None)
            found = arrays[key].astype(np.float32) if key else None
    except Exception as error:  # zip and NumPy have a dozen for bad bytes, without a common base
        raise UserError(f"{file}: can't be read as .npz ({first_line(error)}); copy or make it again") from None
    header = source_header(case)
    if found is None or found.ndim != 4 or found.shape[1:] != header.shape[::-1] or not len(found):
        raise UserError(
            f"{file}: is of another grid than the image; an array '{NPZ_KEYS[0]}' of shape (classes, "
            f"{', '.join(map(str, header.shape[::-1]))}) is needed, not {found.shape if found is not None else 'none'}"
        )
    sums = found.sum(axis=0)
    # The comparison that NaN fails too.
    if not (found.min() >= -SUM_TOLERANCE and np.abs(sums - 1).max() <= SUM_TOLERANCE):
        worst = sums.ravel()[np.abs(sums - 1).argmax()] if np.isfinite(sums).all() else np.nan
        raise UserError(
            f"{file}: the probabilities of a voxel sum to {worst:.3g}, and not to 1; save a softmax over all classes, "
            "the background among them"
        )
    declared = sorted({value for values in foreign.labels.values() for value in values})
    if beyond := [value for value in declared if not 0 < value < len(found)]:
        raise UserError(f"{file}: has classes 0 … {len(found) - 1}, and --labels names {beyond[0]}")
    if not foreign.other and (unknown := [k for k in range(1, len(found)) if k not in declared]):
        raise UserError(f"{file}: class {unknown[0]} is not declared; add it to --labels, or pass --other background")
    result = np.zeros((case.shape[0], len(names), *case.shape[1:]), np.float16)
    for position, name in enumerate(names):
        if values := foreign.labels.get(name):
            # NIfTI's axes are (x, y, z).
            volume = apply_orientation(found[list(values)].sum(axis=0).transpose(2, 1, 0), header.turn)
            result[:, position] = resized(volume, case.shape[1:], nearest=False).clip(0, 1)
    return result


def source_header(case: Case) -> Header:
    """The header of the image file that a case was made of, as far as the store knows it."""
    source = case.source["image"]
    return Header(
        path=Path(source["file"]),
        shape=tuple(source["shape"]),
        dtype=np.dtype(source["dtype"]),
        offset=0,
        scaling=None,
        affine=np.array(source["affine"]),
        lacks_spacing=source["lacks_spacing"],
        notes=(),
    )
