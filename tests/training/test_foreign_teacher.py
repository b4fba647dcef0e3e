"""A student of predictions that another program made."""

import json
import os
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import keep_signals, model_card, undecided
from nifti_cases import all_files, save

from data_tools.cli import main as spark_data
from data_tools.creation import aside
from data_tools.errors import UserError
from data_tools.predictions import prediction_of
from data_tools.preparation import Preparation
from data_tools.store import open_store
from spark_dist.cli import main
from spark_dist.data.augmentation import Views
from spark_dist.data.predictions import StoredPredictions
from spark_dist.data.slices import VoxelReader, slice_table
from spark_dist.data.views import Crop, SliceSpec
from spark_dist.evaluation.cases import evaluate_predictions
from spark_dist.evaluation.inference import probabilities
from spark_dist.networks import build_network
from spark_dist.networks.checkpoint import save_network
from spark_dist.training.checkpoint import load_state, newest_state

SHAPE = (48, 32, 6)
JOB = (
    "--task",
    "organ",
    "--crop",
    "[32,48]",
    "--crop-shift",
    "[0,0]",
    "--batch-size",
    6,
    "--steps",
    6,
    "--val-every",
    9,
)
JOB += ("--student-width", 0.25, "--lr", 1e-4, "--log-every", 6, "--method", "soft", "--unlabelled-share", 0.5)
CASES = [f"case_{k:05}" for k in range(5)]


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """A store of five small cases whose split hides the label of one."""
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    for k, case in enumerate(CASES):
        x, y, z = np.indices(SHAPE)
        label = ((np.hypot(x - 15, y - 13 - k) < 9) & (z > 0)).astype(np.uint8)
        label[(np.hypot(x - 15, y - 13 - k) < 3) & (z > 1)] = 2
        image = np.where(label > 0, 120, -20) + random.normal(0, 40, SHAPE)
        save(tmp_path / "nifti" / case / "imaging.nii.gz", image.astype(np.int16))
        save(tmp_path / "nifti" / case / "segmentation.nii.gz", label)
    run("prepare", "nifti", "store.zarr", "--layout", "kits", "--labels", "organ=1,tumour=2", "--workers", 1)
    run("split", "store.zarr", "--train", 3, "--val", 1, "--test", 1, "--hide-labels", 1)
    return open_store(tmp_path / "store.zarr")


def run(*words, code=0):
    assert spark_data([str(word) for word in words]) == code


def student_of(jobs, folder, name, *options):
    """The weights of a student."""
    common = ("--dataset", "store.zarr", "--tracking-uri", f"sqlite:///{folder}/mlflow.db", "--augment", "none")
    codes, log = jobs("distill", *common, *JOB, *options, "--out", name, folder=folder)
    assert codes == [0], log
    return load_state(newest_state(folder / name / "student" / "checkpoints"))["model"]


