import nibabel
import numpy as np
import pytest
import zarr
from nifti_cases import read, save

from data_tools.cli import main
from data_tools.store import open_store

AFFINE = np.array([[0, 0, 2.5, -200], [-0.8, 0, 0, 90], [0, -0.7, 0, 60], [0, 0, 0, 1]])


@pytest.fixture
def store(tmp_path):
    """One case whose labels 1 and 3 are the organ and 7 the tumour, and whose axes are in an odd order."""
    random = np.random.default_rng(0)
    folder = tmp_path / "in/case_1"
    save(folder / "imaging.nii.gz", random.integers(0, 100, (8, 6, 5), np.uint8), AFFINE, scale=(2, -100))
    save(folder / "segmentation.nii.gz", random.choice([0, 1, 7], (8, 6, 5)).astype(np.int16), AFFINE, "LPS")
    return prepare(tmp_path, "s.zarr")


def prepare(tmp_path, name, *more):
    line = ["prepare", str(tmp_path / "in"), str(tmp_path / name), "--layout", "kits", "--labels", "organ=1+3,tumour=7"]
    assert main([*line, "--workers", "1", *more]) == 0
    return tmp_path / name


def export(store, out, *more):
    return main(["export", str(store), "case_1", str(out), *map(str, more)])


def same(a, b):
    a, b = nibabel.load(a), nibabel.load(b)
    np.testing.assert_array_equal(np.asanyarray(a.dataobj), np.asanyarray(b.dataobj))
    np.testing.assert_allclose(a.affine, b.affine, atol=1e-5)
    assert a.get_data_dtype() == b.get_data_dtype()
    assert a.header["scl_slope"] == b.header["scl_slope"] or np.isnan(a.header["scl_slope"] + b.header["scl_slope"])


def test_image_and_label_are_those_of_the_source(store, tmp_path):
    assert export(store, tmp_path / "out/image.nii.gz") == 0
    same(tmp_path / "out/image.nii.gz", tmp_path / "in/case_1/imaging.nii.gz")
    assert export(store, tmp_path / "label.nii", "--label") == 0
    same(tmp_path / "label.nii", tmp_path / "in/case_1/segmentation.nii.gz")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["image.nii.gz"]


def test_a_prediction_lies_where_the_image_does(store, tmp_path):
    label = read(store, "case_1", "label")
    np.save(tmp_path / "p.npy", label.astype(np.int64))
    zarr.create_array(tmp_path / "p.zarr", data=label, chunks=(1, *label.shape[1:]))
    for name in ("p.npy", "p.zarr"):
        out = tmp_path / f"{name}.nii.gz"
        assert export(store, out, "--prediction", tmp_path / name) == 0
        found, image = nibabel.load(out), nibabel.load(tmp_path / "in/case_1/imaging.nii.gz")
        assert found.shape == image.shape
        assert found.get_data_dtype() == np.uint8
        np.testing.assert_allclose(found.affine, image.affine, atol=1e-5)
        truth = nibabel.load(tmp_path / "in/case_1/segmentation.nii.gz").as_reoriented(
            nibabel.orientations.ornt_transform(
                nibabel.io_orientation(nibabel.load(tmp_path / "in/case_1/segmentation.nii.gz").affine),
                nibabel.io_orientation(image.affine),
            )
        )
        np.testing.assert_array_equal(np.asanyarray(found.dataobj), np.array([0, 1, 0, 0, 0, 0, 0, 2])[truth.dataobj])


def test_resampled_slices_come_back_to_the_source_grid(tmp_path):
    """Twice the pixels and back: the nearest label is the same one, and a smooth image nearly so."""
    smooth = np.add.outer(np.add.outer(np.arange(8) * 10.0, np.arange(6) * 3.0), np.arange(5)) + 0.5
    label = np.random.default_rng(0).choice([0, 1, 7], (8, 6, 5)).astype(np.uint8)
    save(tmp_path / "in/case_1/imaging.nii.gz", smooth, AFFINE)
    save(tmp_path / "in/case_1/segmentation.nii.gz", label, AFFINE)
    store = prepare(tmp_path, "s.zarr", "--size", "18,24")
    assert open_store(store).cases["case_1"].shape[1:] == (18, 24)
    assert export(store, tmp_path / "label.nii.gz", "--label") == 0
    same(tmp_path / "label.nii.gz", tmp_path / "in/case_1/segmentation.nii.gz")
    assert export(store, tmp_path / "image.nii.gz") == 0
    back = nibabel.load(tmp_path / "image.nii.gz")
    np.testing.assert_allclose(back.affine, AFFINE, atol=1e-5)
    np.testing.assert_allclose(back.get_fdata()[1:-1, 1:-1, 1:-1], smooth[1:-1, 1:-1, 1:-1], atol=0.01)


def test_mistakes_are_one_line(store, tmp_path, capsys):
    (tmp_path / "there.nii.gz").touch()
    np.save(tmp_path / "small.npy", np.zeros((2, 2, 2)))
    np.savez(tmp_path / "several.npz", a=np.zeros(3))
    (tmp_path / "text.npy").write_text("hello")
    out = tmp_path / "new.nii.gz"
    for message, *line in (
        ("must end in .nii.gz", "case_1", tmp_path / "a.mha"),
        ("exists; remove it", "case_1", tmp_path / "there.nii.gz"),
        ("no case 'case_2'; did you mean case_1", "case_2", out),
        ("'../x'", "../x", out),
        ("is needed, not float64 2×2×2", "case_1", out, "--prediction", tmp_path / "small.npy"),
        ("is needed, not", "case_1", out, "--prediction", tmp_path / "several.npz"),
        ("no .npy file", "case_1", out, "--prediction", tmp_path / "text.npy"),
        ("no .npy file", "case_1", out, "--prediction", tmp_path / "none.npy"),
        ("can't be opened", "case_1", out, "--prediction", tmp_path / "in"),
    ):
        capsys.readouterr()
        assert main(["export", str(store), *map(str, line)]) == 2
        (error,) = capsys.readouterr().err.splitlines()
        assert message in error
    assert not out.exists()
    shard = store / "cases/case_1/image/c/0/0/0"
    shard.write_bytes(shard.read_bytes()[:-9])
    assert export(store, out) == 2
    assert "case case_1 is damaged" in capsys.readouterr().err
    assert not out.exists()
