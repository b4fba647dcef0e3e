import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel
import numpy as np
import psutil
import pytest
from conftest import ROOT
from nifti_cases import AFFINE, all_but_identity, all_files, at_world_places, read, rewrite_json, save, save_kits

from data_tools.cli import main
from data_tools.errors import UserError
from data_tools.labels import parse_labels
from data_tools.options import default_window, parse_window
from data_tools.store import open_store

LABELS = ("--labels", "organ=1,tumour=2")


@pytest.fixture
def kits(tmp_path):
    return save_kits(tmp_path / "kits")


@pytest.fixture
def prepare(tmp_path, capsys):
    """Run `spark-data prepare` in one process: exit code, lines of stdout and of stderr."""

    def prepare(*arguments, store="s.zarr"):
        capsys.readouterr()
        given, rest = arguments[0], [str(part) for part in arguments[1:]]
        code = main(["prepare", str(given), str(tmp_path / store), "--workers", "1", *rest])
        out, err = capsys.readouterr()
        return code, out.splitlines(), err.splitlines()

    return prepare


def prepare_kits(prepare, kits, *more, **store):
    return prepare(kits, "--layout", "kits", *LABELS, *more, **store)


def test_kits(kits, prepare, tmp_path):
    code, out, err = prepare_kits(prepare, kits)
    assert (code, err) == (0, [])
    assert out[-1] == "3 cases: 3 prepared, 0 unchanged, 0 failed; window -200…300"
    store = open_store(tmp_path / "s.zarr")
    assert store.attributes["labels"] == {"organ": [1], "tumour": [2]}
    assert store.attributes["window"] == {"kind": "fixed", "low": -200, "high": 300}
    assert store.attributes["layout"] == "kits"
    for name, case in store.cases.items():
        for key, file in (("image", "imaging"), ("label", "segmentation")):
            source = kits / name / f"{file}.nii.gz"
            np.testing.assert_array_equal(read(store.path, name, key), at_world_places(case, source))
            assert case.source[key]["file"] == source.name
        assert case.spacing == pytest.approx((2.5, 0.7, 0.8))
        assert case.window == (-200, 300)
        assert len(case.slices_with("organ")) == 4
        assert len(case.slices_with("tumour")) == 1


@pytest.mark.parametrize("axes", ["RAS", "LPS", "IPL", "SAR", "PIR"])
def test_a_real_ct_in_any_orientation(shared, prepare, tmp_path, axes):
    """Every stored voxel is the source's at its place in the world, and the stored array is the same for all."""
    files = {}
    for k, kind in enumerate(("ct", "organs")):
        source = nibabel.load(shared / "real_ct" / f"abdomen_3mm_{kind}.nii.gz")
        turned = axes if k == 0 else axes[::-1]
        files[kind] = save(tmp_path / f"in/case_{kind}.nii.gz", np.asanyarray(source.dataobj), source.affine, turned)
    patterns = ("--image-pattern", "{case}_ct.nii.gz", "--label-pattern", "{case}_organs.nii.gz")
    options = ("--layout", "pairs", *patterns, "--labels", "organ=5", "--other", "background")
    code, _, err = prepare(tmp_path / "in", *options)
    assert (code, err) == (0, [])
    code, _, err = prepare(shared / "real_ct", *options, store="original.zarr")
    assert (code, err) == (0, [])
    store, original = open_store(tmp_path / "s.zarr"), open_store(tmp_path / "original.zarr")
    case, first = store.cases["case"], original.cases["abdomen_3mm"]
    assert case.shape == first.shape == (30, 101, 122)
    assert case.dtype == "int16"
    np.testing.assert_allclose(case.affine, first.affine, atol=1e-3)
    image, label = read(store.path, "case", "image"), read(store.path, "case", "label")
    np.testing.assert_array_equal(image, at_world_places(case, files["ct"]))
    np.testing.assert_array_equal(label, at_world_places(case, files["organs"]) == 5)
    np.testing.assert_array_equal(image, read(original.path, "abdomen_3mm", "image"))
    np.testing.assert_array_equal(label, read(original.path, "abdomen_3mm", "label"))
    # Known of a supine patient: the liver lies to the right, the spine's bone behind it.
    assert (np.argwhere(label)[:, 2] < 61).mean() > 0.8
    assert np.argwhere(image > 300)[:, 1].mean() > np.argwhere(label)[:, 1].mean()


