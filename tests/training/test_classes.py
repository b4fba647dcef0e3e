"""Several classes: every network and method as jobs build them, and five organs of a real CT from end to end."""

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from conftest import keep_signals
from nifti_cases import save

from data_tools.cli import main as spark_data
from data_tools.store import open_store
from spark_dist.cli import main
from spark_dist.config import DistillOptions, TrainOptions
from spark_dist.data.batches import SliceDataset, to_device
from spark_dist.distill import student_stage, teacher_stage, with_teacher
from spark_dist.distillers import DISTILLERS
from spark_dist.evaluation.comparison import Run, compare
from spark_dist.losses import segmentation
from spark_dist.networks import NETWORKS
from spark_dist.networks.checkpoint import load_card, load_network, save_network
from spark_dist.teacher.saved import SavedNetworks
from spark_dist.training.distributed import make_accelerator
from spark_dist.training.job import Job
from spark_dist.training.stage import Stage, build, model_card
from spark_dist.training.tracking import null_tracker

THREE = {"task": "organ,tumour", "crop": 64, "crop_shift": (0, 0), "batch_size": 4}


@pytest.fixture
def job(tiny_store, tmp_path):
    """A function from options to a job on the tiny store that is not tracked."""

    def make(kind, **options):
        options = kind(dataset=tiny_store, out=tmp_path, cache_folder=tmp_path / "cache", **THREE | options)
        return Job(options, make_accelerator(), open_store(tiny_store), null_tracker())

    return make


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_every_network_takes_a_step_with_three_classes_and_is_loaded_again(name, tiny_store, tmp_path):
    options = TrainOptions(dataset=tiny_store, out=tmp_path, network=name, **THREE)
    job = Job(options, make_accelerator(), open_store(tiny_store), null_tracker())
    stage = Stage(role="network", network=name, width=0.1, epochs=1)
    network = build(job, stage)
    dataset = SliceDataset(job.table, job.spec)
    batch = to_device(dataset.__getitems__(np.arange(2) * dataset.views.count), dataset, torch.device("cpu"))
    logits = network(batch.image).logits
    assert logits.shape == batch.mask.shape == (2, 3, 64, 64)
    segmentation(logits, batch.mask).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    save_network(tmp_path / "best.safetensors", network, model_card(job, stage))
    again, card = load_network(tmp_path / "best.safetensors")
    assert (card.classes, card.spec.regions, card.label_values) == (3, ("organ", "tumour"), (1, 2))
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(batch.image).logits, network.eval()(batch.image).logits)


@pytest.mark.parametrize("method", sorted(DISTILLERS))
def test_every_method_takes_a_step_with_three_classes_from_the_cache(method, job, tmp_path):
    """What is read from the cache has the shapes that were computed, and every parameter gets a gradient."""
    network = {"teacher": "unet", "student": "unet", "teacher_width": 0.05, "student_width": 0.05}
    job = job(DistillOptions, method=method, cache="on", cache_dtype="float32", epochs=1, **network)
    torch.manual_seed(0)
    save_network(tmp_path / "t.safetensors", build(job, teacher_stage(job)), model_card(job, teacher_stage(job)))
    student = build(job, student_stage(job))
    teaching = with_teacher(job, SavedNetworks((tmp_path / "t.safetensors",)), range(1), student)
    dataset = SliceDataset(job.table, job.spec, teaching.targets.cache, job.options.slice_views)
    keys = np.arange(4) * dataset.views.count
    batches = [to_device(dataset.__getitems__(keys), dataset, torch.device("cpu"))]
    mask, computed = teaching.targets(batches[0])
    teaching.targets.flush()
    batches.append(to_device(dataset.__getitems__(keys), dataset, torch.device("cpu")))
    assert batches[1].targets is not None or not computed
    _, cached = teaching.targets(batches[1])
    assert computed.keys() == cached.keys()
    for name, target in computed.items():
        torch.testing.assert_close(cached[name], target, rtol=1e-6, atol=1e-6)
    terms = teaching.distillation(batches[0].image, mask, cached, batches[0].index, None)
    sum(terms.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in teaching.distillation.parameters())


def test_the_cache_keeps_one_logit_less_than_there_are_classes(job, tmp_path):
    network = {"teacher": "enet", "student": "enet", "teacher_width": 0.25, "student_width": 0.25}
    for task, kept in (("organ", 1), ("all", 2)):
        made = job(DistillOptions, task=task, method="kd", cache="on", epochs=1, **network)
        save_network(
            tmp_path / "t.safetensors", build(made, teacher_stage(made)), model_card(made, teacher_stage(made))
        )
        teacher = SavedNetworks((tmp_path / "t.safetensors",))
        targets = with_teacher(made, teacher, range(1), build(made, student_stage(made))).targets
        assert [list(shape) for shape in targets.cache.layout.shapes.values()] == [[kept, 64, 64]]


ORGANS = {"spleen": 1, "right_kidney": 2, "left_kidney": 3, "liver": 5, "stomach": 6}


