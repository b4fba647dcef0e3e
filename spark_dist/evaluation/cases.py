"""Per-case metrics of a network on whole volumes."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from data_tools.store import Store
from spark_dist.data.slices import VoxelReader
from spark_dist.data.views import SliceSpec

from .inference import covering, probabilities
from .intervals import summarise
from .metrics import TOLERANCE, case_metrics

LABELLED_THRESHOLD = 0.4
"""Probability from which a voxel is the target in the original system's protocol, `labelled-slices`."""


def evaluate_cases(
    accelerator: Accelerator,
    network: nn.Module,
    store: Store,
    cases: Sequence[str],
    spec: SliceSpec,
    tolerance: float | None = TOLERANCE,
) -> dict[str, dict[str, Any]]:
    """Every case's metrics, by case name, the same on every process.

    Cases are shared among the processes and each is predicted whole by one of them, so that the metrics do not depend
    on how many there are. Both protocols: `volume` at `spec.threshold` over whole planes, and `labelled-slices` at
    `LABELLED_THRESHOLD`. `tolerance` (mm) is that of the surface Dice; None leaves out the metrics of surfaces, which
    take longest.
    """
    reader = VoxelReader(store)
    own = {}
    for name in shares(store, cases, accelerator.num_processes)[accelerator.process_index]:
        case = store.cases[name]
        image, ground_truth = reader.case(name, "image"), spec.target(reader.case(name, "label"))
        target = probabilities(network, image, case.window, spec)[0]
        labelled = labelled_slices(network, image, ground_truth, target, case.window, spec)
        own[name] = case_metrics(target >= spec.threshold, ground_truth, case.spacing, labelled, tolerance)
    return dict(sorted(item for part in gather_object([own]) for item in part.items()))


def labelled_slices(
    network: nn.Module,
    image: np.ndarray,
    ground_truth: np.ndarray,
    target: np.ndarray,
    window: Sequence[float],
    spec: SliceSpec,
) -> np.ndarray:
    """The prediction (Z, H, W) bool of the protocol `labelled-slices`: of the training's crop alone, as the original
    system saw slices, and only where there is ground truth; `target` are the probabilities over whole planes."""
    if covering(spec.crop, image.shape[1:], network.stride) != spec.crop:
        shown, target = ground_truth.any(axis=(1, 2)), np.zeros_like(target)
        if shown.any():
            target[shown] = probabilities(network, image[shown], window, spec, whole=False)[0]
    return target >= LABELLED_THRESHOLD


def shares(store: Store, cases: Sequence[str], world: int) -> list[list[str]]:
    """Cases for each process, so that their slices are about even."""
    result: list[list[str]] = [[] for _ in range(world)]
    load = [0] * world
    for name in sorted(cases, key=lambda name: (-store.cases[name].shape[0], name)):
        least = load.index(min(load))
        result[least].append(name)
        load[least] += store.cases[name].shape[0]
    return result


def summaries(cases: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, Any]]:
    """Each metric's mean, 95% interval and misses over cases (see `metrics.summarise`)."""
    return {key: summarise([metrics[key] for metrics in cases.values()]) for key in next(iter(cases.values()))}


def format_summaries(summary: Mapping[str, Mapping[str, Any]]) -> str:
    """The metrics that one looks at first, in a line."""
    dice, hd95 = summary["dice"], summary["hd95"]
    text = f"Dice {dice['mean']:.4f} [{dice['low']:.4f}, {dice['high']:.4f}] over {dice['cases']} cases"
    text += f", HD95 {hd95['mean']:.1f} mm"
    return text + (f" without {hd95['misses']} missed cases" if hd95["misses"] else "")