@pytest.mark.slow
def test_labels_that_another_program_wrote_teach_as_the_checkpoint_does(jobs, prepared, tmp_path):
    """The teacher's prediction goes through spark-data export, another orientation and other values, and comes back, as
    its probabilities go through spark-dist predict and nnU-Net's format."""
    torch.manual_seed(1)
    teacher, spec = undecided(build_network("unet", width=0.05)), SliceSpec("organ", Crop((32, 48)))
    known = {"preparation": Preparation.of_store(prepared.attributes), "label_values": (7,), "trained_on": ()}
    card = model_card(network="unet", width=0.05, spec=spec, **known)
    save_network(tmp_path / "teacher.safetensors", teacher, card)
    (tmp_path / "scans").mkdir()
    for case in CASES:
        shutil.copy(tmp_path / "nifti" / case / "imaging.nii.gz", tmp_path / "scans" / f"{case}.nii.gz")
    assert main(["predict", "teacher.safetensors", "scans", "--out", "predicted", "--probabilities"]) == 0
    for number, name in enumerate(prepared.splits["default"]["train"] + prepared.splits["default"]["unlabelled"]):
        case = prepared.cases[name]
        image = VoxelReader(prepared).case(name, "image")
        label = (probabilities(teacher, image, case.window, spec)[0] > 0.5).astype(np.uint8)
        assert 0.05 < label.mean() < 0.95
        np.save(tmp_path / "prediction.npy", 7 * label)
        run("export", "store.zarr", name, "exported.nii.gz", "--prediction", "prediction.npy")
        exported = nibabel.load("exported.nii.gz")
        written = np.asarray(exported.dataobj).astype(np.int16)
        assert np.array_equal(written, nibabel.load(tmp_path / "predicted" / f"{name}.nii.gz").dataobj)
        organ = nibabel.load(tmp_path / "predicted" / "probabilities" / "organ" / f"{name}.nii.gz").get_fdata()
        softmax_file(tmp_path / "npz" / f"{name}.npz", 1 - organ, organ)
        save(tmp_path / "foreign" / f"{name}.nii.gz", written, exported.affine, axes=["RAS", "SPL", "AIR"][number])
        (tmp_path / "exported.nii.gz").unlink()
    run("predictions", "store.zarr", "foreign", "--name", "other", "--labels", "organ=7")
    run("predictions", "store.zarr", "npz", "--name", "probable", "--labels", "organ=1")
    checkpoint = ("--teacher-checkpoint", "teacher.safetensors", "--hard-labels", "--cache", "off")
    own = student_of(jobs, tmp_path, "own", *checkpoint)
    foreign = student_of(jobs, tmp_path, "foreign-job", "--teacher-predictions", "other")
    assert not (tmp_path / "foreign-job" / "teacher").exists()
    soft = student_of(jobs, tmp_path, "soft", *checkpoint[:2], "--cache", "off")
    for key, x in own.items():
        torch.testing.assert_close(foreign[key], x, rtol=1e-5, atol=1e-6)
    assert any(not torch.allclose(soft[key], x, rtol=1e-3, atol=1e-4) for key, x in own.items() if x.ndim > 1)
    probable = student_of(jobs, tmp_path, "probable", "--teacher-predictions", "probable")
    for key, x in soft.items():  # kept in float16
        torch.testing.assert_close(probable[key], x, rtol=1e-3, atol=1e-4)
    fading = ("--distill-schedule", "linear")
    own = student_of(jobs, tmp_path, "own-fading", *checkpoint, *fading)
    faded = student_of(jobs, tmp_path, "faded", "--teacher-predictions", "other", *fading)
    for key, x in own.items():
        torch.testing.assert_close(faded[key], x, rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(faded[key], x) for key, x in foreign.items())
    # What a job began with is what it goes on with.
    name = prepared.splits["default"]["unlabelled"][0]
    empty = np.zeros(SHAPE, np.uint8)
    affine = np.array(prepared.cases[name].source["image"]["affine"])
    save(tmp_path / "foreign" / f"{name}.nii.gz", empty, affine)
    run("predictions", "store.zarr", "foreign", "--name", "other", "--labels", "organ=7", "--replace")
    again = ("--dataset", "store.zarr", "--tracking-uri", f"sqlite:///{tmp_path}/mlflow.db", "--augment", "none")
    codes, log = jobs(
        "distill", *again, *JOB, "--teacher-predictions", "other", "--out", "foreign-job", folder=tmp_path
    )
    assert codes == [2]
    assert f"case {name} of the predicted cases was prepared anew" in log


