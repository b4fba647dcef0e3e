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
from .panel import LINE, REGIONS, ShownSlice, around, shown_slices

TARGET, MISSED, WRONG = REGIONS[0], LINE, "#e8553e"
ERRORS = {"missed": MISSED, "predicted where there is none": WRONG}
SHADES = "viridis"
"""Colours of maps, whose lightness grows with the value, so that colour-blind people and greyscale show it too."""
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


def predicted_slice(shown: ShownSlice, networks: Mapping[str, nn.Module], spec: SliceSpec) -> PredictedSlice:
    """A slice with each network's prediction."""
    predictions = {name: shown.predicted(network, spec) for name, network in networks.items()}
    return PredictedSlice(shown.name, shown.grey, shown.ground_truth, predictions)


def draw_predictions(
    store: Store, cases: Sequence[str], spec: SliceSpec, networks: Mapping[str, nn.Module], path: Path, rows: int = 4
) -> None:
    """Image, ground truth and each network's prediction in the fullest slice of up to `rows` of the cases."""
    shown = [predicted_slice(item, networks, spec) for item in shown_slices(store, cases, spec, rows)]
    prediction_figure(shown, path, spec.regions)


def prediction_figure(slices: Sequence[PredictedSlice], path: Path, regions: Sequence[str] = ("target",)) -> None:
    """A grid of image, ground truth and one column for each network, a row for each slice; `regions` are the names of
    the classes but the background."""
    colours = colours_of(regions)
    columns = 2 + len(slices[0].predictions)
    figure = Figure(figsize=(2.3 * columns, 2.45 * len(slices) + 0.5), layout="constrained", facecolor="white")
    axes = figure.subplots(len(slices), columns, squeeze=False)
    for row, line in zip(slices, axes, strict=True):
        box = box_of(row)
        image, ground_truth = row.image[box], row.ground_truth[box]
        draw(line[0], image, [], row.name)
        draw(line[1], image, parts_of(ground_truth, colours), "ground truth")
        for axis, (name, (prediction, score)) in zip(line[2:], row.predictions.items(), strict=True):
            title = f"{name}: Dice {score:.3f}"
            draw_prediction(axis, image, prediction[box], ground_truth, colours, title)
    legend(figure, colours | errors_of(regions))
    save(figure, path)


def colours_of(regions: Sequence[str]) -> dict[str, str]:
    """Each class's colour by its name in legends."""
    return dict(zip(regions if len(regions) > 1 else ["target"], cycle(REGIONS), strict=False))


def errors_of(regions: Sequence[str]) -> dict[str, str]:
    """The colours of what is predicted wrongly, by their names in legends."""
    several = len(regions) > 1
    return {"predicted, and is none or another" if several and c == WRONG else e: c for e, c in ERRORS.items()}


def legend(figure: Figure, colours: Mapping[str, str]) -> None:
    """Names of colours below a figure."""
    patches = [Patch(color=colour, label=label) for label, colour in colours.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), fontsize=8, frameon=False)


def draw_prediction(
    axis, image: np.ndarray, prediction: np.ndarray, ground_truth: np.ndarray, colours: Mapping[str, str], title: str
) -> None:
    """An image with the predicted classes where they are right, and what is wrong or missed."""
    right = parts_of(np.where(prediction == ground_truth, prediction, 0), colours)
    wrong, missed = (prediction > 0) & (prediction != ground_truth), (ground_truth > 0) & (prediction == 0)
    draw(axis, image, [*right, (wrong, WRONG), (missed, MISSED)], title)


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


def box_of(shown: PredictedSlice, margin: float = 0.6) -> tuple[slice, slice]:
    """The window around the target of a slice and all predictions of it."""
    return around((shown.ground_truth > 0) | np.any([p > 0 for p, _ in shown.predictions.values()], axis=0), margin)


def explanation_figure(
    slices: Sequence[PredictedSlice],
    maps: Sequence[Mapping[str, Mapping[str, np.ndarray]]],
    path: Path,
    regions: Sequence[str] = ("target",),
) -> None:
    """Slices one below the other, in each a row for each network: its prediction, and its maps (H, W) by their names,
    with the ground truth's outline. A map's colours go from 0 to its own largest value."""
    titles = list(next(iter(maps[0].values())))
    columns, lines, colours = 2 + len(titles), max(2, len(maps[0])), colours_of(regions)
    boxes = [box_of(shown, 1.5) for shown in slices]
    tallest = max(np.divide(*shown.image[box].shape) for shown, box in zip(slices, boxes, strict=True))
    height = (1.45 * tallest + 0.25) * lines * len(slices) + 0.4
    figure = Figure(figsize=(1.5 * columns + 0.5, height), layout="compressed", facecolor="white")
    axes = figure.subplots(lines * len(slices), columns, squeeze=False)
    for axis in axes.ravel():
        axis.set_axis_off()
    for block, shown, found, box in zip(np.split(axes, len(slices)), slices, maps, boxes, strict=True):
        image, ground_truth = shown.image[box], shown.ground_truth[box]
        draw(block[0, 0], image, [], shown.name.replace(", ", "\n"))
        draw(block[1, 0], image, parts_of(ground_truth, colours), "ground truth")
        for line, (name, (prediction, score)) in zip(block, shown.predictions.items(), strict=False):
            title = f"{name}\nDice {score:.3f}"
            draw_prediction(line[1], image, prediction[box], ground_truth, colours, title)
            for axis, title in zip(line[2:], titles, strict=True):
                values, largest = found[name][title][box], np.nanmax(found[name][title])
                shades = axis.imshow(values / (largest or 1), cmap=SHADES, vmin=0, vmax=1)
                if (ground_truth > 0).any():
                    axis.contour(ground_truth > 0, levels=[0.5], colors=["white"], linewidths=1)
                axis.set_title(title if largest else f"{title}:\n0 everywhere", fontsize=8)
    bar = figure.colorbar(shades, ax=axes, location="right", shrink=min(1, 2.5 / len(axes)), aspect=25, pad=0.01)
    bar.set_label("share of the map's largest value", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    legend(figure, colours | errors_of(regions))
    save(figure, path)


PALETTE = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "sovD^Pp"
"""Okabe and Ito's colours, which colour-blind people tell apart, and a form for each besides."""
MILLIMETRES = ("hd", "assd")


def comparison_figure(parts: Mapping[str, Sequence[Row]], metric: str, path: Path) -> None:
    """A metric against the number of parameters, with its 95% intervals as bars; a panel for each part, by its title.

    Where a kind of network was trained with several seeds, only the row over all of them is shown. A foreign teacher,
    whose parameters nobody knows, is a line.
    """
    figure = Figure(figsize=(8, 4.2 * len(parts)), layout="constrained", facecolor="white")
    handles: dict[str, Any] = {}
    titles = list(dict.fromkeys(row.title for rows in parts.values() for row in rows))
    for axis, (heading, rows) in zip(figure.subplots(len(parts), squeeze=False)[:, 0], parts.items(), strict=True):
        shown = [row for row in over_all_seeds(rows) if math.isfinite(row.mean)]
        networks: dict[tuple[int, str], list[Row]] = defaultdict(list)
        for row in (row for row in shown if not row.parameters):
            axis.axhline(row.mean, color=look(titles.index(row.title))[0], ls="--", label=f"{row.title}, {row.network}")
        for row in (row for row in shown if row.parameters):
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
