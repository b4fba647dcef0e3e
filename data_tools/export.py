"""A stored case, or a prediction for it, back on the grid of the NIfTI file that it came from."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from .errors import UserError, unknown_name
from .labels import source_values
from .location import finished, first_line, open_array
from .nifti import write_image
from .store import Case, read_attributes, read_case
from .volumes import to_source_grid


def export(store: Path, name: str, out: Path, label: bool = False, prediction: Path | None = None) -> None:
    """Write a case's image, its label, or a prediction (Z, H, W) for it as NIfTI.

    Image and label have the grid, affine, type and scaling of their source: where slices were not resampled, every
    voxel is the source's, or its nearest float32. Labels have the first of the source's values that `--labels` gave to
    each, a prediction keeps its own values. Raises `UserError` for a case that is not there or is damaged,
    a prediction of another shape, and an `out` that exists.
    """
    if not out.name.endswith((".nii", ".nii.gz")):
        raise UserError(f"{out}: must end in .nii.gz or .nii")
    if out.exists():
        raise UserError(f"{out}: exists; remove it, or name another file")
    labels = read_attributes(store)["labels"]
    case = read_case(store, name)
    if case is None:
        known = [file.parent.name for file in (store / "cases").glob("*/zarr.json")]
        raise UserError(f"{store}: {unknown_name('case', name, known)}" if known else f"{store}: holds no case")
    if prediction is not None:
        write_nifti(out, to_source_grid(read_prediction(prediction, case), case), case.source["image"], as_is=True)
        return
    kind = "label" if label else "image"
    if label and not case.labelled:
        raise UserError(f"{store}: case {name} has no label")
    voxels = finished(open_array(store / "cases" / name / kind).read(), f"{store}: case {name}")
    if label:
        voxels = source_values(labels)[voxels]
    write_nifti(out, to_source_grid(voxels, case, kind, nearest=label), case.source[kind])


def read_prediction(path: Path, case: Case) -> np.ndarray:
    """The array of a .npy file or a Zarr array. Raises `UserError` if it is none, or not of the case's shape."""
    if path.is_dir():
        array = finished(open_array(path).read(), str(path))
    else:
        try:
            array = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{path}: no .npy file and no Zarr array ({first_line(error)})") from None
    if not isinstance(array, np.ndarray) or array.shape != case.shape or array.dtype.kind not in "biuf":
        raise UserError(
            f"{path}: an array of numbers of shape {'×'.join(map(str, case.shape))} (slices, rows, columns of case "
            f"{case.name}) is needed, not {getattr(array, 'dtype', type(array).__name__)} "
            f"{'×'.join(map(str, getattr(array, 'shape', ())))}"
        )
    if array.dtype.kind in "biu" and array.size and array.min() >= 0 and array.max() < 256:
        return array.astype(np.uint8)
    return array


def write_nifti(out: Path, voxels: np.ndarray, source: Mapping[str, Any], as_is: bool = False) -> None:
    """A whole file or none, with the affine of `source`, and its type and scaling unless the voxels stay `as_is`."""
    scaling = None if as_is else source["scaling"]
    dtype = voxels.dtype if as_is else np.dtype(source["dtype"])
    if scaling:
        voxels = (voxels.astype(np.float64) - scaling[1]) / scaling[0]
    if dtype.kind in "iu" and voxels.dtype.kind == "f":
        voxels = np.rint(voxels)
    kind = nibabel.Nifti1Image if max(voxels.shape) < 2**15 else nibabel.Nifti2Image
    image = kind(voxels.astype(dtype), np.array(source["affine"]), dtype=dtype)
    image.header.set_xyzt_units("mm")
    if scaling:
        image.header.set_slope_inter(*scaling)
    write_image(out, image)