def test_a_foreign_teacher_that_predicts_the_test_cases_is_in_the_comparison(jobs, prepared, tmp_path):
    (case,) = prepared.splits["default"]["test"]
    expected = {}
    for name in CASES:
        truth = nibabel.load(tmp_path / "nifti" / name / "segmentation.nii.gz")
        label = np.asarray(truth.dataobj).copy()
        whole, label[..., :3] = label > 0, 0
        expected[name] = 2 * (label > 0).sum() / (whole.sum() + (label > 0).sum())
        save(tmp_path / "maps" / f"{name}.nii.gz", label, truth.affine)
        softmax_file(tmp_path / "npz" / f"{name}.npz", *(0.8 * (label == k) + 0.2 / 3 for k in range(3)))
    run("predictions", "store.zarr", "maps", "--name", "maps")
    run("predictions", "store.zarr", "npz", "--name", "npz")
    accelerator, spec = Accelerator(cpu=True), SliceSpec("organ", Crop((32, 48)))
    for name in ("maps", "npz"):
        found = evaluate_predictions(accelerator, prepared, name, CASES, spec)
        assert {key: metrics["dice"] for key, metrics in found.items()} == pytest.approx(expected)
    common = ("--dataset", "store.zarr", "--tracking-uri", f"sqlite:///{tmp_path}/mlflow.db", "--augment", "none")
    common += ("--task", "organ", "--crop", "[32,48]", "--crop-shift", "[0,0]", "--batch-size", 6, "--steps", 1)
    taught = ("--teacher-predictions", "maps", "--method", "soft", "--student-width", 0.25, "--out", "taught")
    for command, options in (("train", ("--network", "enet", "--width", 0.25, "--out", "alone")), ("distill", taught)):
        codes, log = jobs(command, *common, *options, folder=tmp_path)
        assert codes == [0], log
    assert f"teacher: test Dice {expected[case]:.4f}" in log
    server, table = common[2:4], ("--json", "rows.json", "--markdown", "rows.md", "--figure", "rows.svg")
    for folder in ("alone/network", "taught"):  # what a busy machine did not send in time
        assert main(["track-sync", folder, *server]) == 0
    assert main(["compare", *server, *table]) == 0
    teacher, alone, student = json.loads((tmp_path / "rows.json").read_text())
    assert (teacher["role"], teacher["network"], teacher["parameters"]) == ("teacher", "maps", 0)
    assert teacher["mean"] == pytest.approx(expected[case])
    closed = (student["mean"] - alone["mean"]) / (teacher["mean"] - alone["mean"])
    assert student["gap_closed"] == pytest.approx(closed)
    assert "| teacher | maps | 3407 |  |" in (tmp_path / "rows.md").read_text()
    assert "<!-- teacher, maps -->" in (tmp_path / "rows.svg").read_text()


def softmax_file(path, *classes):
    """An .npz as nnU-Net writes it, (classes, z, y, x), from volumes along the image's axes."""
    path.parent.mkdir(exist_ok=True)
    np.savez_compressed(path, probabilities=np.stack([volume.transpose(2, 1, 0) for volume in classes]))


def random_softmax(classes):
    random = np.random.default_rng(1).random((classes, *SHAPE)).astype(np.float32)
    return random / random.sum(axis=0)


@pytest.mark.parametrize("augment", ["none", "flips", "full"])
def test_probabilities_lie_where_the_image_shows_them(prepared, tmp_path, augment):
    """A prediction that is the image itself is seen as the image is, in every view of every slice."""
    images = {case: nibabel.load(tmp_path / "nifti" / case / "imaging.nii.gz").dataobj for case in CASES}
    for case, image in images.items():
        organ = np.clip((np.asarray(image, np.float32) + 200) / 500, 0, 1)
        softmax_file(tmp_path / "npz" / f"{case}.npz", 1 - organ, organ / 2, organ / 2)
    run("predictions", "store.zarr", "npz", "--name", "soft")
    table, task = slice_table(prepared, "default", "train", "organ", "all"), prepared.task("organ")
    views = Views(Crop((32, 32)), augment, seed=3)
    predictions, label = StoredPredictions(table, "soft", task, views), np.zeros(SHAPE[1::-1], np.uint8)
    keys = np.arange(len(table) * views.count)
    pending = predictions.start_reading(keys)
    for n, key in enumerate(keys.tolist()):
        pending.fill(n)
        row, number = divmod(key, views.count)
        case, z = table.cases[table.case[row]], int(table.slice[row])
        image = VoxelReader(prepared).slice(case, "image", z)
        whole = np.clip((image.astype(np.float32) + 200) / 500, 0, 1)
        seen = views.of_planes(row, number, [whole], label > 0, nearest=False)[0]
        np.testing.assert_allclose(pending.array[n, 0], seen, atol=2e-3)
    assert list(predictions.finish_reading(pending).arrays) == ["probabilities"]
    folder, kind = prediction_of(prepared, "soft", CASES[0])
    assert kind == "probabilities"
    assert not list(folder.parent.glob(".*"))


