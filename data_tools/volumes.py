"""One case from its NIfTI files to the store's arrays, and back to the source's grid."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from isal import igzip
from nibabel.affines import obliquity
from nibabel.orientations import (
    apply_orientation,
    axcodes2ornt,
    inv_ornt_aff,
    io_orientation,
    ornt2axcodes,
    ornt_transform,
)

from .errors import UserError
from .store import AXES, Case

# nibabel raises what it can't mend in a header, and also writes it to stderr without the file's name.
nibabel.imageglobals.logger.disabled = True

GRID_TOLERANCE = 0.05
"""How far the corners of image and label may lie apart, in voxels."""
OBLIQUE = 0.5
"""Degrees between a volume's axes and the world's from which a case is called oblique."""


@dataclass(frozen=True)
class Volume:
    """A NIfTI volume with its axes turned to `store.AXES`."""

    voxels: np.ndarray
    """(Z, H, W), in the file's own values."""
    affine: np.ndarray
    """4×4 from (slice, row, column) to RAS+ mm."""
    source: dict[str, Any]
    """The file's name, orientation, shape, affine and dtype."""
    notes: tuple[str, ...]
    """What somebody should know about the file."""

    @property
    def spacing(self) -> tuple[float, float, float]:
        """mm between slices, rows, columns."""
        return tuple(float(v) for v in np.linalg.norm(self.affine[:3, :3], axis=0))


def read_volume(path: Path, channel: int | None = None) -> Volume:
    """Read a NIfTI file whole and turn its axes, by its affine, to slices, rows to posterior, columns to left.

    Axes oblique to the world's are turned to the nearest ones. `channel` picks one of several in a fourth axis.
    Raises `UserError` if the file is missing, damaged, or no volume.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; put it there, or take the case out")
    try:
        image = load(path)
        voxels = np.asanyarray(image.dataobj)
    except (PermissionError, MemoryError):
        raise
    # nibabel and isal have half a dozen exceptions for bad bytes, without a common base.
    except Exception as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{path} is truncated or damaged: copy or download it again ({reason})") from None
    voxels = pick_channel(voxels, channel, path)
    if voxels.ndim != 3 or 0 in voxels.shape:
        raise UserError(f"{path}: shape {voxels.shape} is no volume of three axes")
    if voxels.dtype.kind not in "iufb":
        raise UserError(f"{path}: voxels of type {voxels.dtype} are not numbers; convert the file to int16 or float32")
    if not np.isfinite(image.affine).all() or np.isnan(orientation := io_orientation(image.affine)).any():
        raise UserError(
            f"{path}: the affine {image.affine.round(3).tolist()} has no direction for an axis; mend the header"
        )
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
        notes=tuple(header_notes(image)),
    )


def pick_channel(voxels: np.ndarray, channel: int | None, path: Path) -> np.ndarray:
    """One channel of a fourth axis; axes of length 1 after the third go away. Raises `UserError`."""
    while voxels.ndim > 3 and voxels.shape[-1] == 1:
        voxels = voxels[..., 0]
    if voxels.ndim != 4:
        return voxels
    channels = voxels.shape[3]
    if channel is None:
        raise UserError(f"{path}: has {channels} channels; pick one with --channel 0 … {channels - 1}")
    if channel >= channels:
        raise UserError(f"{path}: has {channels} channels, so there is no --channel {channel}; the first is 0")
    return voxels[..., channel]


def header_notes(image: nibabel.Nifti1Image) -> list[str]:
    """What is doubtful about where a volume lies."""
    notes = []
    angle = np.degrees(obliquity(image.affine)).max()
    if angle > OBLIQUE:
        notes.append(f"oblique by {angle:.0f}°, kept in its own slices along the nearest axes")
    if not image.header["sform_code"] and not image.header["qform_code"]:
        notes.append("the header has no orientation, NIfTI's default is taken")
    return notes


def load(path: Path) -> nibabel.Nifti1Image:
    """Open a NIfTI file; a compressed one is unpacked by isal, several times as fast as by zlib."""
    if path.suffix != ".gz":
        image = nibabel.load(path)
        if not isinstance(image, nibabel.Nifti1Image):
            raise ValueError(f"{type(image).__name__} is not NIfTI in one file")
        return image
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
    """Voxels as int16 where they are whole numbers in its range, else float32, and a note if that rounded any.

    Raises `UserError` for voxels that are not finite, or too large for float32.
    """
    if voxels.dtype.kind == "f" and not np.isfinite(voxels).all():
        count = int((~np.isfinite(voxels)).sum())
        raise UserError(f"{path}: {count} voxels are NaN or infinite; set them to a value of the background")
    limits = np.iinfo(np.int16)
    if voxels.min() >= limits.min and voxels.max() <= limits.max:
        whole = voxels.astype(np.int16)
        if voxels.dtype.kind != "f" or np.array_equal(whole, voxels):
            return whole, ""
    with np.errstate(over="ignore"):
        single = voxels.astype(np.float32)
    if not np.isfinite(single).all():
        raise UserError(f"{path}: voxels up to {np.abs(voxels).max():.3g} do not fit into float32; rescale the volume")
    error = np.abs(single - voxels.astype(np.float64))
    if not error.any():
        return single, ""
    relative = (error[error > 0] / np.abs(voxels[error > 0].astype(np.float64))).max()
    return single, f"stored as float32 with a relative error of up to {relative:.1g}"


def stored_label(voxels: np.ndarray, mapping: Mapping[str, Sequence[int]], other: bool, path: Path) -> np.ndarray:
    """Labels as uint8: 0 background, 1 organ, 2 tumour.

    `mapping` names the source values of organ and tumour; what is neither is background if `other`, else an error.
    Raises `UserError` for values that are not whole or not declared.
    """
    values = np.unique(voxels)
    if not np.isfinite(values).all() or (values != np.round(values)).any():
        odd = ", ".join(f"{v:g}" for v in values[~np.isfinite(values) | (values != np.round(values))][:3])
        raise UserError(f"{path}: labels must be whole numbers, and it holds {odd}; resample it with nearest neighbour")
    declared = {0, *(value for group in mapping.values() for value in group)}
    if not other and (unknown := [int(v) for v in values if v not in declared]):
        raise UserError(
            f"{path}: label {', '.join(map(str, unknown[:8]))} is not declared; "
            "add it to --labels, or pass --other background"
        )
    result = np.zeros(voxels.shape, np.uint8)
    for stored, name in ((1, "organ"), (2, "tumour")):
        for value in mapping.get(name, ()):
            result[voxels == value] = stored
    return result


def sha256(path: Path) -> str:
    """The hash of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
