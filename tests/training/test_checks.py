"""Mistakes that are found where a job meets its data, before anything is trained or written."""

import pytest
from conftest import keep_signals

from data_tools.errors import UserError
from spark_dist.cli import main
from spark_dist.config import DistillOptions, TrainOptions
from spark_dist.training.checks import check_shares

SMALL = ("--task", "organ", "--crop", "32", "--crop-shift", "[0,0]")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "--network", "enet", "--crop-shift", "[500,500]"), "sees nothing of case_0000"),
        (("train", "--network", "enet", "--crop-shift", "[0,-38]"), "sees nothing of case_0000"),
        (("distill", "--crop-shift", "[500,500]"), "--crop-shift [500, 500]"),
        (("distill", "--method", "sp", "--batch-size", "1"), "learns nothing from fewer than 2"),
        (("distill", "--method", "rkd", "--batch-size", "2"), "learns nothing from fewer than 3"),
        (("distill", "--method", "rkd", "--batch-size", "8", "--accumulate", "4"), "a smaller --accumulate"),
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
        check_shares(options, 96, processes)
        return
    with pytest.raises(UserError, match=f"method {method} compares the slices that a process has"):
        check_shares(options, 96, processes)


def test_a_network_alone_trains_on_one_slice_a_process():
    check_shares(TrainOptions(dataset="d.zarr", task="organ", network="enet", batch_size=4), 100, 4)
