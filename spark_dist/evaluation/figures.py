"""Drawings for people: predictions beside the ground truth, and curves."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import nn

from data_tools.ownership import MADE_BY
from data_tools.store import TASKS, Store
from spark_dist.data.slices import VoxelReader
from spark_dist.data.views import SliceSpec

from .inference import probabilities
from .metrics import dice, overlap_counts

COLOURS = {"target": "#35c2b0", "missed": "#f2b134", "predicted where there is none": "#e8553e"}
FORMATS = frozenset(Figure().canvas.get_supported_filetypes())
"""Endings of the files that figures can be written to."""
SOFTWARE = {".png": "Software", ".svg": "Creator", ".pdf": "Creator", ".eps": "Creator", ".ps": "Creator"}
"""The field of a file's metadata that names the program which made it."""
TARGET, MISSED, WRONG = COLOURS.values()


class PredictedSlice(NamedTuple):
    """A slice with the predictions of networks: a row of the figure."""

    name: str
    image: np.ndarray
    """(H, W) in [0, 1]."""
    ground_truth: np.ndarray
    """(H, W) bool."""
    predictions: dict[str, tuple[np.ndarray, float]]
    """By network: (H, W) bool, and its Dice in this slice."""


def draw_predictions(
    store: Store, cases: Sequence[str], spec: SliceSpec, networks: Mapping[str, nn.Module], path: Path, rows: int = 4
) -> None:
    """Image, ground truth and each network's prediction in the fullest slice of up to `rows` of the cases."""
    reader = VoxelReader(store)
    shown = []
    for position in np.unique(np.linspace(0, len(cases) - 1, min(rows, len(cases))).astype(int)):
        case = store.cases[cases[position]]
        z = int(case.label_counts[:, TASKS[spec.task]].sum(axis=1).argmax())
        image, label = (reader.slice(case.name, kind, z)[np.newaxis] for kind in ("image", "label"))
        ground_truth = spec.target(label)
        predictions = {}
        for name, network in networks.items():
            predicted = probabilities(network, image, case.window, spec)[0] >= spec.threshold
            predictions[name] = (predicted[0], float(dice(overlap_counts(predicted, ground_truth).sum(axis=0))))
        low, high = case.window
        grey = np.clip((image[0].astype(np.float32) - low) / (high - low), 0, 1)
        shown.append(PredictedSlice(f"{case.name}, slice {z}", grey, ground_truth[0], predictions))
    prediction_figure(shown, path)


def prediction_figure(slices: Sequence[PredictedSlice], path: Path) -> None:
    """A grid of image, ground truth and one column for each network, a row for each slice."""
    columns = 2 + len(slices[0].predictions)
    figure = Figure(figsize=(2.3 * columns, 2.45 * len(slices) + 0.5), layout="constrained", facecolor="white")
    axes = figure.subplots(len(slices), columns, squeeze=False)
    for row, line in zip(slices, axes, strict=True):
        box = around(row.ground_truth | np.any([p for p, _ in row.predictions.values()], axis=0))
        image, ground_truth = row.image[box], row.ground_truth[box]
        draw(line[0], image, [], row.name)
        draw(line[1], image, [(ground_truth, TARGET)], "ground truth")
        for axis, (name, (prediction, score)) in zip(line[2:], row.predictions.items(), strict=True):
            prediction = prediction[box]
            right, wrong, missed = prediction & ground_truth, prediction & ~ground_truth, ground_truth & ~prediction
            draw(axis, image, [(right, TARGET), (wrong, WRONG), (missed, MISSED)], f"{name}: Dice {score:.3f}")
    patches = [Patch(color=colour, label=label) for label, colour in COLOURS.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), fontsize=8, frameon=False)
    save(figure, path)


def draw(axis, image: np.ndarray, parts: Sequence[tuple[np.ndarray, str]], title: str) -> None:
    """A grey image (H, W) in [0, 1] with coloured regions."""
    shown = np.repeat(image[..., None], 3, axis=2)
    for region, colour in parts:
        shown[region] = 0.45 * shown[region] + 0.55 * np.array(to_rgb(colour))
    axis.imshow(shown, vmin=0, vmax=1, interpolation="nearest")
    axis.set_title(title, fontsize=8, parse_math=False)
    axis.set_axis_off()


def around(region: np.ndarray, margin: float = 0.6) -> tuple[slice, slice]:
    """A square window around a region (H, W), larger by a margin, so that small targets can be seen."""
    if not region.any():
        return slice(None), slice(None)
    rows, columns = (np.flatnonzero(region.any(axis=axis)) for axis in (1, 0))
    side = int(max(np.ptp(rows), np.ptp(columns), min(region.shape) // 4) * (1 + margin)) + 1
    box = []
    for found, length in zip((rows, columns), region.shape, strict=True):
        start = max(0, min((found[0] + found[-1] - side) // 2, length - side))
        box.append(slice(start, start + side))
    return tuple(box)


def curves_figure(histories: Mapping[str, Sequence[tuple[float, float]]], label: str, path: Path) -> None:
    """Curves of (epoch, value) by name, as a PNG."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axis = figure.subplots()
    for name, points in histories.items():
        axis.plot(*zip(*points, strict=True), label=name)
    axis.set_xlabel("epoch")
    axis.set_ylabel(label)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Write a figure in the format of its file's ending, with this program's name in it where the format has a field
    for that."""
    path.parent.mkdir(parents=True, exist_ok=True)
    key = SOFTWARE.get(path.suffix.lower())
    figure.savefig(path, dpi=130, **({"metadata": {key: MADE_BY}} if key else {}))