def refused(capsys, *words):
    assert spark_data(["predictions", "store.zarr", *map(str, words)]) in (1, 2)
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1, error
    return error


def test_bad_predictions_are_one_line_that_names_the_file(prepared, tmp_path, capsys):
    affine = np.array(prepared.cases[CASES[0]].source["image"]["affine"])
    label = np.zeros(SHAPE, np.uint8)
    file, moved = tmp_path / "foreign" / f"{CASES[0]}.nii.gz", affine.copy()
    moved[0, 3] += 3
    label[5:9, 5:9] = 1
    for voxels, placed, message in (
        (label[1:], affine, "differ in shape; resample the label to the image's grid"),
        (label, moved, "voxels apart in the world"),
        (label * 9, affine, "label 9 is not declared; add it to --labels, or pass --other background"),
        (label * 0.5, affine, "labels must be whole numbers"),
    ):
        save(file, voxels, placed)
        error = refused(capsys, "foreign", "--name", "bad")
        assert str(file.relative_to(tmp_path)) in error
        assert message in error
    file.write_bytes(file.read_bytes()[:100])
    assert "truncated or damaged" in refused(capsys, "foreign", "--name", "bad")
    file.unlink()
    file, good = file.with_name(f"{CASES[0]}.npz"), random_softmax(3)
    for classes, message in (
        (good[:, 1:], "is of another grid than the image"),
        (good * 0.9, "the probabilities of a voxel sum to 0.9, and not to 1"),
        (good * np.nan, "sum to nan"),
        (np.concatenate([good * 3 - 1, -2 * good.sum(axis=0, keepdims=True) + 3]), "sum to"),
        (good[:2] / good[:2].sum(axis=0), "has classes 0 … 1, and --labels names 2"),
        (random_softmax(4), "class 3 is not declared; add it to --labels, or pass --other background"),
    ):
        softmax_file(file, *classes)
        error = refused(capsys, "foreign", "--name", "bad")
        assert str(file.relative_to(tmp_path)) in error
        assert message in error
    file.write_bytes(file.read_bytes()[:200])
    assert "can't be read as .npz" in refused(capsys, "foreign", "--name", "bad")
    np.savez(file, other=good)
    assert "an array 'probabilities' of shape (classes, 6, 32, 48) is needed, not none" in refused(
        capsys, "foreign", "--name", "bad"
    )
    assert "there is no label 'liver'" in refused(capsys, "foreign", "--name", "bad", "--labels", "liver=1")
    (tmp_path / "empty").mkdir()
    assert "no prediction of a case" in refused(capsys, "empty", "--name", "bad")
    assert "no such folder" in refused(capsys, "nowhere", "--name", "bad")
    assert "can't be the name of a prediction" in refused(capsys, "foreign", "--name", "a/b")
    assert not list((tmp_path / "store.zarr").glob("predictions/*/*"))


def test_predictions_stay_until_they_shall_be_replaced(prepared, tmp_path, capsys):
    softmax_file(tmp_path / "foreign" / f"{CASES[0]}.npz", *random_softmax(3))
    command = ("predictions", "store.zarr", "foreign", "--name", "a")
    run(*command)
    assert "1 prepared, 0 unchanged, 0 failed; 4 cases without a file" in " ".join(capsys.readouterr().out.split())
    run(*command)
    assert "0 prepared, 1 unchanged" in capsys.readouterr().out
    softmax_file(tmp_path / "foreign" / f"{CASES[0]}.npz", *random_softmax(3)[::-1])
    assert "holds another prediction; pass --replace" in refused(capsys, "foreign", "--name", "a")
    folder = prediction_of(prepared, "a", CASES[0])[0]
    somebodys = folder.with_name(f".{CASES[0]}.kept.new")
    left = aside(folder)
    left = left.with_name(left.name.replace(f"-{os.getpid()}-", "-999999999-"))  # its maker is dead
    for place in (folder, somebodys):
        place.mkdir(exist_ok=True)
        (place / "notes.txt").write_text("mine")
    shutil.copytree(folder, left, ignore=shutil.ignore_patterns("notes.txt"))
    assert "holds notes.txt, which is no part of a prediction; move it away" in refused(
        capsys, "foreign", "--name", "a", "--replace"
    )
    assert (folder / "notes.txt").read_text() == "mine"
    (folder / "notes.txt").unlink()
    run(*command, "--replace")
    assert (somebodys / "notes.txt").read_text() == "mine"
    assert not left.exists()
    (folder / "zarr.json").write_text("{}")
    assert "holds something else, or is damaged; move it away" in refused(capsys, "foreign", "--name", "a", "--replace")


