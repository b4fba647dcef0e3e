"""NIfTI scans for prediction: read as a store would hold them, and predictions written on a scan's own grid."""

import glob
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform

from .errors import UserError
from .layouts import stem
from .nifti import Header, read_header, read_voxels, turned_shape, unpacked, write_image
from .prepare import resolve_window
from .store import AXES
from .volumes import resized, stored_image

ENDINGS = (".nii", ".nii.gz")


@dataclass(frozen=True)
class Scan:
    """A volume as networks see it, and what leads back to its file."""

    path: Path
    image: np.ndarray
    """(Z, H, W) in the file's intensities, axial slices, rows to posterior and columns to left."""
    window: tuple[float, float]
    """The intensities that become −1 and 1."""
    header: Header

    @property
    def spacing(self) -> tuple[float, ...]:
        """mm between slices, rows, columns of the source."""
        return tuple(np.linalg.norm(self.header.stored_affine[:3, :3], axis=0).tolist())


def find_scans(places: Iterable[str]) -> list[Path]:
    """The NIfTI files that are named: files, folders (all files in them) and glob patterns, each once, sorted.

    Raises `UserError` for a place where there is none, and for two files of one name: their predictions would be too.
    """
    found: dict[Path, None] = {}
    for place in places:
        path = Path(place)
        if path.is_dir():
            files = [file for file in sorted(path.iterdir()) if is_nifti(file)]
        elif path.exists():
            files = [path]
        else:
            files = [Path(match) for match in sorted(glob.glob(place, recursive=True)) if is_nifti(Path(match))]
        if not files:
            raise UserError(f"{place}: no NIfTI file (.nii, .nii.gz) here; name files, folders or patterns of them")
        for file in files:
            if not is_nifti(file):
                raise UserError(f"{file}: not a NIfTI file by its name; it must end in .nii or .nii.gz")
            found.setdefault(file)
    names: dict[str, Path] = {}
    for file in found:
        if (other := names.setdefault(stem(file), file)) != file:
            raise UserError(
                f"{other} and {file}: predictions of one name; rename one, or predict them into two folders"
            )
    return sorted(found)


def is_nifti(path: Path) -> bool:
    """Whether a name is that of a NIfTI file."""
    return path.name.lower().endswith(ENDINGS) and not path.name.startswith(".") and not path.is_dir()


def read_scan(path: Path, window: Mapping[str, Any], size: Sequence[int] | None, channel: int | None) -> Scan:
    """A scan, prepared as a store with this `window` and `size` (rows, columns; None: as they are) holds its cases.

    Raises `UserError` for a file that is damaged, no volume or constant.
    """
    header = read_header(path, channel)
    voxels, _ = read_voxels(header, stored_image)
    voxels = resized(voxels, size or voxels.shape[1:], nearest=False)
    return Scan(path, voxels, resolve_window(window, voxels, path), header)


def write_prediction(out: Path, prediction: np.ndarray, scan: Scan) -> None:
    """A prediction (Z, H, W) for a scan as NIfTI, whole or not at all: on the source's grid, in the source's axes, with
    the very geometry of its header. A label map (uint8) is resampled to the nearest, probabilities (float) linearly."""
    header = scan.header
    back = ornt_transform(axcodes2ornt(AXES), io_orientation(header.affine))
    plane = turned_shape(header.shape, header.turn)[1:]
    voxels = apply_orientation(resized(prediction, plane, nearest=prediction.dtype.kind == "u"), back)
    image = nibabel.Nifti1Image if max(voxels.shape) < 2**15 else nibabel.Nifti2Image
    geometry = geometry_of(header, image)
    # In the header's own units, which need not be mm.
    written = image(np.ascontiguousarray(voxels), geometry.get_best_affine(), geometry, dtype=voxels.dtype)
    write_image(out, written)


def geometry_of(header: Header, image: type) -> nibabel.Nifti1Header:
    """A header that has a file's sform, qform, spacing and units, to the bit, and nothing else of it."""
    with unpacked(header.path) as file:
        block = file.read(nibabel.Nifti2Header.sizeof_hdr)
    kind = nibabel.Nifti2Header if block[:4] in (b"\x1c\x02\0\0", b"\0\0\x02\x1c") else nibabel.Nifti1Header
    source, made = kind(block[: kind.sizeof_hdr]), image.header_class()
    made.set_data_shape(header.shape)
    fields = ("sform_code", "qform_code", "srow_x", "srow_y", "srow_z", "quatern_b", "quatern_c", "quatern_d")
    for name in (*fields, "qoffset_x", "qoffset_y", "qoffset_z", "xyzt_units"):
        made[name] = source[name]
    made["pixdim"][:4] = source["pixdim"][:4]
    return made
