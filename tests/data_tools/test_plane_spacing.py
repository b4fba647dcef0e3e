"""Slices resampled by mm: prepare, dry run, verify, and back to NIfTI."""

import nibabel
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nifti_cases import ORIENTATIONS, save

from data_tools.cli import main
from data_tools.nifti import read_header
from data_tools.scans import Preparation, on_scan_grid, read_scan
from data_tools.store import open_store

KITS = ("--layout", "kits", "--labels", "organ=1,tumour=2", "--workers", "1")


def blob(shape):
    """A smooth image and its label: a ball in the middle, large enough to survive any resampling here."""
    places = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"))
    distance = np.sqrt((places**2).sum(axis=0))
    return (1000 - 800 * distance).astype(np.int16), (distance < 0.6).astype(np.uint8)


@given(
    axes=st.sampled_from(ORIENTATIONS),
    shape=st.tuples(st.integers(24, 40), st.integers(24, 40), st.integers(4, 7)),
    steps=st.tuples(*[st.floats(0.4, 2.5)] * 3),
    wanted=st.tuples(st.floats(0.5, 2), st.floats(0.5, 2)),
)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_case_has_the_spacing_and_lies_where_it_did(tmp_path_factory, axes, shape, steps, wanted):
    folder = tmp_path_factory.mktemp("spacing")
    affine = np.diag([-steps[0], -steps[1], steps[2], 1.0])
    affine[:3, 3] = 10, -20, 30
    image, label = blob(shape)
    source = save(folder / "in/case_1/imaging.nii.gz", image, affine, axes)
    save(folder / "in/case_1/segmentation.nii.gz", label, affine, axes)
    line = ["prepare", str(folder / "in"), str(folder / "s.zarr"), *KITS]
    assert main([*line, "--plane-spacing", f"{wanted[0]},{wanted[1]}"]) == 0
    case = open_store(folder / "s.zarr").cases["case_1"]
    header = read_header(source)
    plane = np.array(header.stored_shape[1:]) * np.linalg.norm(header.stored_affine[:3, 1:3], axis=0)
    assert case.shape[1:] == tuple(np.maximum(1, np.round(plane / wanted)).astype(int))
    # A whole number of pixels covers the same area: each is off by half a pixel in all of them at most.
    for found, asked, count in zip(case.spacing[1:], wanted, case.shape[1:], strict=True):
        assert abs(found - asked) <= 0.5 * max(found, asked) / count + 1e-9
    assert np.prod([case.shape[1:], case.spacing[1:]], axis=0) == pytest.approx(plane)
    centre = (np.array(case.shape) - 1) / 2
    before = (np.array(header.stored_shape) - 1) / 2
    np.testing.assert_allclose(case.affine @ [*centre, 1], header.stored_affine @ [*before, 1], atol=1e-4)
    assert main(["export", str(folder / "s.zarr"), "case_1", str(folder / "label.nii"), "--label"]) == 0
    back, truth = nibabel.load(folder / "label.nii"), nibabel.load(folder / "in/case_1/segmentation.nii.gz")
    np.testing.assert_allclose(back.affine, truth.affine, atol=1e-5)
    back, truth = (np.asarray(volume.dataobj) > 0 for volume in (back, truth))
    assert back.shape == truth.shape
    assert 2 * (back & truth).sum() / (back.sum() + truth.sum()) > 0.85
    scan = read_scan(source, Preparation.of_store(open_store(folder / "s.zarr").attributes))
    assert scan.image.shape == case.shape
    assert on_scan_grid(np.zeros(case.shape, np.uint8), scan).shape == nibabel.load(source).shape


@pytest.fixture
def case(tmp_path):
    image, label = blob((20, 30, 4))
    affine = np.diag([-0.9, -0.6, 3.0, 1.0])
    save(tmp_path / "in/case_1/imaging.nii.gz", image, affine)
    save(tmp_path / "in/case_1/segmentation.nii.gz", label, affine)
    return ["prepare", str(tmp_path / "in"), str(tmp_path / "s.zarr"), *KITS]


def test_dry_run_verify_and_a_second_run_know_it(case, tmp_path, capsys):
    assert main([*case, "--plane-spacing", "0.9", "--dry-run"]) == 0
    assert "20×20" in capsys.readouterr().out
    assert main([*case, "--plane-spacing", "0.9"]) == 0
    assert open_store(tmp_path / "s.zarr").cases["case_1"].spacing == pytest.approx((3, 0.9, 0.9))
    assert main(["verify", str(tmp_path / "s.zarr"), "--source", str(tmp_path / "in")]) == 0
    capsys.readouterr()
    assert main([*case, "--plane-spacing", "1"]) == 2
    assert "was made with plane_spacing=[0.9, 0.9]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--plane-spacing", "0"), "--plane-spacing 0: write a length in mm"),
        (("--plane-spacing", "1,2,3"), "--plane-spacing 1,2,3: write a length"),
        (("--plane-spacing", "nan"), "--plane-spacing nan: write"),
        (("--plane-spacing", "0.8", "--size", "64"), "--size and --plane-spacing both say"),
        (("--plane-spacing", "0.001"), "makes 18000×18000 pixels of its slices"),
    ],
)
def test_what_can_not_be_is_one_line(case, capsys, given, message):
    assert main([*case, *given]) != 0
    error = capsys.readouterr().err
    assert message in error
    assert sum("error" in line or "plane" in line for line in error.splitlines()) <= 2
    assert "Traceback" not in error
