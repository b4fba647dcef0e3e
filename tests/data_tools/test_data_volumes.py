import gzip
import tempfile
from pathlib import Path

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nifti_cases import AFFINE, ORIENTATIONS, at_world_places, read, save
from scipy.spatial.transform import Rotation

from data_tools.creation import create_store
from data_tools.errors import UserError
from data_tools.export import export
from data_tools.layouts import Source
from data_tools.nifti import read_header, read_voxels
from data_tools.options import Options
from data_tools.prepare import prepare_case
from data_tools.scans import Preparation, read_scan, write_prediction
from data_tools.store import AXES, open_store
from data_tools.volumes import stored_image, stored_label, to_source_grid

HERE = Path("there.nii.gz")


def read_volume(path: Path, channel: int | None = None) -> np.ndarray:
    """The voxels of a file, as stored."""
    return read_voxels(read_header(path, channel), stored_image)[0]


def as_image(voxels: np.ndarray) -> tuple[np.ndarray, str]:
    return stored_image(np.split(voxels, len(voxels)), len(voxels), HERE)


def as_label(voxels: np.ndarray, mapping, other: bool) -> list[int]:
    return stored_label(mapping, other)([voxels], len(voxels), HERE)[0].tolist()


def prepared(folder: Path, image: Path, label: Path, labels=None):
    """The stored case of two files, its image and its label."""
    store = folder / "s.zarr"
    create_store(store, {"labels": labels or {"organ": [1, 2]}})
    window = {"kind": "fixed", "low": 0, "high": 1}
    result = prepare_case(Options(store, labels or {"organ": [1, 2]}, False, window), Source("a", image, label))
    assert result.status == "prepared", result.note
    return open_store(store).cases["a"], read(store, "a", "image"), read(store, "a", "label")


@settings(deadline=None, max_examples=60)
@given(
    axes=st.sampled_from(ORIENTATIONS),
    label_axes=st.sampled_from(ORIENTATIONS),
    shape=st.tuples(*[st.integers(1, 4)] * 3),
    spacing=st.tuples(*[st.floats(0.3, 5)] * 3),
    tilt=st.tuples(*[st.floats(-12, 12)] * 3),
    dtype=st.sampled_from(["uint8", "int16", "uint16", "int32", "float32", "float64"]),
    scale=st.sampled_from([None, (1, -1024), (2, 0), (0.1, 0.5), (1e4, 0)]),
    suffix=st.sampled_from([".nii", ".nii.gz"]),
    seed=st.integers(0, 1000),
)
def test_to_the_store_and_back(axes, label_axes, shape, spacing, tilt, dtype, scale, suffix, seed):
    random = np.random.default_rng(seed)
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", tilt, degrees=True).as_matrix() * spacing
    affine[:3, 3] = random.uniform(-300, 300, 3)
    voxels = (random.integers(0, 200, shape) * (scale[0] if scale else 1)).astype(dtype)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        image = save(folder / f"image{suffix}", voxels, affine, axes, scale)
        label = save(folder / f"label{suffix}", random.integers(0, 3, shape).astype(np.uint8), affine, label_axes)
        case, stored, stored_labels = prepared(folder, image, label, {"organ": [1], "tumour": [2]})

        for axis, direction in enumerate(AXES):
            world, sign = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}[direction]
            assert sign * case.affine[world, axis] > 0.8 * case.spacing[axis]
        np.testing.assert_allclose(sorted(case.spacing), sorted(spacing), rtol=1e-4)
        source = nibabel.load(image)
        values = np.asanyarray(source.dataobj)
        np.testing.assert_array_equal(stored, at_world_places(case, image).astype(stored.dtype))
        np.testing.assert_array_equal(stored_labels, at_world_places(case, label))

        np.testing.assert_array_equal(to_source_grid(stored, case), values.astype(stored.dtype))
        for kind, original in (("image", image), ("label", label)):
            back = folder / f"back-{kind}{suffix}"
            export(folder / "s.zarr", "a", back, label=kind == "label")
            before, after = nibabel.load(original), nibabel.load(back)
            # Numbers with fractions are stored scaled, as float32.
            exact = kind == "label" or not scale or dtype[0] in "iu"
            np.testing.assert_allclose(after.dataobj, np.asanyarray(before.dataobj), rtol=0 if exact else 1e-6)
            np.testing.assert_allclose(after.affine, before.affine, rtol=1e-6, atol=1e-5)
            assert after.get_data_dtype() == before.get_data_dtype()
        assert case.source["image"]["shape"] == list(source.shape)
        assert case.source["image"]["orientation"] == "".join(nibabel.aff2axcodes(source.affine))
        np.testing.assert_array_equal(case.source["image"]["affine"], source.affine)
        fits = (values == np.round(values)).all() and values.min() >= -32768 and values.max() <= 32767
        assert stored.dtype == ("int16" if fits else "float32")


