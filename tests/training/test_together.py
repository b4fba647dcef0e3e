"""Teacher and student in one job: in rounds, or both at every step."""

import signal

import pytest
import torch
from golden import random_case
from safetensors.torch import load_file
from test_resume import assert_same, trace

from data_tools.errors import UserError
from spark_dist.config import DistillOptions
from spark_dist.distillers import build_distiller
from spark_dist.networks import build_network
from spark_dist.training.checks import check
from spark_dist.training.distillation import Distillation
from spark_dist.training.journal import read_journal

SMALL = ("--task", "organ", "--crop", 32, "--crop-shift", "[0,0]", "--batch-size", 6, "--log-every", 2)
SMALL += ("--slices", "labelled")
TEACHER = ("--teacher", "unet", "--teacher-width", 0.05)
STUDENT = ("--student-width", 0.25, "--cache", "on", "--cache-folder", "cache", "--checkpoint-steps", 2)


def logged(folder):
    """The names of a run's metrics."""
    return {key for _, event in read_journal(folder) for key in event.get("metrics", {})}


@pytest.mark.slow
def test_one_round_is_training_the_teacher_and_then_the_student(jobs, tiny_store, tmp_path):
    common = ("--dataset", tiny_store, *SMALL, "--epochs", 2)
    assert jobs("distill", *common, *TEACHER, *STUDENT, "--rounds", 1, "--out", "one", folder=tmp_path)[0] == [0]
    train = (*common, "--network", "unet", "--width", 0.05, "--out", "alone")
    assert jobs("train", *train, folder=tmp_path)[0] == [0]
    teacher = ("--teacher-checkpoint", tmp_path / "alone" / "network" / "best.safetensors")
    assert jobs("distill", *common, *teacher, *STUDENT, "--out", "two", folder=tmp_path)[0] == [0]
    a, b = (load_file(tmp_path / out / "student" / "best.safetensors") for out in ("one", "two"))
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["rounds", "live"])
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_in_any_round_and_resumed_it_is_as_if_nothing_had_been(jobs, tiny_store, tmp_path, how, processes):
    arguments = ("--dataset", tiny_store, *SMALL, *TEACHER, *STUDENT, "--epochs", 4, "--out", "job")
    arguments += ("--rounds", 3) if how == "rounds" else ("--together", "live")
    codes, log = jobs("distill", *arguments, folder=tmp_path / "whole", processes=processes)
    assert not any(codes), log
    for n in (3, 9, 14, 4) if how == "rounds" else (3, 6, 4):
        fault = {"place": "step", "n": n, "signal": int(signal.SIGKILL), "rank": processes - 1}
        codes, log = jobs("distill", *arguments, folder=tmp_path / "parts", processes=processes, **fault)
        assert codes[-1] == -signal.SIGKILL, log
    codes, log = jobs("distill", *arguments, folder=tmp_path / "parts", processes=processes)
    assert not any(codes), log

    for folder in (tmp_path / "whole", tmp_path / "parts"):
        teacher, student = folder / "job" / "teacher", folder / "job" / "student"
        assert {"val/dice", "train/loss", "test/dice"} <= logged(teacher)
        assert {"val/dice", "train/loss", "test/dice"} <= logged(student)
        assert load_file(student / "best.safetensors").keys() == build_network("enet", width=0.25).state_dict().keys()
        if how == "rounds":
            # Each round has a cache of its own, and the last is left.
            assert len(list((folder / "cache").iterdir())) == 1
            hits = [e["step"] for _, e in read_journal(student) if "cache/hits" in e.get("metrics", {})]
            steps = max(e["step"] for _, e in read_journal(student) if "train/loss" in e.get("metrics", {})) // 4
            assert hits == [1 * steps, 2 * steps, 4 * steps]  # after each round's epochs
        else:
            assert not (folder / "cache").exists()
    if how == "rounds":
        assert_same(*(trace(tmp_path / name) for name in ("whole", "parts")))
        return
    for network in ("teacher", "student"):
        assert_same(*(load_file(tmp_path / n / "job" / network / "best.safetensors") for n in ("whole", "parts")))


def test_a_live_teacher_learns_from_the_truth_alone_and_the_student_from_it():
    torch.manual_seed(0)
    student, teacher = build_network("enet", width=0.25), build_network("unet", width=0.05)
    distiller = build_distiller("spark", student=student.taps, teacher=teacher.taps)
    model = Distillation(student, distiller, teacher).train()
    image = torch.randn(2, 1, 32, 32)
    mask = random_case(student.taps, teacher.taps, n=2)[2]
    terms = model(image, mask, {}, torch.arange(2))
    assert set(terms) == {"segmentation", "ced", "kl", "teacher"}
    learned = sum(value for name, value in terms.items() if name != "teacher")
    learned.backward(retain_graph=True)
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in student.parameters())
    terms["teacher"].backward()
    assert all(p.grad is not None for p in teacher.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 0}, "--rounds must be at least 1, not 0"),
        ({"rounds": 4, "epochs": 3}, "--rounds 4"),
        ({"rounds": 2, "teacher_checkpoint": "x"}, "leave out --rounds"),
        ({"together": "live", "rounds": 2}, "leave out --rounds"),
        ({"together": "live", "teacher_epochs": 2}, "--teacher-epochs"),
    ],
)
def test_what_does_not_go_together_is_said(options, message):
    with pytest.raises(UserError, match=message):
        check(DistillOptions(dataset="x", task="organ", **options))
