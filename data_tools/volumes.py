"""One case from its NIfTI files to the store's arrays, and back to the source's grid."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from isal import igzip
from nibabel.filebasedimages import ImageFileError
from nibabel.orientations import (
    apply_orientation,
    axcodes2ornt,
    inv_ornt_aff,
    io_orientation,
    ornt2axcodes,
    ornt_transform,
)
from nibabel.spatialimages import HeaderDataError

from .errors import UserError
from .store import AXES, Case

GRID_TOLERANCE = 0.05
"""How far corners of image and label may lie apart, in voxels."""


@dataclass(frozen=True)
class Volume:
    """A NIfTI volume with its axes turned to `store.AXES`."""

    voxels: np.ndarray
    """(Z, H, W), in the file's own values."""
    affine: np.ndarray
    """4×4 from (slice, row, column) to RAS+ mm."""
    source: dict[str, Any]
    """The file's name, orientation, shape, affine and dtype."""

    @property
    def spacing(self) -> tuple[float, float, float]:
        """mm between slices, rows, columns."""
        return tuple(float(v) for v in np.linalg.norm(self.affine[:3, :3], axis=0))


def read_volume(path: Path, channel: int = 0) -> Volume:
    """Read a NIfTI file whole and turn its axes, by its affine, to slices, rows to posterior, columns to left.

    `channel` picks one of several in a fourth axis. Raises `UserError` if the file is missing, damaged, or no volume.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; put it there, or take the case out")
    try:
        image = load(path)
        voxels = np.asanyarray(image.dataobj)
    except PermissionError:
        raise
    except (
        OSError,
        EOFError,
        ValueError,
        OverflowError,
        igzip.isal_zlib.error,
        HeaderDataError,
        ImageFileError,
    ) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{path}: truncated or damaged ({reason}); copy or download it again") from None
    if voxels.ndim == 4:
        if channel >= voxels.shape[3]:
            raise UserError(f"{path}: has {voxels.shape[3]} channels, so there is no --channel {channel}")
        voxels = voxels[..., channel]
    if voxels.ndim != 3 or 0 in voxels.shape:
        raise UserError(f"{path}: shape {voxels.shape} is no volume of three axes")
    if voxels.dtype.kind not in "iufb":
        raise UserError(f"{path}: voxels of type {voxels.dtype} are not numbers; convert the file to int16 or float32")
    orientation = io_orientation(image.affine)
    if np.isnan(orientation).any():
        raise UserError(f"{path}: the affine has an axis of length 0, so its orientation is unknown; mend the header")
    turn = ornt_transform(orientation, axcodes2ornt(AXES))
    return Volume(
        voxels=apply_orientation(voxels, turn),
        affine=image.affine @ inv_ornt_aff(turn, voxels.shape),
        source={
            "file": path.name,
            "orientation": "".join(ornt2axcodes(orientation)),
            "shape": list(voxels.shape),
            "affine": image.affine.tolist(),
            "dtype": str(image.get_data_dtype()),
        },
    )


def load(path: Path) -> nibabel.Nifti1Image:
    """Open a NIfTI file; a compressed one is unpacked by isal, several times as fast as by zlib."""
    if path.suffix != ".gz":
        return nibabel.load(path)
    with igzip.open(path) as file:
        content = file.read()
    # The header's size tells the format: 540 bytes is NIfTI-2, in either byte order.
    kind = nibabel.Nifti2Image if content[:4] in (b"\x1c\x02\0\0", b"\0\0\x02\x1c") else nibabel.Nifti1Image
    return kind.from_bytes(content)


def to_source_grid(array: np.ndarray, case: Case) -> np.ndarray:
    """A stored (Z, H, W) array of a case with the axes of the file that it came from."""
    source = case.source["image"]
    turn = ornt_transform(axcodes2ornt(AXES), io_orientation(np.array(source["affine"])))
    return apply_orientation(array, turn)


def check_same_grid(image: Volume, label: Volume, paths: tuple[Path, Path]) -> None:
    """Raise `UserError` unless both volumes, axes turned, have one shape and lie in one place."""
    names = f"{paths[0]} and {paths[1].name}"
    if image.voxels.shape != label.voxels.shape:
        raise UserError(
            f"{names}: image of {image.source['shape']} and label of {label.source['shape']} voxels differ in shape; "
            "resample the label to the image's grid"
        )
    corners = np.array(np.meshgrid(*((0, n - 1) for n in image.voxels.shape))).reshape(3, -1)
    apart = (image.affine - label.affine)[:3, :3] @ corners + (image.affine - label.affine)[:3, 3:]
    voxels = np.linalg.norm(apart, axis=0).max() / min(image.spacing)
    if voxels > GRID_TOLERANCE:
        raise UserError(
            f"{names}: image and label lie up to {voxels:.2g} voxels apart in the world; "
            f"image affine {np.round(image.source['affine'], 3).tolist()}, "
            f"label affine {np.round(label.source['affine'], 3).tolist()}; resample the label to the image's grid"
        )


def stored_image(voxels: np.ndarray, path: Path) -> tuple[np.ndarray, str]:
    """Voxels as int16 where they are whole numbers in its range, else float32, and what was rounded if anything was.

    Raises `UserError` for voxels that are not finite.
    """
    if voxels.dtype.kind == "f" and not np.isfinite(voxels).all():
        count = int((~np.isfinite(voxels)).sum())
        raise UserError(f"{path}: {count} voxels are NaN or infinite; set them to a value of the background")
    limits = np.iinfo(np.int16)
    if voxels.min() >= limits.min and voxels.max() <= limits.max:
        whole = voxels.astype(np.int16)
        if voxels.dtype.kind != "f" or np.array_equal(whole, voxels):
            return whole, ""
    single = voxels.astype(np.float32)
    error = np.abs(single - voxels.astype(np.float64)).max()
    return single, f"rounded to float32 by up to {error:.1g}" if error else ""


def stored_label(voxels: np.ndarray, mapping: Mapping[str, Sequence[int]], other: bool, path: Path) -> np.ndarray:
    """Labels as uint8: 0 background, 1 organ, 2 tumour.

    `mapping` names the source values of organ and tumour; what is neither is background if `other`, else an error.
    Raises `UserError` for values that are not whole or not declared.
    """
    values = np.unique(voxels)
    if not np.isfinite(values).all() or (values != np.round(values)).any():
        odd = ", ".join(f"{v:g}" for v in values[values != np.round(values)][:3])
        raise UserError(f"{path}: labels must be whole numbers, and it holds {odd}; resample it with nearest neighbour")
    declared = {0, *(value for group in mapping.values() for value in group)}
    if not other and (unknown := [int(v) for v in values if v not in declared]):
        raise UserError(
            f"{path}: label {', '.join(map(str, unknown[:8]))} is not declared; "
            "add it to --labels, or pass --other background"
        )
    result = np.zeros(voxels.shape, np.uint8)
    for stored, name in ((1, "organ"), (2, "tumour")):
        if mapping.get(name):
            result[np.isin(voxels, mapping[name])] = stored
    return result


def sha256(path: Path) -> str:
    """The hash of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
