"""One case from its NIfTI files to the store's arrays, and back to the source's grid."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform

from .errors import UserError
from .labels import in_order
from .nifti import Convert, Header, turned_shape
from .options import LARGEST_SIDE
from .store import AXES, Case

GRID_TOLERANCE = 0.05
"""How far the corners of image and label may lie apart, in voxels."""


def resized(voxels: np.ndarray, size: Sequence[int], nearest: bool) -> np.ndarray:
    """Slices (Z, H, W) resampled in their plane to `size` (rows, columns): `nearest` for labels, else linear.

    Both cover the same area; a pixel stands for its centre.
    """
    if tuple(voxels.shape[1:]) == tuple(size):
        return voxels
    how = cv2.INTER_NEAREST_EXACT if nearest else cv2.INTER_LINEAR
    result = np.empty((len(voxels), *size), voxels.dtype)
    for new, old in zip(result, voxels, strict=True):
        new[...] = cv2.resize(np.ascontiguousarray(old), (size[1], size[0]), interpolation=how)
    return result


def plane_size(header: Header, size: Sequence[int] | None, spacing: Sequence[float] | None) -> tuple[int, int]:
    """Rows and columns that a volume's slices are resampled to: `size`, or as many as come closest to a `spacing` in mm
    while they cover the same area, or its own.

    Raises `UserError` for slices that would be too large.
    """
    plane = header.stored_shape[1:]
    if not spacing:
        return tuple(size or plane)
    found = np.linalg.norm(header.stored_affine[:3, 1:3], axis=0)
    wanted = tuple(max(1, round(n * float(old / new))) for n, old, new in zip(plane, found, spacing, strict=True))
    if max(wanted) > LARGEST_SIDE:
        raise UserError(
            f"{header.path}: --plane-spacing {spacing[0]:g},{spacing[1]:g} makes {wanted[0]}×{wanted[1]} pixels of "
            f"its slices ({found[0]:.3g}×{found[1]:.3g} mm), and {LARGEST_SIDE} is the most"
        )
    return wanted


def resized_affine(affine: np.ndarray, plane: Sequence[int], size: Sequence[int]) -> np.ndarray:
    """The affine of slices that were resampled from `plane` to `size` (rows, columns)."""
    scale = np.array([1, plane[0] / size[0], plane[1] / size[1]])
    change = np.diag([*scale, 1.0])
    change[:3, 3] = (scale - 1) / 2
    return affine @ change


def to_source_grid(array: np.ndarray, case: Case, kind: str = "image", nearest: bool = True) -> np.ndarray:
    """A (Z, H, W) array of a case on the grid of the image, or label, that the case was made of."""
    source = case.source[kind]
    return on_grid(array, source["shape"], np.array(source["affine"]), nearest)


def on_grid(array: np.ndarray, shape: Sequence[int], affine: np.ndarray, nearest: bool) -> np.ndarray:
    """A (Z, H, W) array in the axes, and with the pixels in its plane, of the volume that it belongs to."""
    orientation, stored = io_orientation(affine), axcodes2ornt(AXES)
    plane = turned_shape(shape, ornt_transform(orientation, stored))[1:]
    return apply_orientation(resized(array, plane, nearest), ornt_transform(stored, orientation))


def check_same_grid(image: Header, label: Header, names: str = "") -> None:
    """Raise `UserError` unless both volumes, axes turned, have one shape and lie in one place. `names` are both files
    in the error, if not as usual."""
    names = names or f"{image.path} and {label.path.name}"
    if image.stored_shape != label.stored_shape:
        raise UserError(
            f"{names}: image of {list(image.shape)} and label of {list(label.shape)} voxels differ in shape; "
            "resample the label to the image's grid"
        )
    corners = np.array(np.meshgrid(*((0, n - 1) for n in image.stored_shape))).reshape(3, -1)
    difference = image.stored_affine - label.stored_affine
    apart = difference[:3, :3] @ corners + difference[:3, 3:]
    voxels = np.linalg.norm(apart, axis=0).max() / np.linalg.norm(image.affine[:3, :3], axis=0).min()
    if voxels > GRID_TOLERANCE:
        raise UserError(
            f"{names}: image and label lie up to {voxels:.2g} voxels apart in the world; "
            f"image affine {np.round(image.affine, 3).tolist()}, "
            f"label affine {np.round(label.affine, 3).tolist()}; resample the label to the image's grid"
        )


def stored_image(pieces: Iterable[np.ndarray], count: int, path: Path) -> tuple[np.ndarray, str]:
    """Voxels as int16 where they are whole numbers in its range, else float32, and a note if that rounded any.

    Raises `UserError` for voxels that are not finite, or too large for float32.
    """
    voxels, end, odd, largest, rounding = np.empty(count, np.int16), 0, 0, 0.0, 0.0
    for piece in pieces:
        start, end = end, end + len(piece)
        if piece.dtype.kind == "f":
            odd += len(piece) - int(np.isfinite(piece).sum())
        if odd:
            continue
        if voxels.dtype == np.int16 and not fits_int16(piece):
            whole, voxels = voxels, np.empty(count, np.float32)
            voxels[:start] = whole[:start]
        with np.errstate(over="ignore"):
            voxels[start:end] = piece
        if voxels.dtype == np.float32 and piece.dtype != np.float32:
            with np.errstate(invalid="ignore", divide="ignore"):
                exact = piece.astype(np.float64)
                error = np.abs(voxels[start:end] - exact) / np.abs(exact)
            largest = max(largest, float(np.abs(exact).max()))
            rounding = max(rounding, float(np.nanmax(error, initial=0)))
    if odd:
        raise UserError(f"{path}: {odd} voxels are NaN or infinite; set them to a value of the background")
    if rounding == np.inf:
        raise UserError(f"{path}: voxels up to {largest:.3g} do not fit into float32; rescale the volume")
    return voxels, f"stored as float32 with a relative error of up to {rounding:.1g}" if rounding else ""


def fits_int16(piece: np.ndarray) -> bool:
    """Whether all numbers are whole and in the range of int16."""
    if np.can_cast(piece.dtype, np.int16):
        return True
    limits = np.iinfo(np.int16)
    if piece.min() < limits.min or piece.max() > limits.max:
        return False
    return piece.dtype.kind != "f" or np.array_equal(piece.astype(np.int16), piece)


def stored_label(mapping: Mapping[str, Sequence[int]], other: bool) -> Convert:
    """The conversion of labels to uint8: 0 background, and each label of `mapping` its position there, from 1.

    `mapping` names the source values of each label; what is none of them is background if `other`, else an error, and
    so are values that are not whole.
    """
    return partial(_stored_label, mapping, other)


def _stored_label(
    mapping: Mapping[str, Sequence[int]], other: bool, pieces: Iterable[np.ndarray], count: int, path: Path
) -> tuple[np.ndarray, str]:
    result, end = np.zeros(count, np.uint8), 0
    for piece in pieces:
        start, end = end, end + len(piece)
        values = distinct(piece)
        if not np.isfinite(values).all() or (values != np.round(values)).any():
            odd = ", ".join(f"{v!s}" for v in values[~np.isfinite(values) | (values != np.round(values))][:3])
            raise UserError(
                f"{path}: labels must be whole numbers, and it holds {odd}; resample it with nearest neighbour"
            )
        declared = {0, *(value for group in mapping.values() for value in group)}
        if not other and (unknown := [int(v) for v in values if v not in declared]):
            raise UserError(
                f"{path}: label {', '.join(map(str, unknown[:8]))} is not declared; "
                "add it to --labels, or pass --other background"
            )
        for stored, group in enumerate(in_order(mapping).values(), start=1):
            for value in group:
                result[start:end][piece == value] = stored
    return result, ""


def distinct(piece: np.ndarray) -> np.ndarray:
    """The numbers that occur."""
    if piece.dtype == np.uint8:
        highest = int(piece.max(initial=0))
        if highest < 16:  # several times as fast as counting
            return np.array([value for value in range(highest + 1) if (piece == value).any()], np.uint8)
        return np.flatnonzero(np.bincount(piece, minlength=256))
    if piece.dtype.kind == "f" and np.isfinite(piece).all() and fits_int16(piece):
        piece = piece.astype(np.int16)  # many times as fast to sort
    return np.unique(piece)


def sha256(path: Path) -> str:
    """The hash of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
