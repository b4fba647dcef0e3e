"""NIfTI scans for prediction, and predictions on their own grid."""

import nibabel
import numpy as np
import pytest
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

from data_tools.errors import UserError
from data_tools.scans import find_scans, read_scan, write_prediction

AFFINE = np.array([[-0.8, 0, 0, 10], [0, -0.7, 0, 20.3], [0, 0, 3, -40.7], [0, 0, 0, 1.0]])
WINDOW = {"kind": "fixed", "low": 0, "high": 100}
GEOMETRY = ("sform_code", "qform_code", "srow_x", "srow_y", "srow_z", "quatern_b", "quatern_c", "pixdim", "xyzt_units")


def scan(path, codes):
    """A scan in some axes, with a bright box in it."""
    voxels = np.random.default_rng(0).integers(0, 5, (20, 24, 12)).astype(np.int16)
    voxels[3:9, 4:15, 2:7] += 100
    image = nibabel.Nifti1Image(voxels, AFFINE)
    image.header.set_xyzt_units("mm")
    nibabel.save(image.as_reoriented(ornt_transform(io_orientation(AFFINE), axcodes2ornt(codes))), path)
    return nibabel.load(path)


@pytest.mark.parametrize("codes", ["RAS", "LPS", "LAS", "PIR", "SAL", "ARS", "IPL", "RPI"])
@pytest.mark.parametrize("size", [None, (48, 40)])
def test_a_prediction_lies_where_the_scan_does(tmp_path, codes, size):
    source = scan(tmp_path / "a.nii.gz", codes)
    found = read_scan(tmp_path / "a.nii.gz", WINDOW, size, None)
    assert found.image.shape == (12, *(size or (24, 20)))
    assert found.window == (0, 100)
    write_prediction(tmp_path / "out" / "a.nii.gz", (found.image > 50).astype(np.uint8), found)
    written = nibabel.load(tmp_path / "out" / "a.nii.gz")
    assert written.get_data_dtype() == np.uint8
    assert np.array_equal(written.affine, source.affine)
    assert all(np.array_equal(written.header[name], source.header[name]) for name in GEOMETRY)
    truth, label = np.asarray(source.dataobj) > 50, np.asarray(written.dataobj) > 0
    assert np.array_equal(label, truth) or (size and (label ^ truth).sum() < 0.25 * truth.sum())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.nii.gz"]


def test_files_folders_and_patterns_are_found_once(tmp_path):
    for name in ("b.nii", "a.nii.gz", "notes.txt", ".hidden.nii"):
        (tmp_path / name).touch()
    expected = [tmp_path / "a.nii.gz", tmp_path / "b.nii"]
    assert find_scans([str(tmp_path)]) == find_scans([str(tmp_path / "*.nii*"), str(tmp_path / "b.nii")]) == expected
    for place, message in (("none*", "no NIfTI file"), ("notes.txt", "not a NIfTI file by its name")):
        with pytest.raises(UserError, match=message):
            find_scans([str(tmp_path / place)])
    (tmp_path / "a.nii").touch()
    with pytest.raises(UserError, match="predictions of one name"):
        find_scans([str(tmp_path)])
