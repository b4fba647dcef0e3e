"""Scans to label maps by the command and by its function."""

import gzip
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import nibabel
import numpy as np
import pytest
import torch
from conftest import model_card
from nifti_cases import ORIENTATIONS, all_files, save

from data_tools.cli import main as spark_data
from data_tools.scans import Preparation
from data_tools.store import open_store
from data_tools.workers import signature
from spark_dist import load_student
from spark_dist.cli import main
from spark_dist.data.slices import VoxelReader
from spark_dist.data.views import Crop, SliceSpec
from spark_dist.evaluation.inference import largest_components, probabilities
from spark_dist.evaluation.metrics import read_cases
from spark_dist.networks import build_network
from spark_dist.networks.checkpoint import load_network, save_network

AFFINE = np.array([[-0.8, 0, 0, 10], [0, -0.7, 0, 20.3], [0, 0, 3, -40.7], [0, 0, 0, 1.0]])
IPL = np.array([[0, 0, -0.7, 0], [0, -0.8, 0, 0], [-3.0, 0, 0, 0], [0, 0, 0, 1]])
"""Of an array in the axes of a store."""
GEOMETRY = ["srow_x", "srow_y", "srow_z", "sform_code", "qform_code", "pixdim", "xyzt_units"]
GEOMETRY += ["quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"]
"""Fields of a header that say where its voxels lie."""
PREPARED = {"preparation": Preparation(kind="fixed", low=-200, high=300), "label_values": (1,)}


def checkpoint(path, seed=0, network="enet", **facts):
    """A network with random weights whose predictions are neither empty nor full, and its card."""
    torch.manual_seed(seed)
    model = build_network(network, classes=facts.get("classes", 2), width=0.25).eval()
    x = torch.rand(2, 1, 48, 48) * 2 - 1
    with torch.no_grad():
        logits = model(x).logits
        last = [module for module in model.modules() if getattr(module, "bias", None) is not None][-1]
        if last.bias.shape == (2,):
            last.bias[1] -= (logits[:, 1] - logits[:, 0]).median()
    save_network(path, model, model_card(**PREPARED | {"network": network} | facts))
    return path


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("student") / "best.safetensors")


