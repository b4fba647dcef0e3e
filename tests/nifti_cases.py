"""NIfTI files for tests, and what a store must hold of them, said without data_tools."""

import itertools
import json
import re
from pathlib import Path

import nibabel
import numpy as np
import tensorstore

from data_tools.sealed import read_sealed
from data_tools.store import Case

ORIENTATIONS = [
    "".join(codes) for axes in itertools.permutations(["LR", "PA", "IS"]) for codes in itertools.product(*axes)
]
AFFINE = np.array([[-0.8, 0, 0, 90], [0, -0.7, 0, 60], [0, 0, 2.5, -200], [0, 0, 0, 1]])


def save(path: Path, voxels: np.ndarray, affine: np.ndarray = AFFINE, axes: str | None = None, scale=None) -> Path:
    """A NIfTI file, its axes turned to `axes` and stored with a slope and intercept, if these are given."""
    image = nibabel.Nifti1Image(voxels, affine)
    if axes:
        current, wanted = nibabel.io_orientation(affine), nibabel.orientations.axcodes2ornt(axes)
        image = image.as_reoriented(nibabel.orientations.ornt_transform(current, wanted))
    if scale:
        image.header.set_slope_inter(*scale)
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(image, path)
    return path


def save_kits(root: Path, cases: int = 3, shape: tuple[int, int, int] = (12, 10, 6)) -> Path:
    """Cases in the KiTS layout with noise, an organ and a tumour."""
    random = np.random.default_rng(0)
    for k in range(cases):
        label = np.zeros(shape, np.uint8)
        label[2:8, 2:8, 1:5] = 1
        label[4:6, 4:6, 2 + k % 2] = 2
        save(root / f"case_{k:05}" / "imaging.nii.gz", random.integers(-1000, 1000, shape, np.int16))
        save(root / f"case_{k:05}" / "segmentation.nii.gz", label)
    return root


def read(store: Path, case: str, key: str) -> np.ndarray:
    """A stored array as training reads it."""
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(store / "cases" / case / key)}}
    return np.asarray(tensorstore.open(spec, open=True, read=True).result().read().result())


def at_world_places(case: Case, file: Path) -> np.ndarray:
    """The file's voxels at the places in the world where the stored voxels lie, in the shape of the stored array."""
    image = nibabel.load(file)
    stored = np.indices(case.shape).reshape(3, -1)
    to_source = np.linalg.inv(image.affine) @ case.affine
    places = to_source[:3, :3] @ stored + to_source[:3, 3:]
    nearest = np.rint(places).astype(int)
    assert np.abs(places - nearest).max() < 0.01
    assert (nearest >= 0).all(), "a stored voxel lies outside of the source"
    return np.asanyarray(image.dataobj)[tuple(nearest)].reshape(case.shape)


def rewrite_json(file: Path, **changes) -> None:
    """Change keys of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def all_but_identity(store: Path) -> dict[str, bytes]:
    """Every file of a store by its path, with the same identity for any store. The checksums of the metadata, which
    follow from it, are found to be right, and left out."""
    identity, files = json.loads((store / "zarr.json").read_text())["attributes"]["identity"], {}
    for name, content in all_files(store).items():
        if name.endswith("zarr.json") and b'"checksum"' in content:
            assert read_sealed((store / name).parent)
            content = re.sub(rb'"checksum": "[0-9a-f]{64}"', b"", content.replace(identity.encode(), b""))
        files[name] = content
    return files


def all_files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its path."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