@settings(deadline=None, max_examples=300)
@given(
    changes=st.lists(st.tuples(st.integers(0, 351), st.integers(0, 255)), min_size=1, max_size=4), zipped=st.booleans()
)
def test_a_damaged_header_is_a_volume_or_an_error(changes, zipped):
    content = bytearray(nibabel.Nifti1Image(np.arange(24, dtype=np.int16).reshape(2, 3, 4), AFFINE).to_bytes())
    for place, value in changes:
        content[place] = value
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / ("a.nii.gz" if zipped else "a.nii")
        path.write_bytes(gzip.compress(content) if zipped else content)
        try:
            volume = read_volume(path)
        except UserError as error:
            message = str(error)
        else:
            message = str(path)
            assert volume.ndim == 3
        assert str(path) in message
        assert "\n" not in message


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("content", [b"", b"junk" * 300, "half", "short", "header", "magic"])
def test_damaged_files(tmp_path, suffix, content):
    good = nibabel.Nifti1Image(np.random.default_rng(0).integers(0, 999, (8, 8, 8), np.int16), AFFINE).to_bytes()
    pack = gzip.compress if suffix == ".nii.gz" else bytes
    made = {
        "half": pack(good)[: len(pack(good)) // 2],
        "short": pack(good[:-10]),
        "header": pack(good[:200]),
        "magic": pack(good[:344] + b"XXXX" + good[348:]),
    }
    path = tmp_path / f"a{suffix}"
    path.write_bytes(made.get(content, content))
    with pytest.raises(UserError, match=rf"a{suffix} is truncated or damaged: copy or download it again") as error:
        read_volume(path)
    assert "\n" not in str(error.value)


def test_nifti_2_and_big_endian(tmp_path):
    voxels = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    for kind in (nibabel.Nifti1Image, nibabel.Nifti2Image):
        for order in "<>":
            header = kind.header_class(endianness=order)
            header.set_data_dtype(np.int16)
            nibabel.save(kind(voxels, AFFINE, header), tmp_path / "a.nii.gz")
            nibabel.save(kind(voxels, AFFINE, header), tmp_path / "a.nii")
            for name in ("a.nii.gz", "a.nii"):
                assert sorted(read_volume(tmp_path / name).ravel()) == list(range(24))


def test_frames_and_channels(tmp_path):
    voxels = np.arange(48, dtype=np.int16).reshape(2, 3, 4, 2)
    one = read_volume(save(tmp_path / "one.nii", voxels[..., :1]))
    assert one.shape == (4, 3, 2)
    several = save(tmp_path / "several.nii", voxels)
    with pytest.raises(UserError, match=r"several.nii: has 2 channels; pick one with --channel 0 … 1"):
        read_volume(several)
    with pytest.raises(UserError, match=r"several.nii: has 2 channels, so there is no --channel 2"):
        read_volume(several, 2)
    assert set(read_volume(several, 1).ravel()) == set(range(1, 48, 2))
    for shape in ((4, 4), (2, 2, 2, 2, 2), (2, 0, 2)):
        with pytest.raises(UserError, match=r"odd.nii.* (is no volume of three axes|damaged)"):
            read_volume(save(tmp_path / "odd.nii", np.zeros(shape, np.int16)))


def test_voxels_that_are_no_numbers(tmp_path):
    path = save(tmp_path / "a.nii", np.zeros((2, 2, 2), [("R", "u1"), ("G", "u1"), ("B", "u1")]))
    with pytest.raises(UserError, match=r"a\.nii: voxels of type .* are not numbers"):
        read_volume(path)


def test_notes_on_where_a_volume_lies(tmp_path):
    voxels = np.zeros((3, 4, 5), np.int16)
    assert read_header(save(tmp_path / "a.nii", voxels)).notes == ()
    turn = np.eye(4)
    turn[:3, :3] = Rotation.from_euler("x", 14, degrees=True).as_matrix()
    (note,) = read_header(save(tmp_path / "a.nii", voxels, turn @ AFFINE)).notes
    assert "oblique by 14°" in note
    orientation, spacing = read_header(save(tmp_path / "a.nii", voxels, None)).notes
    assert "no orientation" in orientation
    assert "no spacing" in spacing


def header_with(path, sform=False, qform=False, affine=AFFINE, steps=(1, 1, 1)):
    """A file whose header says no more than this."""
    image = nibabel.Nifti1Image(np.arange(60, dtype=np.int16).reshape(3, 4, 5), affine)
    image.set_sform(affine, code=int(sform))
    image.set_qform(affine, code=int(qform))
    content = bytearray(image.to_bytes())
    content[80:92] = np.array(steps, "<f4").tobytes()
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    "lacking",
    [
        {},
        {"sform": True, "affine": np.eye(4)},
        {"qform": True, "affine": np.eye(4)},
        {"sform": True, "affine": np.diag([-1, -1, 1, 1])},
    ],
)
def test_spacing_that_the_header_lacks(tmp_path, lacking):
    """As LiTS volumes 28 to 47: an identity affine and 1 mm."""
    path = header_with(tmp_path / "a.nii", **lacking)
    plain, given = read_header(path), read_header(path, spacing=(0.7, 0.8, 2.5))
    assert any("give --spacing" in note for note in plain.notes)
    assert any("0.7,0.8,2.5 mm is taken" in note for note in given.notes)
    assert np.linalg.norm(plain.affine[:3, :3], axis=0).tolist() == [1, 1, 1]
    np.testing.assert_allclose(np.linalg.norm(given.affine[:3, :3], axis=0), (0.7, 0.8, 2.5))
    assert (np.sign(given.affine[:3, :3]) == np.sign(plain.affine[:3, :3])).all()


