"""Drawings for people: predictions beside the ground truth, and compared runs."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter
from torch import nn

from data_tools.errors import UserError
from data_tools.ownership import MADE_BY
from data_tools.store import Store
from spark_dist.data.views import SliceSpec

from .comparison import Row
from .panel import LINE, REGIONS, around, shown_slices

TARGET, MISSED, WRONG = REGIONS[0], LINE, "#e8553e"
ERRORS = {"missed": MISSED, "predicted where there is none": WRONG}
FORMATS = frozenset(Figure().canvas.get_supported_filetypes())
"""Endings of the files that figures can be written to."""
SOFTWARE = {".png": "Software", ".svg": "Creator", ".pdf": "Creator", ".eps": "Creator", ".ps": "Creator"}
"""The field of a file's metadata that names the program which made it."""


def check_format(path: Path, option: str, instead: str = "") -> None:
    """Raises `UserError` if figures can't be written in the format that a path ends in; `instead` says what the option
    may have been taken for."""
    if (ending := path.suffix.removeprefix(".").lower()) not in FORMATS:
        known = ", ".join(sorted(FORMATS))
        raise UserError(f"{option} {path}: '{ending}' is no format of pictures; use {known}{instead}")


class PredictedSlice(NamedTuple):
    """A slice with the predictions of networks: a row of the figure."""

    name: str
    image: np.ndarray
    """(H, W) in [0, 1]."""
    ground_truth: np.ndarray
    """(H, W) classes."""
    predictions: dict[str, tuple[np.ndarray, float]]
    """By network: (H, W) classes, and its Dice in this slice, the mean over the classes but the background."""


def draw_predictions(
    store: Store, cases: Sequence[str], spec: SliceSpec, networks: Mapping[str, nn.Module], path: Path, rows: int = 4
) -> None:
    """Image, ground truth and each network's prediction in the fullest slice of up to `rows` of the cases."""
    shown = [
        PredictedSlice(
            item.name, item.grey, item.ground_truth, {name: item.predicted(n, spec) for name, n in networks.items()}
        )
        for item in shown_slices(store, cases, spec, rows)
    ]
    prediction_figure(shown, path, spec.regions)


def prediction_figure(slices: Sequence[PredictedSlice], path: Path, regions: Sequence[str] = ("target",)) -> None:
    """A grid of image, ground truth and one column for each network, a row for each slice; `regions` are the names of
    the classes but the background."""
    several = len(regions) > 1
    colours = dict(zip(regions if several else ["target"], cycle(REGIONS), strict=False))
    errors = {"predicted, and is none or another" if several and c == WRONG else e: c for e, c in ERRORS.items()}
    columns = 2 + len(slices[0].predictions)
    figure = Figure(figsize=(2.3 * columns, 2.45 * len(slices) + 0.5), layout="constrained", facecolor="white")
    axes = figure.subplots(len(slices), columns, squeeze=False)
    for row, line in zip(slices, axes, strict=True):
        box = around((row.ground_truth > 0) | np.any([p > 0 for p, _ in row.predictions.values()], axis=0))
        image, ground_truth = row.image[box], row.ground_truth[box]
        draw(line[0], image, [], row.name)
        draw(line[1], image, parts_of(ground_truth, colours), "ground truth")
        for axis, (name, (prediction, score)) in zip(line[2:], row.predictions.items(), strict=True):
            prediction = prediction[box]
            right = parts_of(np.where(prediction == ground_truth, prediction, 0), colours)
            wrong, missed = (prediction > 0) & (prediction != ground_truth), (ground_truth > 0) & (prediction == 0)
            draw(axis, image, [*right, (wrong, WRONG), (missed, MISSED)], f"{name}: Dice {score:.3f}")
    patches = [Patch(color=colour, label=label) for label, colour in (colours | errors).items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), fontsize=8, frameon=False)
    save(figure, path)


