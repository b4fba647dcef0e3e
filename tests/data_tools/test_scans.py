"""NIfTI scans for prediction, and predictions on their own grid."""

import nibabel
import numpy as np
import pytest
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

from data_tools.errors import UserError
from data_tools.scans import Preparation, find_scans, mark_of, on_scan_grid, read_scan, scan_of, write_prediction

AFFINE = np.array([[-0.8, 0, 0, 10], [0, -0.7, 0, 20.3], [0, 0, 3, -40.7], [0, 0, 0, 1.0]])
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
    found_as = Preparation(kind="fixed", low=0, high=100, size=size)
    found = read_scan(tmp_path / "a.nii.gz", found_as)
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
    array = scan_of(np.asarray(source.dataobj), source.affine, found_as)
    assert np.array_equal(array.image, found.image)
    assert np.array_equal(on_scan_grid((found.image > 50).astype(np.uint8), array), np.asarray(written.dataobj))


def test_classes_have_the_values_of_the_source_and_a_prediction_its_mark(tmp_path):
    scan(tmp_path / "a.nii.gz", "LPI")
    found = read_scan(tmp_path / "a.nii.gz", Preparation(kind="percentile", low=0.5, high=99.5))
    classes = (found.image > 50).astype(np.uint8)
    for values, dtype in (((0, 7), np.uint8), ((0, 300), np.uint16), ((0, -3), np.int16)):
        write_prediction(tmp_path / "b.nii", classes, found, values, "made by a test")
        written = nibabel.load(tmp_path / "b.nii")
        assert written.get_data_dtype() == dtype
        assert sorted(np.unique(written.dataobj)) == sorted(values)
        assert mark_of(tmp_path / "b.nii") == "made by a test"
    assert mark_of(tmp_path / "a.nii.gz") == ""
    (tmp_path / "c.nii.gz").write_text("nothing")
    assert mark_of(tmp_path / "c.nii.gz") == mark_of(tmp_path / "missing.nii") == ""


@pytest.mark.parametrize(
    ("volume", "affine", "message"),
    [
        (np.zeros((4, 4)), AFFINE, "three axes"),
        (np.zeros((4, 4, 4), complex), AFFINE, "give numbers"),
        (np.full((4, 4, 4), np.nan), AFFINE, "NaN"),
        (np.zeros((4, 4, 4)), np.zeros((4, 4)), "no direction"),
        (np.zeros((4, 4, 4)), np.eye(3), "no direction"),
    ],
)
def test_an_array_that_is_no_scan_is_refused(volume, affine, message):
    with pytest.raises(UserError, match=message):
        scan_of(volume, affine, Preparation(kind="fixed", low=0, high=1))


@pytest.mark.parametrize("wrong", [{"low": 5}, {"high": float("nan")}, {"size": (0, 5)}])
def test_a_preparation_that_can_not_be_is_refused(wrong):
    with pytest.raises(ValueError, match=r"window|pixels"):
        Preparation(**{"kind": "fixed", "low": 0, "high": 1} | wrong)


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
