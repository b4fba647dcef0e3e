"""The commands as users start them, on a tiny store."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from spark_dist.evaluation.comparison import compare
from spark_dist.training.checkpoint import load_state, newest_state
from spark_dist.training.finished_runs import load_runs
from spark_dist.training.journal import read_journal
from spark_dist.training.runs_page import COLUMNS

SMALL = ("--task", "organ", "--crop", 32, "--crop-shift", "[0,0]", "--batch-size", 8, "--log-every", 2)
SMALL += ("--slices", "labelled")
TAUGHT = ("--teacher", "unet", "--teacher-width", 0.05, "--student-width", 0.25)
CACHED = ("--cache", "on")  # a teacher this small is as fast as reading


@pytest.fixture
def distilled(launch, tiny_store, tmp_path):
    """A function that runs a distill job in a folder of this test and returns its output."""

    def run(out, *arguments, processes=2, code=0):
        arguments = ("--dataset", tiny_store, *SMALL, *TAUGHT, *CACHED, "--out", out, *arguments)
        return launch(processes, "distill", *arguments, cwd=tmp_path, code=code)

    return run


def last_state(stage):
    return load_state(newest_state(stage / "checkpoints"))


@pytest.mark.launch
@pytest.mark.slow
def test_two_processes_train_teacher_and_student_and_reuse_the_cache(distilled, jobs, tiny_store, tmp_path):
    import mlflow

    first = distilled("one", "--epochs", 2)
    assert "0 of" in first.stdout
    assert first.stdout.count("The runs in a browser: ") == 1
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("tiny-organ")
    assert f"/#/experiments/{experiment.experiment_id}/runs?workflowType=machine_learning" in first.stdout
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    parent = runs["one"]
    for name, role in (("teacher unet", "teacher"), ("spark enet", "student")):
        run = runs[name]
        assert run.info.status == "FINISHED"
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.data.tags["role"] == role
        assert 0 <= run.data.metrics["test/dice"] <= 1
        paths = {file.path for file in client.list_artifacts(run.info.run_id)}
        assert {"best.safetensors", "test_cases.json", "predictions.png"} <= paths
    assert runs["spark enet"].data.tags["method"] == "spark"
    check_pages(client, parent, runs["teacher unet"], runs["spark enet"])

    teacher = tmp_path / "one" / "teacher" / "best.safetensors"
    alone = ("--dataset", tiny_store, *SMALL, "--network", "enet", "--width", 0.25, "--epochs", 1)
    for out, seed in (("alone", 3407), ("other", 5)):
        assert jobs("train", *alone, "--seed", seed, "--out", out, folder=tmp_path)[0] == [0]
    second = distilled("two", "--epochs", 2, "--teacher-checkpoint", teacher)
    assert "reuses it" in second.stdout
    assert "student alone" not in first.stdout
    assert "to the student alone in " in second.stdout
    assert ", which has other options: epochs 1\n" in second.stdout
    (run,) = client.search_runs([experiment.experiment_id], "attributes.run_name = 'two'")
    (taught,) = client.search_runs(
        [experiment.experiment_id], f"tags.mlflow.parentRunId = '{run.info.run_id}' and params.method = 'spark'"
    )
    assert str(teacher) in taught.data.params["teacher_checkpoint"]
    assert "teacher_width" not in taught.data.params  # that option's value, which nothing used
    cases = [
        json.loads((tmp_path / out / "test_cases.json").read_text())["cases"]
        for out in ("two/student", "alone/network")
    ]
    differences = [cases[0][name]["dice"] - cases[1][name]["dice"] for name in cases[0]]
    assert run.data.metrics["student/difference_to_alone"] == pytest.approx(sum(differences) / len(differences))
    assert Path(run.data.tags["student_alone"]) == tmp_path / "alone"
    assert "Distilled less alone" in run.data.tags["mlflow.note.content"]
    assert "student/difference_to_alone" not in parent.data.metrics
    assert "cases.json" in {file.path for file in client.list_artifacts(run.info.run_id)}
    assert " 0 by a teacher forward" in second.stdout
    a, b = (load_file(tmp_path / out / "student" / "best.safetensors") for out in ("one", "two"))
    assert all(torch.equal(a[key], b[key]) for key in a)

    third = distilled("three", "--epochs", 2, "--seed", 5)  # another teacher
    assert "(new): 0 of" in third.stdout

    rows = compare(load_runs(f"sqlite:///{tmp_path}/mlflow.db")[0])
    found = [(row.title, row.against_options) for row in rows if row.seeds == "2 seeds"]
    assert found == [("teacher", ""), ("student alone", ""), ("student, spark (unet)", "epochs 1")]


def check_pages(client, parent, teacher, student):
    """What a person looks for in MLflow is there, and true of the run where it stands."""
    for role, run in (("teacher", teacher), ("student", student)):
        metrics = run.data.metrics
        assert {"parameters", "gflops", "speed/epoch_seconds", "speed/slices_per_second"} < metrics.keys()
        assert metrics["parameters"] == float(run.data.tags["parameters"])
        assert metrics["test_dice_low"] <= metrics["test_dice"] <= metrics["test_dice_high"]
        best = max(client.get_metric_history(run.info.run_id, "val/dice"), key=lambda found: found.value)
        assert metrics["best_val_dice"] == best.value
        for key in ("test_dice", "test_dice_low", "test_misses", "best_val_dice", "best_epoch", "parameters", "gflops"):
            assert parent.data.metrics[f"{role}/{key}"] == metrics[key]
        pictures = {file.path.split("+")[2] for file in client.list_artifacts(run.info.run_id, "images")}
        steps = [found.step for found in client.get_metric_history(run.info.run_id, "val/dice")]
        assert pictures == {str(steps[0])}  # one of five validations
        (used,) = run.inputs.dataset_inputs
        assert used.dataset.name == "tiny"
        assert json.loads(used.dataset.profile)["train"] == 5
        table = json.loads(Path(client.download_artifacts(run.info.run_id, "cases.json")).read_text())
        assert [row[0] for row in table["data"]] == ["case_00008", "case_00009", "case_00010"]
        assert json.loads(run.data.tags["mlflow.loggedArtifacts"]) == [{"path": "cases.json", "type": "table"}]
        assert {"mlflow.user", "torch", "device", "mixed_precision"} < run.data.tags.keys()
        assert f"| network | {run.data.tags['network']} |" in run.data.tags["mlflow.note.content"]
    assert set(COLUMNS) - {"student/difference_to_alone"} <= parent.data.metrics.keys()
    assert student.data.params["network"] == "enet"
    assert "method.gain" in student.data.params
    assert (teacher.data.params["network"], teacher.data.params["method"]) == ("unet", "none")
    assert {"teacher", "teacher_width", "hard_labels"} < student.data.params.keys()
    assert not [key for key in teacher.data.params if key.startswith(("student", "method.", "teacher", "hard_"))]


@pytest.mark.launch
@pytest.mark.slow
def test_an_epoch_from_the_cache_gives_the_weights_of_a_live_one(distilled, tmp_path):
    distilled("live", "--epochs", 1, "--cache", "off", "--method", "kd", processes=1)
    teacher = ("--teacher-checkpoint", tmp_path / "live" / "teacher" / "best.safetensors", "--cache-dtype", "float32")
    distilled("filling", "--epochs", 1, "--method", "kd", *teacher, processes=1)
    cached = distilled("cached", "--epochs", 1, "--method", "kd", *teacher, processes=1)
    assert " 0 by a teacher forward" in cached.stdout
    a, b, c = (load_file(tmp_path / out / "student" / "best.safetensors") for out in ("live", "filling", "cached"))
    for key in a:
        assert torch.equal(a[key], b[key]), key
        assert torch.equal(a[key], c[key]), key


@pytest.mark.launch
@pytest.mark.slow
def test_two_and_three_processes_train_as_one_does(launch, tiny_store, tmp_path):
    """The soft Dice is over the global batch, uneven shares count by their size: the weights agree."""
    command = ("--dataset", tiny_store, *SMALL, "--teacher", "unet", "--teacher-width", 0.05)
    command += ("--student", "without-norm", "--method", "kd", "--epochs", 3)
    launch(1, "distill", *command, "--student", "enet", "--epochs", 1, "--out", "teacher", cwd=tmp_path)
    command += ("--teacher-checkpoint", tmp_path / "teacher" / "teacher" / "best.safetensors", "--cache", "off")
    weights = {}
    for processes in (1, 2, 3):
        launch(processes, "distill_without_norm.py", *command, "--out", f"of-{processes}", cwd=tmp_path)
        weights[processes] = last_state(tmp_path / f"of-{processes}" / "student")["model"]
    for processes in (2, 3):
        for key, value in weights[1].items():
            torch.testing.assert_close(weights[processes][key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_channels_last_and_compiled_it_trains_alike(jobs, tiny_store, tmp_path):
    """The weights that differ show that the options do something."""
    command = ("--dataset", tiny_store, *SMALL, "--log-every", 1, "--network", "unet", "--width", 0.05, "--epochs", 1)
    ways = {"plain": (), "last": ("--channels-last", "true"), "compiled": ("--compile", "true")}
    logged, weights = {}, {}
    for name, options in ways.items():
        codes, log = jobs("train", *command, *options, "--out", name, folder=tmp_path)
        assert codes == [0], log
        folder = tmp_path / name / "network"
        logged[name] = [e["metrics"] for _, e in read_journal(folder) if "train/loss" in e.get("metrics", {})]
        weights[name] = last_state(folder)["model"]
    # Generated code draws other random numbers for dropout.
    for name, tolerance in (("last", 2e-3), ("compiled", 5e-2)):
        for metrics, plain in zip(logged[name], logged["plain"], strict=True):
            assert metrics["train/loss"] == pytest.approx(plain["train/loss"], rel=tolerance)
        assert weights[name].keys() == weights["plain"].keys()
        assert not all(torch.equal(weights[name][key], value) for key, value in weights["plain"].items())


@pytest.mark.slow
def test_figures_do_not_depend_on_the_number_of_processes(jobs, tiny_store, tmp_path):
    def run(processes, *command):
        codes, log = jobs(*command, folder=tmp_path, processes=processes)
        assert not any(codes), log

    data = ("--dataset", tiny_store)
    run(1, "train", *data, *SMALL, "--network", "enet", "--width", 0.25, "--epochs", 1, "--out", "a")
    checkpoint = tmp_path / "a" / "network" / "best.safetensors"
    for processes in (1, 2, 3):
        run(processes, "evaluate", checkpoint, *data, "--out", f"{processes}.json")
    one, two, three = (json.loads((tmp_path / f"{n}.json").read_text()) for n in (1, 2, 3))
    assert len(one["cases"]) == 3
    assert one == two == three
    assert one["cases"] == json.loads((tmp_path / "a" / "network" / "test_cases.json").read_text())["cases"]
    run(1, "evaluate", checkpoint, *data, "--surface-tolerance", 1000, "--out", "far.json")
    far = json.loads((tmp_path / "far.json").read_text())
    assert far["surface_tolerance"] == 1000
    for name, figures in far["cases"].items():
        assert figures["surface_dice"] == (0 if figures["hd"] == "inf" else 1)
        assert {**figures, "surface_dice": one["cases"][name]["surface_dice"]} == one["cases"][name]


@pytest.mark.launch
@pytest.mark.slow
def test_the_same_command_does_not_train_again(launch, tiny_store, tmp_path):
    command = ("--dataset", tiny_store, *SMALL, "--network", "enet", "--width", 0.25, "--out", "job")
    launch(1, "train", *command, "--epochs", 1, cwd=tmp_path)
    assert "done already" in launch(1, "train", *command, "--epochs", 1, cwd=tmp_path).stdout
    refused = launch(1, "train", *command, "--epochs", 2, cwd=tmp_path, code=2)
    assert "epochs=1, not 2" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--network", "enett"), "there is no network 'enett'; did you mean enet"),
        (("--network", "enet", "--crop", "33"), "multiples of 8"),
        (("--network", "enet", "--task", "liver"), "liver"),
        (("--network", "enet", "--epoch", "3"), "epoch"),
        (("--network", "enet", "--split", "other"), "there is no split 'other'"),
        (("--network", "enet", "--dataset", "nowhere"), "nowhere: no slice store here"),
        (("--network", "enet", "--config", "recipe.yaml"), "recipe.yaml: there is no option 'batchsize'"),
    ],
)
def test_mistakes_are_one_line(tiny_store, tmp_path, monkeypatch, capsys, arguments, message):
    from spark_dist.cli import main

    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text("batchsize: 3\n")
    assert main(["train", "--dataset", str(tiny_store), *map(str, SMALL), *arguments]) != 0
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error


def test_method_and_weight_that_do_not_exist(tiny_store, tmp_path, monkeypatch, capsys):
    from spark_dist.cli import main

    monkeypatch.chdir(tmp_path)
    start = ["distill", "--dataset", str(tiny_store), *map(str, SMALL)]
    assert main([*start, "--method", "sparc"]) != 0
    assert "there is no distillation method 'sparc'; did you mean spark" in capsys.readouterr().err
    assert main([*start, "--method", "tfkd"]) != 0
    assert "the student's own network" in capsys.readouterr().err
    assert main([*start, "--weights.gian", "3"]) != 0
    assert "did you mean gain" in capsys.readouterr().err


@pytest.mark.slow
def test_a_damaged_slice_ends_the_job_with_its_name(launch, tiny_store, tmp_path):
    shutil.copytree(tiny_store, tmp_path / "tiny.zarr")
    shard = tmp_path / "tiny.zarr" / "cases" / "case_00002" / "label" / "c" / "0" / "0" / "0"
    shard.write_bytes(shard.read_bytes()[:-5])
    command = ("--dataset", "tiny.zarr", *SMALL, "--network", "enet", "--width", 0.25, "--epochs", 1)
    for workers in (0, 1):
        failed = launch(1, "train", *command, "--workers", workers, "--out", f"of-{workers}", cwd=tmp_path, code=2)
        error = failed.stderr.strip().splitlines()[-1]
        assert error.startswith("error: ")
        assert "case_00002 slice" in error
        assert "Traceback" not in failed.stderr


@pytest.mark.slow
def test_a_full_disk_is_an_error_that_names_the_file(launch, tiny_store, small_disk, tmp_path):
    small = small_disk("600k")
    command = ("--dataset", tiny_store, *SMALL, "--network", "enet", "--epochs", 1)
    failed = launch(1, "train", *command, "--out", small / "job", cwd=tmp_path, code=2)
    assert "Traceback" not in failed.stderr
    assert "can't be written" in failed.stderr