def volume(seed=0, shape=(40, 36, 6)):
    """Smooth noise along the file's axes, in whole HU."""
    noise = np.random.default_rng(seed).normal(0, 1, (*(-(-n // 4) for n in shape[:2]), shape[2]))
    return np.rint(noise.repeat(4, 0).repeat(4, 1)[: shape[0], : shape[1]] * 150).astype(np.int16)


def read(path):
    return np.asarray(nibabel.load(path).dataobj)


def predict(*arguments, code=0):
    assert main(["predict", *map(str, arguments)]) == code


def test_predictions_are_those_of_evaluate(tmp_path, student):
    """A scan prepared into a store and evaluated there, and the same file predicted."""
    scan = save(tmp_path / "data" / "case_00000" / "imaging.nii.gz", volume(), AFFINE, "RSP")
    save(tmp_path / "data" / "case_00000" / "segmentation.nii.gz", (volume() > 0).astype(np.uint8), AFFINE, "RSP")
    line = ["prepare", tmp_path / "data", tmp_path / "s.zarr", "--layout", "kits", "--labels", "organ=1"]
    assert spark_data([*map(str, line), "--workers", "1"]) == 0
    predict(student, scan, "--out", tmp_path / "out", "--probabilities")
    predict(student, scan, "--out", tmp_path / "flips", "--tta", "flips")
    store = open_store(tmp_path / "s.zarr")
    line = ["export", store.path, "case_00000", tmp_path / "again.nii.gz", "--prediction", evaluated(store, student)]
    assert spark_data([*map(str, line)]) == 0
    label = read(tmp_path / "out" / "imaging.nii.gz")
    assert np.array_equal(label, read(tmp_path / "again.nii.gz"))
    assert 0.1 < label.mean() < 0.9
    target = read(tmp_path / "out" / "probabilities" / "organ" / "imaging.nii.gz")
    assert target.dtype == np.float32
    assert np.array_equal(target >= 0.5, label == 1)
    flips = read(tmp_path / "flips" / "imaging.nii.gz")
    assert 0 < (flips != label).mean() < 0.4


def evaluated(store, student):
    """What `evaluate` measures for the only case of a store, as a file."""
    network, card = load_network(student)
    case = store.cases["case_00000"]
    found = probabilities(network, VoxelReader(store).case(case.name, "image"), case.window, card.spec)[0]
    np.save(store.path.with_name("prediction.npy"), (found >= card.spec.threshold).astype(np.uint8))
    return str(store.path.with_name("prediction.npy"))


@pytest.mark.parametrize("spacing", [(0.8, 0.7, 3.0), (1.5, 1.5, 1.5), (0.4, 2.0, 5.0)], ids=str)
def test_any_orientation_gives_the_same_label_in_the_world(tmp_path, student, spacing):
    affine = np.diag([-spacing[0], -spacing[1], spacing[2], 1.0])
    affine[:3, 3] = 12.5, -7.25, 100.125
    source = save(tmp_path / "in" / "source.nii.gz", volume(), affine)
    for codes in ORIENTATIONS[::4]:
        save(tmp_path / "in" / f"{codes}.nii", volume(), affine, codes)
    predict(student, tmp_path / "in", "--out", tmp_path / "out")
    expected = nibabel.load(tmp_path / "out" / "source.nii.gz")
    assert 0.1 < read(tmp_path / "out" / "source.nii.gz").mean() < 0.9
    assert len(ORIENTATIONS[::4]) == 12
    for codes in ORIENTATIONS[::4]:
        written = nibabel.load(tmp_path / "out" / f"{codes}.nii.gz")
        scan = nibabel.load(tmp_path / "in" / f"{codes}.nii")
        assert written.shape == scan.shape
        assert nibabel.aff2axcodes(written.affine) == tuple(codes)
        for field in GEOMETRY:
            assert written.header[field].tobytes() == scan.header[field].tobytes(), field
        to_source = np.linalg.inv(expected.affine) @ written.affine
        places = to_source[:3, :3] @ np.indices(written.shape).reshape(3, -1) + to_source[:3, 3:]
        there = np.asarray(expected.dataobj)[tuple(np.rint(places).astype(int))]
        assert np.array_equal(there.reshape(written.shape), np.asarray(written.dataobj))
    assert source.exists()


def test_three_lines_of_python_do_what_the_command_does(tmp_path, student):
    scan = save(tmp_path / "a.nii.gz", volume(), AFFINE, "ASR")
    predict(student, scan, "--out", tmp_path / "out")
    image = nibabel.load(scan)
    label = load_student(student).predict(np.asarray(image.dataobj), image.affine)
    assert np.array_equal(label, read(tmp_path / "out" / "a.nii.gz"))
    assert label.dtype == np.uint8


def test_several_checkpoints_are_the_mean_of_their_probabilities(tmp_path, student):
    other = checkpoint(tmp_path / "other.safetensors", seed=1)
    scan = save(tmp_path / "a.nii.gz", volume(), AFFINE)
    for name, networks in (("one", [student]), ("two", [other]), ("both", [student, other])):
        predict(*networks, scan, "--out", tmp_path / name, "--probabilities")
    one, two, both = (read(tmp_path / n / "probabilities" / "organ" / "a.nii.gz") for n in ("one", "two", "both"))
    assert np.allclose((one + two) / 2, both, atol=1e-6)
    assert np.array_equal(both >= 0.5, read(tmp_path / "both" / "a.nii.gz") == 1)
    assert np.abs(one - two).max() > 1e-3


def test_evaluate_measures_flips_and_the_largest_component(tmp_path, tiny_store):
    """The same numbers as from the predictions that `predict` writes."""
    student = checkpoint(tmp_path / "speckled.safetensors", seed=2)
    name = open_store(tiny_store).split("default", "test")[0]
    reader, dice = VoxelReader(open_store(tiny_store)), {}
    image, label = reader.case(name, "image"), reader.case(name, "label") > 0
    for option in ("--tta=none", "--tta=flips", "--largest-component"):
        line = ["evaluate", student, "--dataset", tiny_store, option, "--out", tmp_path / "cases.json"]
        assert main([*map(str, line)]) == 0
        dice[option] = read_cases(tmp_path / "cases.json")[name]["dice"]
        predictor = load_student(student, flips=option == "--tta=flips", largest_component="largest" in option)
        found = predictor.predict(image, IPL) > 0
        assert dice[option] == pytest.approx(2 * (found & label).sum() / (found.sum() + label.sum()))
    assert dice["--tta=none"] != dice["--tta=flips"]


def test_classes_have_the_values_of_the_label_files(tmp_path):
    scan = save(tmp_path / "a.nii.gz", volume(), AFFINE)
    predict(checkpoint(tmp_path / "a.safetensors", label_values=(7,)), scan, "--out", tmp_path / "out")
    assert set(np.unique(read(tmp_path / "out" / "a.nii.gz"))) == {0, 7}


def test_several_regions_have_a_value_and_probabilities_each(tmp_path):
    facts = {"spec": SliceSpec("liver,spleen", Crop((32, 32))), "classes": 3, "label_values": (5, 300)}
    scan = save(tmp_path / "a.nii.gz", volume(), AFFINE)
    predict(checkpoint(tmp_path / "a.safetensors", **facts), scan, "--out", tmp_path / "out", "--probabilities")
    liver, spleen = (read(tmp_path / "out" / "probabilities" / name / "a.nii.gz") for name in ("liver", "spleen"))
    found = np.stack([1 - liver - spleen, liver, spleen])
    label, sure = read(tmp_path / "out" / "a.nii.gz"), np.sort(found, axis=0)
    sure = sure[2] - sure[1] > 1e-5
    assert np.array_equal(label[sure], np.array([0, 5, 300])[found.argmax(axis=0)][sure])
    assert sure.mean() > 0.5
    assert len(np.unique(label)) > 1


def test_only_the_largest_component_is_kept(tmp_path, student):
    scan = save(tmp_path / "a.nii.gz", volume(), AFFINE)
    predict(student, scan, "--out", tmp_path / "all")
    predict(student, scan, "--out", tmp_path / "largest", "--largest-component")
    before, after = (read(tmp_path / name / "a.nii.gz") for name in ("all", "largest"))
    assert np.array_equal(largest_components(before), after)
    classes = np.zeros((3, 8, 8), np.uint8)
    classes[0, 0, 0] = classes[1, 1, 1] = 1  # touch by a corner
    classes[0, 5:7, 5] = classes[2, :2, :2] = 2
    kept = largest_components(classes)
    assert [int((kept == number).sum()) for number in (1, 2)] == [2, 4]
    classes[0, 5:7, 5] = classes[1, 1, 1] = classes[0, 0, 0] = 0
    assert np.array_equal(largest_components(classes), classes)
    assert not largest_components(np.zeros((2, 3, 3), np.uint8)).any()


def test_what_is_there_is_skipped_by_its_content(tmp_path, student, capsys):
    scan = save(tmp_path / "a.nii.gz", volume(), AFFINE)
    out = tmp_path / "out" / "a.nii.gz"
    predict(student, scan, "--out", tmp_path / "out")
    written = out.stat().st_mtime_ns
    moved = tmp_path / "elsewhere" / "b.safetensors"
    moved.parent.mkdir()
    shutil.copy(student, moved)
    predict(moved, scan, "--out", tmp_path / "out")
    assert "1 unchanged" in capsys.readouterr().out
    assert out.stat().st_mtime_ns == written
    predict(student, scan, "--out", tmp_path / "out", "--probabilities")
    assert "1 predicted" in capsys.readouterr().out
    save(scan, volume(1), AFFINE)
    predict(student, scan, "--out", tmp_path / "out", code=2)
    assert "prediction of another scan, checkpoint or options" in capsys.readouterr().err
    predict(student, scan, "--out", tmp_path / "out", "--overwrite")
    assert "1 predicted" in capsys.readouterr().out


def test_parts_share_the_scans(tmp_path, student):
    for n in range(5):
        save(tmp_path / "in" / f"{n}.nii.gz", volume(n), AFFINE)
    written = []
    for part in (1, 2, 3):
        predict(student, tmp_path / "in", "--out", tmp_path / str(part), "--part", f"{part}/3")
        written += [path.name for path in (tmp_path / str(part)).glob("*.nii.gz")]
    assert sorted(written) == [f"{n}.nii.gz" for n in range(5)]


def test_killed_in_the_middle_the_same_command_does_the_rest(tmp_path, student):
    for n in range(6):
        save(tmp_path / "in" / f"{n}.nii.gz", volume(n, (160, 160, 24)), AFFINE)
    line = [sys.executable, "-m", "spark_dist.predict", student, tmp_path / "in", "--out", tmp_path / "out"]
    line = [str(word) for word in line]
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL)
    left, kept = (tmp_path / "out" / f".5.nii.gz.{name}.tmp" for name in (signature(process.pid), "notes"))
    while len(list((tmp_path / "out").glob("*.nii.gz"))) < 2:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    whole = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.nii.gz")}
    assert 2 <= len(whole) < 6
    for path in (left, kept):
        path.write_bytes(b"half")
    predict(*line[3:])
    assert kept.exists()
    kept.unlink()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [f"{n}.nii.gz" for n in range(6)]
    assert all(path.stat().st_mtime_ns == written for path, written in whole.items())
    predict(student, tmp_path / "in", "--out", tmp_path / "undisturbed")
    assert all_files(tmp_path / "out") == all_files(tmp_path / "undisturbed")


def header(field, value):
    """A scan whose header has another value."""

    def write(path):
        image = nibabel.Nifti1Image(volume(), AFFINE)
        image.header[field] = value
        path.write_bytes(image.header.binaryblock + b"\0" * 4 + image.get_fdata().astype(np.int16).tobytes("F"))

    return write


def array(voxels, affine=AFFINE):
    return lambda path: nibabel.save(nibabel.Nifti1Image(voxels, affine), path)


def cut(share):
    def write(path):
        content = gzip.compress(nibabel.Nifti1Image(volume(), AFFINE).to_bytes())
        path.write_bytes(content[: int(share * len(content))])

    return write


def rgb(path):
    colours = np.zeros((4, 4, 4), np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))
    nibabel.save(nibabel.Nifti1Image(colours, AFFINE), path)


SINGULAR = np.diag([1.0, 1.0, 0.0, 1.0])
NAN = np.where(np.arange(6) == 3, np.nan, volume()).astype(np.float32)
BAD_SCANS = {
    "truncated.nii.gz": (cut(0.5), "truncated or damaged"),
    "short.nii.gz": (cut(0.02), "truncated or damaged"),
    "checksum.nii.gz": (lambda p: (cut(1)(p), p.write_bytes(p.read_bytes()[:-8] + bytes(8))), "truncated or damaged"),
    "text.nii": (lambda p: p.write_text("no scan at all\n" * 99), "truncated or damaged"),
    "text.nii.gz": (lambda p: p.write_text("no scan at all\n" * 99), "truncated or damaged"),
    "empty.nii": (lambda p: p.touch(), "truncated or damaged"),
    "empty.nii.gz": (lambda p: p.touch(), "truncated or damaged"),
    "four.nii.gz": (array(np.zeros((4, 4, 4, 3), np.int16)), "3 channels; pick one with --channel"),
    "two.nii.gz": (array(np.zeros((4, 4), np.int16)), "no volume of three axes"),
    "five.nii.gz": (array(np.zeros((4, 4, 4, 2, 2), np.int16)), "no volume of three axes"),
    "rgb.nii.gz": (rgb, "are not numbers"),
    "complex.nii.gz": (array(np.zeros((4, 4, 4), np.complex64)), "are not numbers"),
    "nan.nii.gz": (array(NAN), "1440 voxels are NaN or infinite"),
    "infinite.nii.gz": (array(np.where(NAN > 100, np.inf, 1.0).astype(np.float32)), "NaN or infinite"),
    "large.nii.gz": (array(np.full((4, 4, 4), 1e300)), "do not fit into float32"),
    "singular.nii": (header("srow_z", [0, 0, 0, 0]), "has no direction for an axis"),
    "affine.nii": (header("srow_x", [np.nan, 0, 0, 0]), "has no direction for an axis"),
    "slope.nii": (header("scl_slope", np.inf), "truncated or damaged"),
    "magic.nii": (header("magic", b"abc"), "truncated or damaged"),
    "size.nii": (header("dim", [3, 40, 36, 9999, 1, 1, 1, 1]), "truncated or damaged"),
    "negative.nii": (header("dim", [3, 40, -36, 6, 1, 1, 1, 1]), "damaged|no volume"),
    "type.nii": (header("datatype", 9999), "truncated or damaged"),
    "units.nii": (header("xyzt_units", 1), "its units are metres"),
}


def test_every_bad_scan_is_one_line_and_the_others_are_predicted(tmp_path, student, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    for name, (write, _) in BAD_SCANS.items():
        write(folder / f"{name.split('.')[0]}_{name.count('.')}.{name.split('.', 1)[1]}")
    save(folder / "good.nii.gz", volume(), AFFINE)
    predict(student, folder, "--out", tmp_path / "out", code=2)
    output = capsys.readouterr()
    lines = output.err.splitlines()
    for name, (_, message) in BAD_SCANS.items():
        file = f"{name.split('.')[0]}_{name.count('.')}.{name.split('.', 1)[1]}"
        found = [line for line in lines if f"{folder / file}" in line]
        assert len(found) == 1, (file, found)
        assert re.match(rf"error: .*({message})", found[0]), found[0]
    assert (
        lines[-1]
        == f"error: {len(BAD_SCANS)} of {len(BAD_SCANS) + 1} scans failed; mend them, and run the same command again"
    )
    assert len(lines) == len(BAD_SCANS) + 1
    assert f"{len(BAD_SCANS) + 1} scans: 1 predicted, 0 unchanged, {len(BAD_SCANS)} failed" in output.out
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["good.nii.gz"]


@pytest.fixture
def place(tmp_path, student, monkeypatch):
    """A folder with a scan and what else may be in the way."""
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "a.nii.gz", volume(), AFFINE)
    shutil.copy(student, "s.safetensors")
    (tmp_path / "nothing").mkdir()
    for name in ("x.nii", "x.nii.gz"):
        save(tmp_path / "twice" / name, volume(), AFFINE)
    save(tmp_path / "foreign" / "a.nii.gz", volume(), AFFINE)
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "a.nii.gz").symlink_to("missing.nii.gz")
    (tmp_path / "file").write_text("a file")
    (tmp_path / "t.safetensors").write_text("a text")
    (tmp_path / "t.onnx").write_text("a text")
    checkpoint(tmp_path / "old.safetensors", preparation=None)
    checkpoint(tmp_path / "nolabels.safetensors", label_values=None)
    for name, facts in {
        "tumour": {"spec": SliceSpec("tumour", Crop((32, 32)))},
        "crop": {"spec": SliceSpec("organ", Crop((48, 48)))},
        "window": {"preparation": replace(PREPARED["preparation"], high=400)},
        "values": {"label_values": (2,)},
    }.items():
        checkpoint(tmp_path / f"{name}.safetensors", **facts)
    return tmp_path


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("s.safetensors missing.nii.gz --out out", "missing.nii.gz: no NIfTI file"),
        ("s.safetensors nothing --out out", "nothing: no NIfTI file"),
        ("s.safetensors none*.nii --out out", r"none\*.nii: no NIfTI file"),
        ("s.safetensors file --out out", "file: not a NIfTI file by its name"),
        ("s.safetensors twice --out out", "predictions of one name"),
        ("s.safetensors a.nii.gz --out foreign", "exists and is no prediction of spark-dist"),
        ("s.safetensors a.nii.gz --out .", "exists and is no prediction of spark-dist"),
        ("s.safetensors a.nii.gz --out link", "exists and is no prediction of spark-dist"),
        ("s.safetensors a.nii.gz --out file", "--out file: file is no folder"),
        ("s.safetensors a.nii.gz --out file/deeper", "--out file/deeper: file is no folder"),
        ("s.safetensors a.nii.gz", "--out must be given"),
        ("s.safetensors --out out", "no scan is named"),
        ("a.nii.gz --out out", "no checkpoint is named"),
        ("missing.safetensors a.nii.gz --out out", "missing.safetensors: no such checkpoint"),
        ("t.safetensors a.nii.gz --out out", "t.safetensors: not a whole .safetensors file"),
        ("old.safetensors a.nii.gz --out out", "old.safetensors: its model card does not say"),
        ("nolabels.safetensors a.nii.gz --out out", "nolabels.safetensors: its model card does not say"),
        ("s.safetensors old.safetensors a.nii.gz --out out", "old.safetensors: its model card does not say"),
        ("s.safetensors tumour.safetensors a.nii.gz --out out", "networks whose spec differs"),
        ("s.safetensors crop.safetensors a.nii.gz --out out", "networks whose spec differs"),
        ("s.safetensors window.safetensors a.nii.gz --out out", "networks whose preparation differs"),
        ("s.safetensors values.safetensors a.nii.gz --out out", "networks whose label_values differs"),
        ("s.safetensors a.nii.gz --out out --part 3/2", "--part 3/2: write K/N"),
        ("s.safetensors a.nii.gz --out out --part 0/2", "--part 0/2: write K/N"),
        ("s.safetensors a.nii.gz --out out --threshold 1", "--threshold must be below 1"),
        ("s.safetensors a.nii.gz --out out --tta turns", "--tta can't be"),
        ("s.safetensors a.nii.gz --out out --spacing 1,1", "--spacing 1,1: write three lengths"),
        ("s.safetensors a.nii.gz --out out --channel -1", "--channel must be at least 0"),
        ("s.safetensors a.nii.gz --out=", "--out is empty"),
    ],
)
def test_every_wrong_line_is_one_line(place, line, message, capsys):
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    predict(*line.split(), code=2)
    lines = [line for line in capsys.readouterr().err.splitlines() if "scans failed" not in line]
    assert len(lines) == 1, lines
    assert re.match(f"error: .*({message})", lines[0]), lines[0]
    assert before == {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