def test_real_mr(shared, prepare, tmp_path):
    source = shared / "hippocampus"
    description = json.loads((source / "dataset.json").read_text())
    description["training"] = description["training"][:150:37]
    (tmp_path / "msd").mkdir()
    for pair in description["training"]:
        for file in pair.values():
            (tmp_path / "msd" / file).parent.mkdir(exist_ok=True)
            shutil.copy(source / file, tmp_path / "msd" / file)
    (tmp_path / "msd" / "dataset.json").write_text(json.dumps(description))
    code, out, err = prepare(tmp_path / "msd", "--layout", "msd", *LABELS)
    assert (code, err) == (0, [])
    assert "window 0.5…99.5 percentile of each case" in out[-1]
    store = open_store(tmp_path / "s.zarr")
    assert store.attributes["window"] == {"kind": "percentile", "low": 0.5, "high": 99.5}
    assert len(store.cases) == len(description["training"]) == 5
    for name, case in store.cases.items():
        image = at_world_places(case, source / "imagesTr" / f"{name}.nii.gz")
        np.testing.assert_array_equal(read(store.path, name, "image"), image)
        label = at_world_places(case, source / "labelsTr" / f"{name}.nii.gz")
        np.testing.assert_array_equal(read(store.path, name, "label"), label)
        assert case.window == pytest.approx(np.percentile(image, (0.5, 99.5)))
        assert case.spacing == pytest.approx((1, 1, 1))


def damage_cut(case):
    file = case / "imaging.nii.gz"
    file.write_bytes(file.read_bytes()[:-200])


def damage_world(case):
    save(case / "segmentation.nii.gz", np.zeros((12, 10, 6), np.uint8), np.diag([1, 1, 1.05, 1]) @ AFFINE)


def image_with(value):
    return lambda case: save(case / "imaging.nii.gz", np.full((12, 10, 6), value))


def label_with(value):
    return lambda case: save(case / "segmentation.nii.gz", np.full((12, 10, 6), value))


def remove(name):
    return lambda case: (case / name).unlink()


