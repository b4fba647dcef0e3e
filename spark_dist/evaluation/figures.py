"""Figures for people."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

COLOURS = {"target": "#35c2b0", "missed": "#f2b134", "predicted where there is none": "#e8553e"}
FORMATS = frozenset(Figure().canvas.get_supported_filetypes())
"""Endings of the files that figures can be written to."""
TARGET, MISSED, WRONG = COLOURS.values()


def prediction_figure(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A grid of image, truth and one column for each network, a row for each slice.

    A row: case, slice, image (H, W) in [−1, 1], truth (H, W) bool, predictions {name: ((H, W) bool, Dice)}.
    """
    names = list(rows[0]["predictions"])
    figure = Figure(figsize=(2.3 * (2 + len(names)), 2.45 * len(rows) + 0.5), layout="constrained", facecolor="white")
    axes = figure.subplots(len(rows), 2 + len(names), squeeze=False)
    for row, line in zip(rows, axes, strict=True):
        box = around(row["truth"] | np.any([p for p, _ in row["predictions"].values()], axis=0))
        image, truth = (row["image"][box] + 1) / 2, row["truth"][box]
        draw(line[0], image, [], f"{row['case']}, slice {row['slice']}")
        draw(line[1], image, [(truth, TARGET)], "truth")
        for axis, (name, (prediction, dice)) in zip(line[2:], row["predictions"].items(), strict=True):
            prediction = prediction[box]
            parts = [(prediction & truth, TARGET), (prediction & ~truth, WRONG), (truth & ~prediction, MISSED)]
            draw(axis, image, parts, f"{name}: Dice {dice:.3f}")
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
    """Write a figure as a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