@pytest.mark.parametrize("known", [{"sform": True}, {"qform": True, "steps": (0.8, 0.7, 2.5)}, {"steps": (2, 3, 4)}])
def test_spacing_that_the_header_has_stays(tmp_path, known):
    path = header_with(tmp_path / "a.nii", **known)
    np.testing.assert_array_equal(read_header(path, spacing=(9, 9, 9)).affine, read_header(path).affine)
    assert not any("spacing" in note for note in read_header(path).notes)


@pytest.mark.parametrize("steps", [(1, 1, -2), (0, 1, 1), (np.nan, 1, 1), (np.inf, 1, 1)])
@pytest.mark.parametrize("qform", [False, True])
def test_spacing_that_is_none(tmp_path, steps, qform):
    path = header_with(tmp_path / "a.nii", qform=qform, steps=steps)
    with pytest.raises(UserError, match=r"a\.nii: (a spacing of|the affine) .* give --spacing"):
        read_header(path)
    affine = read_header(path, spacing=(1, 2, 3)).affine
    np.testing.assert_allclose(np.linalg.norm(affine[:3, :3], axis=0), (1, 2, 3))
    path = header_with(tmp_path / "a.nii", sform=True, steps=steps)
    np.testing.assert_array_equal(read_header(path).affine, AFFINE.astype(np.float32))


def test_whole_numbers_are_int16():
    for voxels in (np.array([-32768, 32767]), np.array([-1024.0, 3071.0]), np.array([True, False])):
        stored, note = as_image(voxels)
        assert stored.dtype == np.int16
        assert not note
        assert stored.tolist() == voxels.tolist()