DAMAGES = {
    "no segmentation": (remove("segmentation.nii.gz"), "case_00001/segmentation.nii.gz: no such file"),
    "no image": (remove("imaging.nii.gz"), "case_00001/imaging.nii.gz: no such file"),
    "cut off": (damage_cut, "case_00001/imaging.nii.gz is truncated or damaged: copy or download it again"),
    "no bytes": (
        lambda case: (case / "segmentation.nii.gz").write_bytes(b""),
        "case_00001/segmentation.nii.gz is truncated or damaged",
    ),
    "another shape": (
        lambda case: save(case / "segmentation.nii.gz", np.zeros((12, 10, 7), np.uint8)),
        "segmentation.nii.gz: image of [12, 10, 6] and label of [12, 10, 7] voxels differ in shape; resample",
    ),
    "another place": (
        damage_world,
        "case_00001/imaging.nii.gz and segmentation.nii.gz: image and label lie up to 14 vox",
    ),
    "NaN": (image_with(np.nan), "case_00001/imaging.nii.gz: 720 voxels are NaN or infinite"),
    "too large": (image_with(1e300), "case_00001/imaging.nii.gz: voxels up to 1e+300 do not fit into float32"),
    "undeclared": (label_with(3.0), "case_00001/segmentation.nii.gz: label 3 is not declared; add it to --labels"),
    "no whole label": (
        label_with(0.5),
        "segmentation.nii.gz: labels must be whole numbers, and it holds 0.5",
    ),
    "channels": (
        lambda case: save(case / "imaging.nii.gz", np.zeros((12, 10, 6, 2), np.int16)),
        "case_00001/imaging.nii.gz: has 2 channels; pick one with --channel",
    ),
    "two images": (
        lambda case: save(case / "imaging.nii", np.zeros((12, 10, 6), np.int16)),
        "case_00001/imaging.nii.gz have one case name; rename or remove all but one",
    ),
    "two labels": (
        lambda case: save(case / "segmentation.nii", np.zeros((12, 10, 6), np.uint8)),
        "case_00001/segmentation.nii.gz have one case name; rename or remove all but one",
    ),
    "no name": (
        lambda case: case.rename(case.with_name("case_[red]1")),
        "'case_[red]1' can't be the name of a case",
    ),
    "a folder": (
        lambda case: [(case / "imaging.nii.gz").unlink(), (case / "imaging.nii.gz").mkdir()],
        "case_00001/imaging.nii.gz: no such file",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_bad_case_is_one_line_and_the_others_are_prepared(kits, prepare, tmp_path, damage, message):
    damage(kits / "case_00001")
    code, out, err = prepare_kits(prepare, kits)
    assert code == 1
    (line,) = err
    assert line.startswith("error: case_")
    assert message in line
    assert out[-1].startswith("3 cases: 2 prepared, 0 unchanged, 1 failed")
    assert list(open_store(tmp_path / "s.zarr").cases) == ["case_00000", "case_00002"]
    assert len([folder for folder in (tmp_path / "s.zarr" / "cases").iterdir() if folder.is_dir()]) == 2


def test_two_files_with_one_number(prepare, tmp_path):
    for name in ("volume-1", "volume-01", "volume-2"):
        save(tmp_path / "lits" / f"{name}.nii", np.zeros((4, 4, 4), np.int16))
        save(tmp_path / "lits" / f"{name.replace('volume', 'segmentation')}.nii", np.zeros((4, 4, 4), np.uint8))
    code, out, err = prepare(tmp_path / "lits", "--layout", "lits", *LABELS)
    assert code == 1
    assert len(err) == 1
    assert "volume-01.nii and " in err[0]
    assert "volume-1.nii have one case name" in err[0]
    assert out[-1] == "2 cases: 1 prepared, 0 unchanged, 1 failed; window -60…140"


def test_a_constant_image_has_no_percentiles(kits, prepare):
    image_with(7.0)(kits / "case_00001")
    code, _, err = prepare_kits(prepare, kits, "--window", "percentile")
    assert code == 1
    assert len(err) == 1
    assert "case_00001/imaging.nii.gz: a constant image, nearly all voxels are 7" in err[0]
    assert prepare_kits(prepare, kits, "--window", "-10,10.5", store="fixed.zarr")[0] == 0


def test_a_file_that_may_not_be_read(kits, prepare):
    if os.geteuid() != 0:
        pytest.skip("needs root, to become somebody else and back")
    main(["prepare", str(kits), str(kits.parent / "s.zarr"), "--layout", "kits", *LABELS, "--workers", "1"])
    file = kits / "case_00001" / "imaging.nii.gz"
    file.chmod(0)
    for folder in (kits, *kits.parents[:3]):
        folder.chmod(folder.stat().st_mode | 0o755)
    subprocess.run(["chmod", "-R", "a+rw", kits.parent / "s.zarr"], check=True)
    os.seteuid(65534)
    try:
        if not os.access(kits / "case_00000" / "imaging.nii.gz", os.R_OK, effective_ids=True):
            pytest.skip("others can't reach the temporary folder")
        code, out, err = prepare_kits(prepare, kits)
    finally:
        os.seteuid(0)
    assert code == 1
    assert len(err) == 1
    assert f"{file}: Permission denied; mend that" in err[0]
    assert "2 unchanged, 1 failed" in out[-1]


def test_a_full_disk(kits, prepare, small_disk):
    disk = small_disk("64k")
    noise = np.random.default_rng(0).integers(-1000, 1000, (64, 64, 16), np.int16)
    save(kits / "case_00001" / "imaging.nii.gz", noise)
    save(kits / "case_00001" / "segmentation.nii.gz", np.zeros(noise.shape, np.uint8))
    code, out, err = prepare_kits(prepare, kits, store=disk / "s.zarr")
    assert code == 1
    assert len(err) == 1
    assert f"{disk}/s.zarr" in err[0]
    assert "No space left on device; mend that and run the command again" in err[0]
    assert list(open_store(disk / "s.zarr").cases) == ["case_00000", "case_00002"]
    assert "2 prepared, 0 unchanged, 1 failed" in out[-1]


def test_a_disk_that_fills_up_says_so_without_a_mount(kits, prepare, monkeypatch):
    """The same where no small disk can be mounted: the second case meets a full disk."""
    import data_tools.prepare as module

    real = module.write_case

    def write_case(store, name, *rest):
        if name == "case_00001":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(store, name, *rest)

    monkeypatch.setattr(module, "write_case", write_case)
    code, _, err = prepare_kits(prepare, kits)
    assert code == 1
    assert len(err) == 1
    assert "s.zarr: No space left on device" in err[0]


def test_a_store_of_another_version(kits, prepare, tmp_path):
    prepare_kits(prepare, kits)
    file = tmp_path / "s.zarr" / "zarr.json"
    rewrite_json(file, attributes=json.loads(file.read_text())["attributes"] | {"version": 0})
    code, _, err = prepare_kits(prepare, kits)
    assert code == 2
    assert len(err) == 1
    assert "s.zarr: this store was made with version=0, not 2" in err[0]


def test_other_options_need_another_store(kits, prepare):
    prepare_kits(prepare, kits)
    for more in (("--window", "0,1"), ("--other", "background"), ("--channel", "1")):
        code, _, err = prepare_kits(prepare, kits, *more)
        assert code == 2
        assert len(err) == 1
        assert "this store was made with" in err[0]


def test_only_what_changed_is_prepared_again(kits, prepare, tmp_path):
    prepare_kits(prepare, kits)
    before = all_files(tmp_path / "s.zarr")
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "s.zarr").rglob("*")}
    code, out, _ = prepare_kits(prepare, kits)
    assert code == 0
    assert "0 prepared, 3 unchanged, 0 failed" in out[-1]
    assert times == {file: file.stat().st_mtime_ns for file in (tmp_path / "s.zarr").rglob("*")}
    save(kits / "case_00001" / "segmentation.nii.gz", np.zeros((12, 10, 6), np.uint8))
    code, out, (line,) = prepare_kits(prepare, kits)
    assert code == 1
    assert "the store has a case case_00001 of other files (label); pass --replace to replace it" in line
    assert all_files(tmp_path / "s.zarr") == before
    _, out, _ = prepare_kits(prepare, kits, "--replace")
    assert "1 prepared, 2 unchanged, 0 failed" in out[-1]
    changed = {name for name, content in all_files(tmp_path / "s.zarr").items() if before[name] != content}
    assert changed == {"cases/case_00001/zarr.json", "cases/case_00001/label/c/0/0/0"}
    assert not read(tmp_path / "s.zarr", "case_00001", "label").any()


