"""Inputs on which reference values of the losses were taken (losses.json), and small things that tests share."""

import json
from pathlib import Path

import numpy as np
import torch

from spark_dist.networks.base import NetworkOutput, Tap, Taps

SEEDS = (0, 1)
STUDENT = Taps(Tap(16, 2), Tap(128, 8))
TEACHER = Taps(Tap(128, 2), Tap(1024, 16))
SAME_STUDENT = Taps(Tap(32, 2), Tap(32, 8))
SAME_TEACHER = Taps(Tap(32, 2), Tap(32, 16))


def golden_inputs(seed: int, same_channels: bool = False) -> tuple[NetworkOutput, NetworkOutput, torch.Tensor]:
    """Student and teacher output for four slices of 48×48, and their mask."""
    random = np.random.default_rng(seed)
    student, teacher = (SAME_STUDENT, SAME_TEACHER) if same_channels else (STUDENT, TEACHER)
    outputs = []
    for taps in (student, teacher):
        shapes = [(2, 1), *taps]
        arrays = [random.standard_normal((4, c, 48 // s, 48 // s)).astype("float32") for c, s in shapes]
        outputs.append(NetworkOutput(*map(torch.from_numpy, arrays)))
    target = torch.from_numpy((random.random((4, 48, 48)) < 0.2).astype("float32"))
    return *outputs, torch.stack([1 - target, target], dim=1)


def golden_values(shared: Path, seed: int) -> dict:
    """The reference values for a seed."""
    return next(v for v in json.loads((shared / "reference/losses.json").read_text()) if v["seed"] == seed)


def random_case(
    student: Taps, teacher: Taps, n: int = 3, size: tuple[int, int] = (32, 32), seed: int = 0, classes: int = 2
):
    """Random student and teacher output for n slices with a target in the middle, and their mask.

    Each further class fills four columns to the right of the target, in all slices but the first.
    """
    generator = torch.Generator().manual_seed(seed)

    def output(taps: Taps) -> NetworkOutput:
        shapes = [(classes, 1), *taps]
        maps = [torch.randn(n, c, size[0] // s, size[1] // s, generator=generator) for c, s in shapes]
        return NetworkOutput(*maps)

    target = torch.zeros(n, *size)
    target[:, size[0] // 4 : size[0] // 2, size[1] // 4 : size[1] // 2] = 1
    label = target.long()
    for c in range(2, classes):
        label[1:, size[0] // 4 : size[0] // 2, size[1] // 2 + 4 * (c - 2) :][..., :4] = c
    mask = torch.nn.functional.one_hot(label, classes).movedim(-1, 1).float()
    return output(student), output(teacher), mask