def test_other_numbers_are_float32_and_roundings_are_told():
    for exact in (np.array([0.5, 2.0]), np.array([0, 32768]), np.array([1.7e6])):
        stored, note = as_image(exact)
        assert stored.dtype == np.float32
        assert not note
        assert stored.tolist() == exact.tolist()
    for voxels, error in ((np.array([1.0, 0.1]), 1.5e-8), (np.array([2**24 + 1]), 6e-8)):
        stored, note = as_image(voxels)
        assert stored.dtype == np.float32
        assert "relative error" in note
        assert float(note.split()[-1]) == pytest.approx(error, rel=0.5)


@pytest.mark.parametrize(
    ("voxels", "message"),
    [
        ([0, np.nan], "1 voxels are NaN or infinite"),
        ([np.inf, -np.inf, 1], "2 voxels are NaN"),
        ([1e300], "do not fit into float32"),
    ],
)
def test_images_that_are_refused(voxels, message):
    with pytest.raises(UserError, match=f"there.nii.gz: .*{message}"):
        as_image(np.array(voxels))


def test_labels():
    mapping = {"organ": [1, 3], "tumour": [2]}
    for dtype in (np.uint8, np.int16, np.float64):
        assert as_label(np.array([0, 1, 2, 3], dtype), mapping, False) == [0, 1, 2, 1]
        assert as_label(np.array([0, 9, 2, 3], dtype), mapping, True) == [0, 0, 2, 1]
    with pytest.raises(UserError, match=r"there.nii.gz: label 7, 9 is not declared; add it to --labels"):
        as_label(np.array([0, 7, 9, 2]), mapping, False)
    for odd in (0.5, np.nan, np.inf):
        with pytest.raises(UserError, match=f"whole numbers, and it holds {odd}"):
            as_label(np.array([0, odd]), mapping, True)


def with_units(path, units, factor):
    """A volume of 0.8 × 0.7 × 2.5 mm whose header has other units."""
    affine = np.diag([factor, factor, factor, 1]) @ AFFINE
    image = nibabel.Nifti1Image(np.zeros((4, 5, 6), np.int16), affine)
    image.header.set_xyzt_units(units)
    nibabel.save(image, path)
    return path


@pytest.mark.parametrize(("units", "factor"), [("meter", 1e-3), ("micron", 1e3), ("mm", 1), ("unknown", 1)])
def test_lengths_are_in_the_units_of_the_header(tmp_path, units, factor):
    header = read_header(with_units(tmp_path / "a.nii.gz", units, factor))
    np.testing.assert_allclose(header.affine, AFFINE, rtol=1e-5)
    assert not header.lacks_spacing
    assert len(header.notes) == (units in ("meter", "micron"))


@pytest.mark.parametrize("units", ["meter", "micron"])
def test_units_that_no_patient_has(tmp_path, units):
    with pytest.raises(UserError, match=r"a\.nii\.gz: its units are (micro)?metres, so that a voxel would"):
        read_header(with_units(tmp_path / "a.nii.gz", units, 1))


def test_a_spacing_that_is_given_is_in_mm(tmp_path):
    image = nibabel.Nifti1Image(np.zeros((4, 5, 6), np.int16), np.eye(4))
    image.header.set_xyzt_units("meter")
    nibabel.save(image, tmp_path / "a.nii")
    header = read_header(tmp_path / "a.nii", spacing=(0.5, 0.75, 5))
    np.testing.assert_allclose(np.linalg.norm(header.affine[:3, :3], axis=0), (0.5, 0.75, 5))


@pytest.mark.parametrize(("units", "factor"), [("meter", 1e-3), ("mm", 1)])
def test_a_prediction_is_written_in_the_units_of_the_scan(tmp_path, units, factor):
    scan = read_scan(with_units(tmp_path / "a.nii.gz", units, factor), Preparation(kind="fixed", low=0, high=1))
    assert scan.spacing == pytest.approx((2.5, 0.7, 0.8))
    write_prediction(tmp_path / "out.nii.gz", scan.image.astype(np.uint8), scan)
    source, out = (nibabel.load(tmp_path / name) for name in ("a.nii.gz", "out.nii.gz"))
    np.testing.assert_array_equal(out.affine, source.affine)
    assert out.header.get_xyzt_units()[0] == units
