"""NIfTI scans for prediction: read as a store would hold them, and predictions written on a scan's own grid."""

import glob
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
from nibabel.orientations import apply_orientation, io_orientation

from .errors import UserError
from .layouts import stem
from .nifti import Header, header_kind, read_header, read_voxels, unpacked, write_image
from .preparation import Preparation
from .volumes import on_grid, plane_size, resized, stored_image

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


def read_scan(
    path: Path, preparation: Preparation, channel: int | None = None, spacing: Sequence[float] | None = None
) -> Scan:
    """A scan, prepared as a store holds its cases. `channel` counts rather than the preparation's; `spacing` (mm along
    the file's axes) where the file does not know its own.

    Raises `UserError` for a file that is damaged, no volume or constant.
    """
    header = read_header(path, preparation.channel if channel is None else channel, spacing)
    return prepared(read_voxels(header, stored_image)[0], header, preparation)


def scan_of(volume: np.ndarray, affine: np.ndarray, preparation: Preparation) -> Scan:
    """A scan from an array in any axes and its affine (4×4, to RAS+ mm), as `read_scan` would read it from a file.

    Raises `UserError` for what is no volume, or an affine without directions.
    """
    volume, affine, name = np.asarray(volume), np.asarray(affine, dtype=float), Path("volume")
    if volume.ndim != 3 or not volume.size or volume.dtype.kind not in "iufb":
        raise UserError(f"{name}: an array of {volume.dtype} with shape {volume.shape}; give numbers along three axes")
    if affine.shape != (4, 4) or not np.isfinite(affine).all() or np.isnan(io_orientation(affine)).any():
        raise UserError(f"{name}: the affine {affine.round(3).tolist()} gives no direction for each of three axes")
    header = Header(name, volume.shape, volume.dtype, 0, None, affine, False, ())
    turned = apply_orientation(volume, header.turn)
    return prepared(stored_image([turned.reshape(-1)], volume.size, name)[0].reshape(turned.shape), header, preparation)


def prepared(voxels: np.ndarray, header: Header, preparation: Preparation) -> Scan:
    """A scan from its voxels (Z, H, W) as they are in its file."""
    voxels = resized(voxels, plane_size(header, preparation.size, preparation.plane_spacing), nearest=False)
    return Scan(header.path, voxels, preparation.window(voxels, header.path), header)


def on_scan_grid(prediction: np.ndarray, scan: Scan, values: Sequence[int] | None = None) -> np.ndarray:
    """A prediction (Z, H, W) for a scan on the source's grid and axes: classes (integers) by the nearest pixel, and
    with `values` each as its own; probabilities (float) linearly."""
    nearest = prediction.dtype.kind in "ui"
    result = on_grid(prediction, scan.header.shape, scan.header.affine, nearest)
    if values is None:
        return result
    table = np.array(values)
    return table.astype(np.result_type(*(np.min_scalar_type(value) for value in values)))[result]


def write_prediction(
    out: Path, prediction: np.ndarray, scan: Scan, values: Sequence[int] | None = None, mark: str = ""
) -> None:
    """A prediction (Z, H, W) for a scan as NIfTI, whole or not at all: on the source's grid (see `on_scan_grid`), with
    the very geometry of its header, and a `mark` of up to 79 letters as its description."""
    voxels = on_scan_grid(prediction, scan, values)
    image = nibabel.Nifti1Image if max(voxels.shape) < 2**15 else nibabel.Nifti2Image
    geometry = geometry_of(scan.header, image)
    geometry["descrip"] = mark.encode()
    # In the header's own units, which need not be mm.
    write_image(out, image(voxels, geometry.get_best_affine(), geometry, dtype=voxels.dtype))


def mark_of(path: Path) -> str:
    """The mark of a prediction that is there already; nothing of a file that has none, or is no NIfTI."""
    try:
        with unpacked(path) as file:
            block = file.read(nibabel.Nifti2Header.sizeof_hdr)
        return str(header_kind(block)(block[: header_kind(block).sizeof_hdr])["descrip"].item().decode())
    except Exception:  # nibabel and isal have half a dozen for bad bytes
        return ""


def geometry_of(header: Header, image: type) -> nibabel.Nifti1Header:
    """A header that has a file's sform, qform, spacing and units, to the bit, and nothing else of it."""
    with unpacked(header.path) as file:
        block = file.read(nibabel.Nifti2Header.sizeof_hdr)
    kind = header_kind(block)
    source, made = kind(block[: kind.sizeof_hdr]), image.header_class()
    made.set_data_shape(header.shape)
    fields = ("sform_code", "qform_code", "srow_x", "srow_y", "srow_z", "quatern_b", "quatern_c", "quatern_d")
    for name in (*fields, "qoffset_x", "qoffset_y", "qoffset_z", "xyzt_units"):
        made[name] = source[name]
    made["pixdim"][:4] = source["pixdim"][:4]
    return made