@pytest.fixture(scope="module")
def abdomen(shared, tmp_path_factory) -> Path:
    """Every third slice of the real CT is a case, so that all organs are in each of three."""
    folder = tmp_path_factory.mktemp("abdomen")
    for kind in ("ct", "organs"):
        source = nibabel.load(shared / "real_ct" / f"abdomen_3mm_{kind}.nii.gz")
        for k in range(3):
            affine = source.affine @ np.diag([1, 1, 3, 1])
            save(folder / "in" / f"case{k}_{kind}.nii.gz", np.asanyarray(source.dataobj)[..., k::3], affine)
    patterns = ["--image-pattern", "{case}_ct.nii.gz", "--label-pattern", "{case}_organs.nii.gz"]
    labels = ["--labels", ",".join(f"{name}={value}" for name, value in ORGANS.items()), "--other", "background"]
    regions = ["--regions", "kidneys=right_kidney+left_kidney"]
    store = str(folder / "abdomen.zarr")
    line = ["prepare", str(folder / "in"), store, "--layout", "pairs", *patterns, *labels, *regions, "--workers", "1"]
    assert spark_data(line) == 0
    assert spark_data(["split", store, "--train", "1", "--val", "1", "--test", "1"]) == 0
    return folder


def test_five_organs_of_a_real_ct(abdomen, tmp_path, monkeypatch, capsys):
    """Trained for a few steps alone and with a teacher, evaluated, drawn and compared for each organ."""
    monkeypatch.chdir(tmp_path)
    store = str(abdomen / "abdomen.zarr")
    small = ["--dataset", store, "--task", "all", "--crop", "64", "--crop-shift", "[0,0]", "--epochs", "1"]
    small += ["--batch-size", "4", "--augment", "none"]
    with keep_signals():
        assert main(["train", *small, "--network", "enet", "--width", "0.25", "--out", "alone"]) == 0
        taught = ["--student-width", "0.25", "--teacher-width", "0.05", "--method", "kd", "--cache", "on"]
        assert main(["distill", *small, *taught, "--out", "taught"]) == 0
    best = "taught/student/best.safetensors"
    card = load_card(Path(best))
    assert (card.classes, card.spec.regions, card.label_values) == (6, tuple(ORGANS), tuple(ORGANS.values()))
    keys = {f"dice.{organ}" for organ in ORGANS} | {f"hd95.{organ}" for organ in ORGANS} | {"dice", "hd95"}
    of_test = json.loads(Path("taught/student/test_cases.json").read_text())
    assert of_test["task"] == ",".join(ORGANS)
    (case,) = of_test["cases"].values()
    assert keys <= case.keys()
    assert case["dice"] == pytest.approx(np.mean([case[f"dice.{organ}"] for organ in ORGANS]))
    assert card.val_dice is not None

    capsys.readouterr()
    assert main(["evaluate", best, "--dataset", store, "--task", "liver,kidneys", "--out", "two.json"]) == 0
    assert "liver, kidneys, test" in " ".join(capsys.readouterr().out.split())
    (two,) = json.loads(Path("two.json").read_text())["cases"].values()
    assert {key.partition(".")[2] for key in two} == {"", "liver", "kidneys"}
    assert two["dice.liver"] == case["dice.liver"]
    assert main(["evaluate", best, "--dataset", store, "--task", "pancreas"]) == 2
    assert "there is no region 'pancreas'" in capsys.readouterr().err

    assert main(["picture", best, "alone/network/best.safetensors", "--dataset", store, "--out", "p.png"]) == 0
    assert Path("p.png").stat().st_size > 10_000
    assert spark_data(["preview", store, "--out", "look", "--slices", "4"]) == 0
    assert spark_data(["stats", store, "--out", "stats.png"]) == 0
    capsys.readouterr()
    assert main(["compare", "--experiment", "abdomen-all", "--csv", "table.csv"]) == 0
    out = capsys.readouterr().out
    for organ in ORGANS:
        assert f"abdomen, {organ} of {','.join(ORGANS)}, split default: test dice of 1 cases" in " ".join(out.split())


def test_runs_are_compared_for_each_region():
    """The paired difference of a region is over that region's metrics, beside the one of the mean."""
    facts = {"dataset": "d", "task": "c,b.c", "split": "s", "role": "student", "network": "enet", "width": 1.0}
    facts |= {"teacher": "", "seed": "1", "parameters": 5}

    def run(method, a, b):
        means = {"dice": (a + b) / 2, "hd95": 1.0}
        cases = {"x": means | {"dice.c": a, "dice.b.c": b, "hd95.c": 2.0, "hd95.b.c": 0.0}}
        return Run(**facts, method=method, cases=cases)

    rows = {(row.task, row.method): row for row in compare([run("none", 0.5, 0.7), run("kd", 0.6, 0.4)])}
    assert len(rows) == 6
    for task, difference, hd95 in (("c,b.c", -0.1, 1), ("c of c,b.c", 0.1, 2), ("b.c of c,b.c", -0.3, 0)):
        assert rows[task, "kd"].difference == pytest.approx(difference)
        assert rows[task, "kd"].hd95 == hd95
        assert rows[task, "none"].difference is None