def parts_of(classes: np.ndarray, colours: Mapping[str, str]) -> list[tuple[np.ndarray, str]]:
    """Where each class but the background is, with its colour."""
    return [(classes == number, colour) for number, colour in enumerate(colours.values(), start=1)]


def draw(axis, image: np.ndarray, parts: Sequence[tuple[np.ndarray, str]], title: str) -> None:
    """A grey image (H, W) in [0, 1] with coloured regions."""
    shown = np.repeat(image[..., None], 3, axis=2)
    for region, colour in parts:
        shown[region] = 0.45 * shown[region] + 0.55 * np.array(to_rgb(colour))
    axis.imshow(shown, vmin=0, vmax=1, interpolation="nearest")
    axis.set_title(title, fontsize=8, parse_math=False)
    axis.set_axis_off()


PALETTE = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "sovD^Pp"
"""Okabe and Ito's colours, which colour-blind people tell apart, and a form for each besides."""
MILLIMETRES = ("hd", "assd")


def comparison_figure(parts: Mapping[str, Sequence[Row]], metric: str, path: Path) -> None:
    """A metric against the number of parameters, with its 95% intervals as bars; a panel for each part, by its title.

    Where a kind of network was trained with several seeds, only the row over all of them is shown.
    """
    figure = Figure(figsize=(8, 4.2 * len(parts)), layout="constrained", facecolor="white")
    handles: dict[str, Any] = {}
    titles = list(dict.fromkeys(row.title for rows in parts.values() for row in rows))
    for axis, (heading, rows) in zip(figure.subplots(len(parts), squeeze=False)[:, 0], parts.items(), strict=True):
        shown = [row for row in over_all_seeds(rows) if math.isfinite(row.mean)]
        networks: dict[tuple[int, str], list[Row]] = defaultdict(list)
        for row in shown:
            networks[row.parameters, row.named_network].append(row)
        for (parameters, network), members in networks.items():
            for place, row in enumerate(members):
                colour, marker = look(titles.index(row.title))
                axis.errorbar(
                    # Students of one network stand beside each other.
                    parameters * 1.04 ** (place - (len(members) - 1) / 2),
                    row.mean,
                    [[row.mean - row.low], [row.high - row.mean]],
                    color=colour,
                    marker=marker,
                    linestyle="none",
                    capsize=3,
                    label=row.title,
                )
            above = {"xytext": (0, 5), "textcoords": "offset points", "ha": "center", "fontsize": 8}
            axis.annotate(network, (parameters, max(row.high for row in members)), **above, parse_math=False)
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_xlabel("parameters")
        axis.set_ylabel(f"test {metric}" + (" (mm)" if metric.startswith(MILLIMETRES) else ""))
        axis.set_title(heading, fontsize=9, parse_math=False)
        axis.margins(x=0.15, y=0.15)
        axis.grid(alpha=0.3)
        handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    legend = figure.legend(handles.values(), handles.keys(), loc="outside right upper", frameon=False, fontsize=8)
    for text in legend.get_texts():
        text.set_parse_math(False)
    save(figure, path)


def look(number: int) -> tuple[str, str]:
    """Colour and form of the kind of this number; 49 pairs differ."""
    return PALETTE[number % len(PALETTE)], MARKERS[(number + number // len(PALETTE)) % len(MARKERS)]


def over_all_seeds(rows: Sequence[Row]) -> list[Row]:
    """The row over all seeds of each kind, and the only one of a kind with one seed."""
    kinds: dict[tuple, Row] = {}
    for row in rows:  # that over all seeds comes last
        kinds[row.title, row.network, row.width] = row
    return list(kinds.values())


def save(figure: Figure, path: Path) -> None:
    """Write a figure in the format of its file's ending, with this program's name in it where the format has a field
    for that."""
    path.parent.mkdir(parents=True, exist_ok=True)
    key = SOFTWARE.get(path.suffix.lower())
    figure.savefig(path, dpi=130, **({"metadata": {key: MADE_BY}} if key else {}))