def test_a_prediction_that_could_not_be_replaced_is_there_again(prepared, tmp_path, capsys, monkeypatch):
    """As the second of two renames fails, or a kill comes before it."""
    softmax_file(tmp_path / "foreign" / f"{CASES[0]}.npz", *random_softmax(3))
    run("predictions", "store.zarr", "foreign", "--name", "a")
    folder = prediction_of(prepared, "a", CASES[0])[0]
    before = all_files(folder.parent)
    softmax_file(tmp_path / "foreign" / f"{CASES[0]}.npz", *random_softmax(3)[::-1])
    rename, calls = Path.rename, []

    def second_fails(path, target):
        calls.append(path)
        if len(calls) == 2:
            raise OSError("no room")
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", second_fails)
        assert "no room" in refused(capsys, "foreign", "--name", "a", "--replace")
    assert all_files(folder.parent) == before

    left = aside(folder)
    folder.rename(left.with_name(left.name.replace(f"-{os.getpid()}-", "-999999999-")))  # its maker is dead
    half = aside(folder)
    half = half.with_name(half.name.replace(f"-{os.getpid()}-", "-999999999-"))
    shutil.copytree(folder.parent / next(folder.parent.iterdir()).name, half)
    (half / "zarr.json").write_text('{"attributes": {"format": "spark-dist prediction"}}')
    with pytest.raises(UserError, match="has no prediction 'a'; put its file"):
        prediction_of(prepared, "a", CASES[0])
    assert "holds another prediction; pass --replace" in refused(capsys, "foreign", "--name", "a")
    assert {name: data for name, data in all_files(folder.parent).items() if half.name not in name} == before
    run("predictions", "store.zarr", "foreign", "--name", "a", "--replace")
    assert prediction_of(prepared, "a", CASES[0])
    assert os.listdir(folder.parent) == [CASES[0]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "case case_0000"),
        (
            ("--method", "spark"),
            "method spark needs more of a teacher than --teacher-predictions; take one of dist, kd",
        ),
        (("--method", "tfkd"), "take one of dist, kd"),
        (
            ("--teacher-predictions", "b"),
            "has no predictions 'b'; there are a; prepare them with spark-data predictions",
        ),
        (("--cache", "on"), "leave out --cache"),
        (("--teacher-tta", "flips"), "leave out --teacher-tta"),
        (("--teacher-checkpoint", "x.safetensors"), "leave out --teacher-checkpoint"),
        (("--unlabelled-share", "0", "--rounds", "2"), "leave out --rounds"),
        (("--unlabelled-share", "0", "--together", "live"), "leave out --together"),
    ],
)
def test_mistakes_with_a_foreign_teacher_are_one_line(prepared, tmp_path, capsys, options, message):
    used = prepared.splits["default"]["train"]
    softmax_file(tmp_path / "foreign" / f"{used[0]}.npz", *random_softmax(3))
    run("predictions", "store.zarr", "foreign", "--name", "a")
    capsys.readouterr()
    job = ("--dataset", "store.zarr", *JOB, "--teacher-predictions", "a", "--out", "job", *options)
    with keep_signals():
        assert main(["distill", *map(str, job)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    if not options:
        assert "has no prediction 'a'; put its file into the folder of the others" in error
    assert not (tmp_path / "job").exists()


def test_hard_labels_are_for_methods_that_learn_from_predictions(tiny_store, capsys):
    job = ("--dataset", tiny_store, "--task", "organ", "--method", "at", "--hard-labels")
    assert main(["distill", *map(str, job)]) == 2
    assert "--hard-labels: method at learns from a teacher's features too" in capsys.readouterr().err
