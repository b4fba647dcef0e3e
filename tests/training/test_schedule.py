"""The schedule of the distillation's weight."""

import math

import pytest
import torch
from conftest import keep_signals
from torch import nn

from spark_dist.cli import main
from spark_dist.config import TrainOptions
from spark_dist.distillers.kd import KD
from spark_dist.networks.base import Tap, Taps
from spark_dist.training.distillation import Distillation, distillation_factor
from spark_dist.training.journal import read_journal

TAPS = Taps(Tap(4, 2), Tap(6, 8))


def factors(schedule, warmup, total=8):
    return [distillation_factor(schedule, warmup, step, total) for step in range(total)]


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0, [1.0] * 8),
        ("constant", 4, [0, 1 / 4, 2 / 4, 3 / 4, 1, 1, 1, 1]),
        ("constant", 0.5, [0, 1 / 4, 2 / 4, 3 / 4, 1, 1, 1, 1]),
        ("constant", 1, [0.0] + [1.0] * 7),
        ("linear", 0, [1 - k / 8 for k in range(8)]),
        ("linear", 4, [0, 1 / 4, 2 / 4, 3 / 4, 1, 3 / 4, 2 / 4, 1 / 4]),
        ("cosine", 0, [(1 + math.cos(math.pi * k / 8)) / 2 for k in range(8)]),
        ("cosine", 0.25, [0, 1 / 2] + [(1 + math.cos(math.pi * k / 6)) / 2 for k in range(6)]),
    ],
)
def test_the_factor_at_each_step(schedule, warmup, expected):
    assert factors(schedule, warmup) == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_decay_ends_at_nothing(schedule):
    assert distillation_factor(schedule, 0.1, 10**6 - 1, 10**6) == pytest.approx(0, abs=1e-5)


def test_the_terms_of_the_ground_truth_are_left_as_they_are():
    model = Distillation(nn.Identity(), KD(TAPS, TAPS), schedule=lambda step, total: step / total)
    terms = {name: torch.tensor(2.0) for name in ("segmentation", "kl", "teacher")}
    assert {k: v.item() for k, v in model.scheduled(terms, 1, 4).items()} == {
        "segmentation": 2,
        "kl": 0.5,
        "teacher": 2,
    }
    assert Distillation(nn.Identity(), KD(TAPS, TAPS)).scheduled(terms, 1, 4) == terms


@pytest.mark.slow
def test_a_job_follows_its_schedule(tiny_store, tmp_path, monkeypatch):
    """With a rate of 0 nothing but the factor changes from step to step: the first step has none of the KL."""
    monkeypatch.chdir(tmp_path)
    small = ("--task", "organ", "--crop", "32", "--crop-shift", "[0,0]", "--batch-size", "6", "--log-every", "1")
    small += (
        "--teacher",
        "unet",
        "--teacher-width",
        "0.05",
        "--student-width",
        "0.25",
        "--method",
        "kd",
        "--epochs",
        "1",
    )
    small += ("--teacher-epochs", "1", "--cache", "off", "--augment", "none", "--distill-warmup", "2", "--out", "job")
    with keep_signals():
        assert main(["distill", "--dataset", str(tiny_store), *small]) == 0
    logged = [e["metrics"] for _, e in read_journal(tmp_path / "job" / "student") if "train/kl" in e.get("metrics", {})]
    kl = [metrics["train/kl"] for metrics in logged]
    assert len(kl) > 2
    assert kl[0] == 0 < kl[1]
    assert all(metrics["train/segmentation"] > 0 for metrics in logged)


def test_a_picture_every_so_many_validations():
    def drawn(epochs=12, steps=10, **options):
        options = TrainOptions(dataset="x", task="organ", network="enet", **options)
        return [n for n in range(epochs) if options.draws(n, steps) and options.validates(n, steps)]

    assert drawn() == [0, 5, 10]
    assert drawn(picture_every=0) == []
    assert drawn(picture_every=1) == list(range(12))
    assert drawn(val_every=2) == [1, 11]
    assert drawn(val_steps=25, picture_every=2) == [2, 7]
    assert drawn(val_steps=5, picture_every=2) == list(range(12))  # two are due in each epoch, which has one
