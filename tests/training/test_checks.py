"""Mistakes that are found where a job meets its data, before anything is trained or written."""

import shutil

import numpy as np
import pytest
from conftest import keep_signals, model_card

from data_tools.errors import UserError
from data_tools.store import open_store, write_split
from spark_dist.cli import main
from spark_dist.config import DistillOptions, TrainOptions
from spark_dist.data.identity import image_fingerprint
from spark_dist.data.slices import SliceTable
from spark_dist.networks import build_network
from spark_dist.networks.checkpoint import save_network
from spark_dist.training.checks import check_shares, check_teacher_cases

SMALL = ("--task", "organ", "--crop", "32", "--crop-shift", "[0,0]")
SMALL += ("--slices", "labelled")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "--network", "enet", "--crop-shift", "[500,500]"), "sees nothing of case_0000"),
        (("train", "--network", "enet", "--crop-shift", "[0,-38]"), "sees nothing of case_0000"),
        (("distill", "--crop-shift", "[500,500]"), "--crop-shift [500, 500]"),
        (("distill", "--method", "sp", "--batch-size", "1"), "learns nothing from fewer than 2"),
        (("distill", "--method", "rkd", "--batch-size", "2"), "learns nothing from fewer than 3"),
        (("distill", "--method", "rkd", "--batch-size", "8", "--accumulate", "4"), "a smaller --accumulate"),
        (
            ("distill", "--rounds", "3", "--steps", "1"),
            "the student has 1, and the teacher 1",
        ),
        (("distill", "--epochs", "2", "--distill-warmup", "1000"), "--distill-warmup 1000 must be less than the "),
        (("train", "--network", "enet", "--accumulate", "17"), "use fewer processes or a larger --batch-size"),
    ],
)
def test_a_job_that_learns_nothing_is_an_error_before_it_begins(
    tiny_store, tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    command, *rest = arguments
    with keep_signals():
        assert main([command, "--dataset", str(tiny_store), *SMALL, *rest, "--out", "job"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def slices(n):
    """A table of n labelled slices of one case; nothing is read of the store."""
    return SliceTable(store=None, cases=("case",), case=np.zeros(n, np.int32), slice=np.arange(n, dtype=np.int32))


@pytest.mark.parametrize(
    ("method", "batch", "processes", "parts", "sound"),
    [
        ("rkd", 16, 16, 1, False),
        ("rkd", 16, 8, 1, False),
        ("rkd", 16, 5, 1, True),
        ("rkd", 16, 4, 2, False),
        ("rkd", 16, 1, 5, True),
        ("sp", 16, 16, 1, False),
        ("sp", 16, 8, 1, True),
        ("sp", 16, 4, 4, False),
        # 96 slices are 7 batches of 13 or 14.
        ("sp", 15, 8, 1, False),
        ("kd", 16, 16, 1, True),
    ],
)
def test_methods_that_compare_slices_need_some_on_every_process(method, batch, processes, parts, sound):
    options = DistillOptions(dataset="d.zarr", task="organ", method=method, batch_size=batch, accumulate=parts)
    if sound:
        check_shares(options, slices(96), processes)
        return
    with pytest.raises(UserError, match=f"method {method} compares the slices that a process has"):
        check_shares(options, slices(96), processes)


def test_a_network_alone_trains_on_one_slice_a_process():
    check_shares(TrainOptions(dataset="d.zarr", task="organ", network="enet", batch_size=4), slices(100), 4)


@pytest.fixture
def teacher(tiny_store, tmp_path, monkeypatch):
    """A function that gives the options of a job whose teacher was trained on some cases of the tiny store."""
    monkeypatch.chdir(tmp_path)
    store = open_store(tiny_store)

    def options(*cases, known=True, **more):
        seen = tuple(image_fingerprint(store, name) for name in cases) if known else None
        save_network(tmp_path / "teacher.safetensors", build_network("enet", width=0.25), model_card(trained_on=seen))
        return {"dataset": tiny_store, "task": "organ", "teacher_checkpoint": [tmp_path / "teacher.safetensors"]} | more

    return options


def test_a_teacher_that_knows_test_cases_is_an_error_unless_told(tiny_store, tmp_path, teacher, capsys):
    store = open_store(tiny_store)
    assert check_teacher_cases(store, DistillOptions(**teacher("case_00000", "case_00001"))) == ""
    assert "does not say which cases" in check_teacher_cases(store, DistillOptions(**teacher(known=False)))
    for name, part in (("case_00006", "val"), ("case_00009", "test")):
        told = DistillOptions(**teacher("case_00000", name, allow_teacher_overlap=True))
        assert f"1 {part} cases of split 'default' ({name}" in check_teacher_cases(store, told)
        with pytest.raises(UserError, match=rf"was trained on 1 {part} cases .* \({name} .*--allow-teacher-overlap"):
            check_teacher_cases(store, DistillOptions(**teacher("case_00000", name)))
    line = ["distill", "--dataset", str(tiny_store), *SMALL, "--teacher", "enet", "--out", "job"]
    with keep_signals():
        assert main([*line, "--teacher-checkpoint", "teacher.safetensors"]) == 2
    assert "so that metrics would say nothing of new cases" in capsys.readouterr().err
    assert not (tmp_path / "job").exists()


def test_a_teacher_of_another_split_or_store_knows_its_cases_by_their_images(tiny_store, tmp_path, teacher):
    shutil.copytree(tiny_store, tmp_path / "other.zarr")
    record = {"train": ["case_00009"], "val": ["case_00001"], "test": ["case_00002"], "seed": 0}
    write_split(tmp_path / "other.zarr", "second", record)
    store = open_store(tmp_path / "other.zarr")
    assert check_teacher_cases(store, DistillOptions(**teacher("case_00009", split="second"))) == ""
    with pytest.raises(UserError, match=r"was trained on 1 test cases of split 'second' \(case_00002"):
        check_teacher_cases(store, DistillOptions(**teacher("case_00002", "case_00009", split="second")))