def test_cases_that_left_the_input_are_counted(kits, prepare):
    prepare_kits(prepare, kits)
    shutil.rmtree(kits / "case_00001")
    assert "2 unchanged, 0 failed; 1 more in the store;" in prepare_kits(prepare, kits)[1][-1]


def test_notes_are_printed(kits, prepare):
    image_with(0.1)(kits / "case_00001")
    _, out, err = prepare_kits(prepare, kits)
    assert not err
    (note,) = (line for line in out if line.startswith("note: "))
    assert note.startswith("note: case_00001: stored as float32 with a relative error of up to 1e-08")


def test_unlabelled_volumes(kits, prepare, tmp_path):
    (kits / "case_00001" / "segmentation.nii.gz").unlink()
    code, _, err = prepare_kits(prepare, kits)
    assert code == 1
    assert "case_00001/segmentation.nii.gz: no such file; put it there, or pass --unlabelled to store it" in err[0]
    code, out, _ = prepare_kits(prepare, kits, "--unlabelled")
    assert code == 0
    assert "1 prepared, 2 unchanged, 0 failed" in out[-1]
    store = open_store(tmp_path / "s.zarr")
    assert [case.labelled for case in store.cases.values()] == [True, False, True]
    image = at_world_places(store.cases["case_00001"], kits / "case_00001" / "imaging.nii.gz")
    np.testing.assert_array_equal(read(store.path, "case_00001", "image"), image)
    save(kits / "case_00001" / "segmentation.nii.gz", np.ones((12, 10, 6), np.uint8))
    assert "1 prepared, 2 unchanged" in prepare_kits(prepare, kits)[1][-1]
    assert open_store(tmp_path / "s.zarr").cases["case_00001"].labelled
    for case in kits.iterdir():
        (case / "segmentation.nii.gz").unlink()
    assert prepare(kits, "--layout", "kits", "--unlabelled", store="bare.zarr")[0] == 0


