"""Cross-validation: every fold is a job, and the folds are pooled."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT, free_port

from data_tools.cli import main as data_main
from data_tools.store import open_store
from spark_dist.cli import main
from spark_dist.config import DistillOptions, TrainOptions
from spark_dist.crossval import words
from spark_dist.evaluation.comparison import Run
from spark_dist.evaluation.folds import pool_folds
from spark_dist.parsing import parse

SMALL = ("--task", "organ", "--crop", "32", "--crop-shift", "[0,0]", "--epochs", "1", "--batch-size", "16")


@pytest.fixture(scope="module")
def store(tiny_store, tmp_path_factory):
    path = shutil.copytree(tiny_store, tmp_path_factory.mktemp("folds") / "tiny.zarr")
    assert data_main(["split", str(path), "--folds", "3", "--name", "cv"]) == 0
    return path


def of_fold(number, cases, folds=2, seed="0", **other):
    metrics = {case: {"dice": 0.5, "hd95": 1.0} for case in cases}
    facts = {"dataset": "tiny", "task": "organ", "split": f"cv-fold{number}", "role": "student", "network": "enet"}
    facts |= {"width": 1.0, "method": "none", "teacher": "", "seed": seed, "parameters": 9, "cases": metrics}
    return Run(**facts | {"data": f"d{number}", "fold": f"{number} of {folds}", "crossval": "hash"} | other)


def test_all_folds_of_a_cross_validation_are_one_run_with_every_case():
    other = of_fold(0, "a", fold="", crossval="")
    (kept, found), notes = pool_folds([other, of_fold(1, "cd"), of_fold(0, "ab")])
    assert (kept, notes) == (other, [])
    assert sorted(found.cases) == ["a", "b", "c", "d"]
    assert (found.split, found.data, found.fold) == ("cv, 2 folds", "hash", "")


@pytest.mark.parametrize(
    ("runs", "why"),
    [
        ([of_fold(0, "ab")], "fold 1 is not finished"),
        ([of_fold(0, "ab"), of_fold(1, "bc")], "tested in several folds"),
        ([of_fold(0, "ab"), of_fold(1, "cd", network="unet")], "is not finished"),
        ([of_fold(0, "ab"), of_fold(1, "cd", seed="1")], "is not finished"),
        ([of_fold(0, "ab"), of_fold(1, "cd", options=(("augment", "full"),))], "is not finished"),
        ([of_fold(0, "ab"), of_fold(1, "cd", crossval="other")], "is not finished"),
    ],
)
def test_what_is_no_whole_cross_validation_is_not_pooled_and_said(runs, why):
    found, notes = pool_folds(runs)
    assert found == runs
    assert why in notes[0]


def test_a_folds_options_come_back_from_its_command_line():
    job = DistillOptions(dataset=Path("a b.zarr"), task="organ", crop=(64, 32), weights={"gain": 2.5}, mirror=False)
    job = replace(job, split="cv-fold1", cache="off", compile=True, distill_warmup=0.25)
    found = parse(DistillOptions, words(job), "distill")
    assert replace(found, crop=tuple(found.crop)) == job


def test_the_default_folder_names_the_split():
    options = {"dataset": Path("kits.zarr"), "task": "organ", "network": "enet"}
    folders = [TrainOptions(**options | {"split": f"cv-fold{k}"}).folder for k in range(2)]
    assert [folder.name for folder in folders] == ["enet-w1-seed3407-cv-fold0", "enet-w1-seed3407-cv-fold1"]
    assert TrainOptions(**options).folder.name == "enet-w1-seed3407"


def test_an_array_gets_the_options_of_each_fold(store, capsys, monkeypatch, tmp_path):
    line = ["crossval", "train", "--dataset", str(store), *SMALL, "--network", "enet", "--split", "cv"]
    assert main([*line, "--fold", "2"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert {"--split=cv-fold2", "--network=enet", "--crop=32", "--epochs=1"} < set(printed)
    options = parse(TrainOptions, printed, "train")
    assert options.folder.name == "enet-w1-seed3407-cv-fold2"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("train", "--split", "cv"), "--network must be given"),
        (("trian", "--split", "cv"), "did you mean train"),
        (("distill",), "has no folds of a split 'default'; spark-data split"),
        (("distill", "--split", "cv", "--fold", "3"), "'cv' has the folds 0 to 2"),
        (("distill", "--split", "cv", "--accelerate-config", "none.yaml"), "none.yaml: no such file"),
    ],
)
def test_mistakes_are_one_line(store, capsys, more, message):
    assert main(["crossval", *more, "--dataset", str(store), *SMALL]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["", "accelerate"])
def test_killed_in_a_later_fold_the_same_command_goes_on_to_one_table(store, tmp_path, capsys, monkeypatch, launcher):
    monkeypatch.chdir(tmp_path)
    line = ["crossval", "train", "--dataset", str(store), *SMALL, "--network", "enet", "--width", "0.25"]
    line += ["--split", "cv", "--out", "cv", "--tracking-uri", "sqlite:///mlflow.db"]
    if launcher:
        config = (ROOT / "accelerate_config.yaml").read_text().replace("num_processes: 2", "num_processes: 1")
        Path("launch.yaml").write_text(config + f"main_process_port: {free_port()}\n")
        line += ["--accelerate-config", "launch.yaml"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    first, second = tmp_path / "cv" / "cv-fold0" / "network", tmp_path / "cv" / "cv-fold1"
    process = subprocess.Popen([sys.executable, "-m", "spark_dist.crossval", *line[1:]], env=environment)
    while not (second / "job.lock").exists():
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = (first / "best.safetensors").stat().st_mtime_ns
    holder = json.loads((second / "job.lock").read_text())["pid"]
    while os.path.exists(f"/proc/{holder}"):  # it ends soon after crossval
        time.sleep(0.1)
    assert main(line) == 0
    assert (first / "best.safetensors").stat().st_mtime_ns == before
    assert main(["compare", "--tracking-uri", "sqlite:///mlflow.db", "--json", "rows.json"]) == 0
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert (row["cases"], row["split"]) == (len(open_store(store).cases), "cv, 3 folds")