@pytest.mark.parametrize("size", [(7, 19), (24, 20), (10, 12), (4, 8)])
def test_slices_of_another_size_cover_the_same_place(prepare, tmp_path, size):
    """A volume that is linear in the world's coordinates stays so under linear resampling, up to the border."""
    affine = np.array([[-0.8, 0.1, 0, 90], [0.1, -0.7, 0, 60], [0, 0, 2.5, -200], [0, 0, 0, 1]])
    shape, slope, folder = (12, 10, 6), np.array([3.0, -5.0, 2.0]), tmp_path / "in/case_1"

    def values(affine, shape):
        return np.tensordot(slope @ affine[:3, :3], np.indices(shape), 1) + slope @ affine[:3, 3] + 0.1

    label = np.zeros(shape, np.uint8)
    label[3:9, 2:8] = 1
    save(folder / "imaging.nii.gz", values(affine, shape), affine)
    save(folder / "segmentation.nii.gz", label, affine)
    code, out, _ = prepare(tmp_path / "in", "--layout", "kits", *LABELS, "--size", ",".join(map(str, size)))
    assert code == 0
    case = open_store(tmp_path / "s.zarr").cases["case_1"]
    assert case.shape == (6, *size)
    assert any("resampled from 10×12" in line for line in out) == (size != (10, 12))
    corners = [affine @ (*end, 0, 1) for end in ((-0.5, -0.5), (11.5, 9.5))]  # of the outer pixels
    stored = [case.affine @ (5, *end, 1) for end in ((-0.5, -0.5), (size[0] - 0.5, size[1] - 0.5))]
    np.testing.assert_allclose(stored, corners, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(case.affine[:3, :3], axis=0), case.spacing)
    inner = np.s_[:, size[0] // 10 + 1 : -size[0] // 10 - 1, size[1] // 10 + 1 : -size[1] // 10 - 1]
    image = read(tmp_path / "s.zarr", "case_1", "image")
    np.testing.assert_allclose(image[inner], values(case.affine, case.shape)[inner], atol=2e-2)
    row, column = (np.rint((np.arange(n) + 0.5) * m / n - 0.5) for n, m in zip(size, (10, 12), strict=True))
    inside = ((row >= 2) & (row < 8))[:, None] & ((column >= 3) & (column < 9))
    np.testing.assert_array_equal(read(tmp_path / "s.zarr", "case_1", "label")[0], inside)


def test_spacing_for_files_that_have_none(prepare, tmp_path):
    for k, affine in enumerate((np.eye(4), AFFINE)):
        save(tmp_path / f"lits/volume-{k}.nii", np.ones((4, 5, 6), np.int16), affine)
        save(tmp_path / f"lits/segmentation-{k}.nii", np.ones((4, 5, 6), np.uint8), affine)

    def prepare_lits(*more):
        return prepare(tmp_path / "lits", "--layout", "lits", *LABELS, *more)

    _, out, _ = prepare_lits()
    (note,) = (line for line in out if line.startswith("note: "))
    assert note.startswith("note: volume-000: the header has no spacing")
    _, out, _ = prepare_lits("--spacing", "0.5,0.75,5")
    assert "1 prepared, 1 unchanged" in out[-1]
    cases = open_store(tmp_path / "s.zarr").cases
    assert cases["volume-000"].spacing == pytest.approx((5, 0.75, 0.5))
    assert cases["volume-001"].spacing == pytest.approx((2.5, 0.7, 0.8))
    assert "2 unchanged" in prepare_lits("--spacing", "0.5,0.75,5")[1][-1]
    assert "2 unchanged" in prepare_lits()[1][-1]


def test_only_some_cases(prepare, tmp_path):
    kits = save_kits(tmp_path / "kits", 12)
    assert "2 cases: 2 prepared" in prepare_kits(prepare, kits, "--only", "case_00003,case_00001")[1][-1]
    assert list(open_store(tmp_path / "s.zarr").cases) == ["case_00001", "case_00003"]
    out = prepare_kits(prepare, kits, "--only", "case_0001?,case_00001")[1]
    assert "3 cases: 2 prepared, 1 unchanged, 0 failed; 1 more in the store" in out[-1]
    code, _, err = prepare_kits(prepare, kits, "--only", "case_0003")
    assert code == 2
    assert err[0].startswith("error: --only case_0003: there is no case 'case_0003'; did you mean case_0000")


@pytest.mark.parametrize(
    "wrong", ["--part 0/2", "--part 3/2", "--part 1", "--part a/b", "--size 0", "--size 1,2,3", "--spacing 1,1"]
)
def test_options_that_are_none(kits, prepare, wrong):
    code, _, (line,) = prepare_kits(prepare, kits, *wrong.split())
    assert code == 2
    assert line.startswith(f"error: {wrong}: write ")


@pytest.fixture(scope="module")
def thirty(tmp_path_factory):
    """Thirty cases of noise, and the store of a run that nobody disturbed. They are large enough for a run to last
    seconds, so that it can be disturbed on a busy machine too."""
    folder = tmp_path_factory.mktemp("thirty")
    random = np.random.default_rng(0)
    for k in range(30):
        save(folder / "nii" / f"{k:02}_ct.nii.gz", random.integers(-1000, 1000, (320, 300, 20), np.int16))
        save(folder / "nii" / f"{k:02}_seg.nii.gz", random.integers(0, 3, (320, 300, 20)).astype(np.uint8))
    start(folder / "nii", folder / "whole.zarr", "1").communicate(timeout=60)
    return folder


def start(source: Path, store: Path, workers: str, *more: str) -> subprocess.Popen:
    """`spark-data prepare` in a process group of its own."""
    patterns = ["--image-pattern", "{case}_ct.nii.gz", "--label-pattern", "{case}_seg.nii.gz", "--workers", workers]
    command = [sys.executable, "-m", "data_tools", "prepare", source, store, "--layout", "pairs", *LABELS, *patterns]
    pipe = subprocess.PIPE
    # A shell starts what runs in the background with Ctrl-C ignored, the tests' run perhaps.
    return subprocess.Popen(
        [*command, *more],
        cwd=ROOT,
        stdout=pipe,
        stderr=pipe,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.mark.parametrize("parts", [("--part 1/3", "--part 2/3", "--part 3/3"), ("", "--part 1/2", "")])
def test_several_runs_into_one_store_at_once(thirty, tmp_path, parts):
    """Each case is prepared once, whoever does it, and the store is as if one run had made it."""
    runs = [start(thirty / "nii", tmp_path / "s.zarr", "1", *part.split()) for part in parts]
    ends = [run.communicate(timeout=120) for run in runs]
    assert [(run.returncode, err) for run, (_, err) in zip(runs, ends, strict=True)] == [(0, "")] * 3
    prepared = [int(re.search(r"(\d+) prepared", out)[1]) for out, _ in ends]
    assert sum(prepared) == 30
    if all(parts):
        assert prepared == [10, 10, 10]
    assert all_but_identity(tmp_path / "s.zarr") == all_but_identity(thirty / "whole.zarr")


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def complete(store: Path) -> int:
    try:
        return len(open_store(store).cases)
    except UserError:
        return 0


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda s: s.name)
def test_a_run_that_is_ended_goes_on(thirty, tmp_path, how):
    store = tmp_path / "s.zarr"
    run = start(thirty / "nii", store, "2")
    # A quick look, and two of them may be in the making.
    wait_for(lambda: len(list(store.glob("cases/*/zarr.json"))) >= 5)
    os.killpg(run.pid, signal.SIGSTOP)  # else it might be done before the signal, on a busy machine
    workers = psutil.Process(run.pid).children(recursive=True)
    assert len(workers) >= 2
    if how == signal.SIGINT:  # Ctrl-C reaches the whole group.
        os.killpg(run.pid, how)
    else:
        run.send_signal(how)
    os.killpg(run.pid, signal.SIGCONT)
    _, err = run.communicate(timeout=30)
    assert psutil.wait_procs(workers, timeout=10)[1] == [], "workers outlive their run"
    assert 3 <= complete(store) < 30
    assert "Traceback" not in err
    if how == signal.SIGINT:
        assert run.returncode == 130
        assert err == "interrupted; the same command goes on from here\n"
    for case in open_store(store).cases:
        for key in ("image", "label"):
            np.testing.assert_array_equal(read(store, case, key), read(thirty / "whole.zarr", case, key))

    again = start(thirty / "nii", store, "2")
    out, err = again.communicate(timeout=60)
    assert (again.returncode, err) == (0, "")
    assert " 0 failed" in out
    assert all_but_identity(store) == all_but_identity(thirty / "whole.zarr")


def test_a_worker_that_is_killed_is_told_of(thirty, tmp_path):
    store = tmp_path / "s.zarr"
    run = start(thirty / "nii", store, "2")
    wait_for(lambda: complete(store) >= 3)
    python = [child for child in psutil.Process(run.pid).children() if "spawn_main" in " ".join(child.cmdline())]
    python[0].kill()
    out, err = run.communicate(timeout=30)
    assert run.returncode == 1
    assert "Traceback" not in err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert errors
    for line in errors:
        assert "nii.gz: not done, as a worker process was killed" in line
    assert f"{len(errors)} failed" in out
    assert start(thirty / "nii", store, "2").wait(60) == 0
    assert all_but_identity(store) == all_but_identity(thirty / "whole.zarr")


@pytest.mark.parametrize(
    ("text", "mapping"),
    [
        ("organ=1,tumour=2", {"organ": [1], "tumour": [2]}),
        ("organ=1+3", {"organ": [1, 3]}),
        (" tumour=2, organ=1 ", {"organ": [1], "tumour": [2]}),
        ("posterior=2,anterior=1", {"posterior": [2], "anterior": [1]}),
        ("Leber=-1, left_kidney=3+4,l.1-b=7", {"Leber": [-1], "left_kidney": [3, 4], "l.1-b": [7]}),
    ],
)
def test_labels(text, mapping):
    assert list(parse_labels(text).items()) == list(mapping.items())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "write it like"),
        ("organ", "write it like"),
        ("organ=", "write it like"),
        ("organ=x", "write it like"),
        ("organ=0", "write it like"),
        ("organ=1_0", "write it like"),
        ("organ=1+", "write it like"),
        ("=1", "write it like"),
        ("1st=1", "'1st' can't be a name"),
        ("left kidney=1", "'left kidney' can't be a name"),
        ("all=1", "'all' can't be a name"),
        ("background=1", "'background' can't be a name"),
        ("organ=1,tumour=1", r"value 1 is given more than once \(organ, tumour\); labels can't overlap"),
        ("organ=1+1", r"value 1 is given more than once \(organ\)"),
        ("organ=1,organ=2", "'organ' is there twice"),
        (",".join(f"l{k}={k}" for k in range(1, 257)), "256 labels, and a store has 255 at most"),
    ],
)
def test_labels_that_are_none(text, message):
    with pytest.raises(UserError, match=f"--labels.*{message}"):
        parse_labels(text)


@pytest.mark.parametrize("text", ["", "1", "a,b", "3,1", "1,1", "1,2,3", "nan,1", "-inf,inf"])
def test_windows_that_are_none(text):
    with pytest.raises(UserError, match="--window"):
        parse_window(text)


@pytest.mark.parametrize(
    ("description", "kind"),
    [({"modality": {"0": "MRI"}}, "percentile"), ({"modality": {"0": "CT"}}, "fixed"), ({}, "fixed")],
)
def test_the_window_of_msd_follows_the_modality(tmp_path, description, kind):
    (tmp_path / "dataset.json").write_text(json.dumps(description))
    assert default_window("msd", tmp_path)["kind"] == kind
