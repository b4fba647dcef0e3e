"""A store in numbers: cases and slices of each part, sizes, spacings, intensities of each label."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from rich import box
from rich.table import Table

from .arrays import LABELS
from .files import write_atomically
from .location import finished, open_array
from .ownership import MADE_BY, check_output
from .progress import console, progress
from .split import PARTS
from .store import TASKS, Case, Store

COLOURS = {"background": "#9aa3ad", "organ": "#159f8e", "tumour": "#e2502f"}
SLICES_PER_CASE = 32
"""How many slices of a case, evenly apart, the intensities are counted in."""
BINS, REACH = 5500, 5
"""Bins of the histograms, over the window and `REACH` times its width on either side."""


@dataclass(frozen=True)
class Intensities:
    """Counts of voxels by label and intensity."""

    edges: np.ndarray
    """(BINS + 1,) in the store's intensities, or in windows (0 and 1 are its ends) where each case has its own.
    What lies beyond is counted in the outermost bins."""
    counts: np.ndarray
    """(3, BINS) background, organ, tumour."""
    sums: np.ndarray
    """(3, 2) sums of the intensities and of their squares."""

    def row(self, label: int) -> tuple[float, ...]:
        """Mean, standard deviation, and the percentiles 0.5, 50, 99.5 of one label; NaN without voxels."""
        number = self.counts[label].sum()
        if not number:
            return (np.nan,) * 5
        mean, square = self.sums[label] / number
        places = np.searchsorted(self.counts[label].cumsum(), number * np.array([0.005, 0.5, 0.995]))
        return mean, float(np.sqrt(max(square - mean**2, 0))), *self.edges[places]


def stats(store: Store, figure: Path) -> None:
    """Print the tables of a store and draw its figure.

    Raises `UserError` for damaged voxels, and for a file in the figure's place that was not made here.
    """
    check_output(figure)
    intensities = count_intensities(store)
    console.print(parts_table(store))
    console.print(cases_range_table(store))
    console.print(intensities_table(store, intensities))
    stats_figure(store, intensities, figure)
    console.print(f"figure: {figure}")


def count_intensities(store: Store) -> Intensities:
    """Histograms of up to `SLICES_PER_CASE` slices of each case with labels."""
    own = store.attributes["window"]["kind"] != "fixed"
    low, high = (0.0, 1.0) if own else next(iter(store.cases.values())).window
    width = high - low
    edges = np.linspace(low - REACH * width, high + REACH * width, BINS + 1)
    counts, sums = np.zeros((len(LABELS), BINS), np.int64), np.zeros((len(LABELS), 2))
    with progress(len(store.cases), "stats") as bar:
        for case in bar.track(store.cases.values(), task_id=bar.task_ids[0]):
            if not case.labelled:
                continue
            folder, what = store.path / "cases" / case.name, f"{store.path}: case {case.name}"
            images, labels = open_array(folder / "image"), open_array(folder / "label")
            for z in np.unique(np.linspace(0, case.shape[0] - 1, SLICES_PER_CASE).round().astype(int)):
                image, label = (finished(array[z].read(), f"{what} slice {z}") for array in (images, labels))
                voxels = image.astype(np.float64).ravel()
                if own:
                    voxels = (voxels - case.window[0]) / (case.window[1] - case.window[0])
                # A whole number lies on a bin's lower edge: the small shift keeps it there.
                bins = ((voxels - edges[0]) * (BINS / (edges[-1] - edges[0])) + 1e-6).clip(0, BINS - 1).astype(int)
                flat = label.ravel().astype(int)
                counts += np.bincount(bins + flat * BINS, minlength=counts.size).reshape(counts.shape)
                for power in (1, 2):
                    sums[:, power - 1] += np.bincount(flat, voxels**power, minlength=len(LABELS))
    return Intensities(edges, counts, sums)


def groups_of(store: Store) -> dict[str, list[Case]]:
    """All cases, and those of each part of each split."""
    groups = {"all": list(store.cases.values())}
    for name, record in store.splits.items():
        for part in PARTS:
            groups[f"{name}: {part}"] = [store.cases[case] for case in record[part] if case in store.cases]
    return groups


def slices_with(cases: Sequence[Case], task: str) -> int:
    """Number of slices with the task's target."""
    return sum(len(case.task_slices(task)) for case in cases)


def parts_table(store: Store) -> Table:
    """Cases and slices of the store and of each part of its splits."""
    table = table_of("cases and slices", "part", "cases", "with tumour", "slices", "with organ", "slices with tumour")
    for name, cases in groups_of(store).items():
        tumours = sum(bool(len(case.task_slices("tumour"))) for case in cases)
        slices = [sum(case.shape[0] for case in cases), *(slices_with(cases, task) for task in ("organ", "tumour"))]
        table.add_row(name, str(len(cases)), str(tumours), *map(str, slices))
    return table


def measures(case: Case) -> dict[str, float]:
    """The measures that vary from case to case. Volumes are NaN where there is none."""
    return {
        "slices": case.shape[0],
        "rows": case.shape[1],
        "columns": case.shape[2],
        "slice spacing mm": case.spacing[0],
        "pixel spacing mm": case.spacing[1],
        **{f"{task} ml": case.volume_ml(task) or np.nan for task in TASKS},
    }


def cases_range_table(store: Store) -> Table:
    """The range of each measure over the cases."""
    table = table_of("over the cases", "", "cases", "least", "median", "greatest", "found in")
    found = {name: measures(case) for name, case in store.cases.items()}
    for key in next(iter(found.values())):
        values = {name: measured[key] for name, measured in found.items() if not np.isnan(measured[key])}
        if not values:
            table.add_row(key, "0", *["–"] * 4)
            continue
        least, most = min(values, key=values.get), max(values, key=values.get)
        numbers = (values[least], float(np.median(list(values.values()))), values[most])
        where = "" if values[least] == values[most] else f"{least}, {most}"
        table.add_row(key, str(len(values)), *(f"{number:.4g}" for number in numbers), where)
    return table


def intensities_table(store: Store, intensities: Intensities) -> Table:
    """Voxels and intensities of each label."""
    unit = "windows of each case" if store.attributes["window"]["kind"] != "fixed" else "the store's unit"
    table = table_of(f"intensities in {unit}", "label", "voxels", "mean", "SD", "0.5%", "50%", "99.5%")
    table.caption = f"voxels of all slices; intensities of up to {SLICES_PER_CASE} slices of each case"
    voxels = sum(case.label_counts.sum(axis=0) for case in store.cases.values())
    for label, name in enumerate(LABELS):
        numbers = ("–" if np.isnan(number) else f"{number:.4g}" for number in intensities.row(label))
        table.add_row(name, f"{voxels[label] / voxels.sum():.3%}", *numbers)
    return table


def table_of(title: str, *columns: str) -> Table:
    """An empty table with numbers on the right."""
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", caption_justify="left")
    for k, column in enumerate(columns):
        table.add_column(column, justify="right" if k else "left", no_wrap=True)
    return table


def stats_figure(store: Store, intensities: Intensities, path: Path) -> None:
    """Intensities, sizes, spacings, volumes and splits as a PNG."""
    figure = Figure(figsize=(13, 7.2), layout="constrained")
    title = f"{store.path.name}: {len(store.cases)} cases, {store.attributes.get('layout', '')}".rstrip(", ")
    figure.suptitle(title, parse_math=False)
    axes = figure.subplots(2, 3).ravel()
    found = [measures(case) for case in store.cases.values()]
    column = {key: np.array([measured[key] for measured in found], float) for key in found[0]}
    draw_intensities(axes[0], store, intensities)
    width = 1 + int(np.ptp(column["slices"])) // 30
    edges = np.arange(column["slices"].min(), column["slices"].max() + 2 * width, width) - 0.5
    axes[1].hist(column["slices"], edges, color="#4c78a8")
    axes[1].set(title="slices of a case", xlabel="slices", ylabel="cases")
    axes[2].scatter(column["pixel spacing mm"], column["slice spacing mm"], s=18, alpha=0.6, color="#4c78a8")
    axes[2].set(title="spacing", xlabel="pixel spacing in mm", ylabel="slice spacing in mm")
    draw_volumes(axes[3], column)
    draw_areas(axes[4], store)
    draw_parts(axes[5], store)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    save = partial(figure.savefig, dpi=110, format="png", metadata={"Software": MADE_BY})
    write_atomically(path, save)


def draw_intensities(axis, store: Store, intensities: Intensities) -> None:
    """Densities of each label's intensities around the window."""
    own = store.attributes["window"]["kind"] != "fixed"
    low, high = (0.0, 1.0) if own else next(iter(store.cases.values())).window
    together = 10
    edges = intensities.edges[::together]
    middle = (edges[1:] + edges[:-1]) / 2
    shown = (middle > low - 0.75 * (high - low)) & (middle < high + 0.75 * (high - low))
    for label, name in enumerate(LABELS):
        counts = intensities.counts[label].reshape(-1, together).sum(axis=1)
        if counts.any():
            density = counts / counts.sum() / np.diff(edges)
            axis.fill_between(middle[shown], density[shown], step="mid", alpha=0.25, color=COLOURS[name])
            axis.step(middle[shown], density[shown], where="mid", color=COLOURS[name], linewidth=1.2, label=name)
    for end in (low, high):
        axis.axvline(end, color="black", linestyle=":", linewidth=1)
    axis.set(title="intensities of each label (dots: window)", ylabel="density", ylim=(0, None))
    axis.set_xlabel("window of each case: 0 … 1" if own else "stored intensity (CT: HU)")
    axis.legend(frameon=False, fontsize=8)


def draw_volumes(axis, column: Mapping[str, np.ndarray]) -> None:
    """The volumes of organ and tumour."""
    volumes = {name: values[~np.isnan(values)] for name in ("organ", "tumour") for values in [column[f"{name} ml"]]}
    both = np.concatenate(list(volumes.values()))
    axis.set(title="volumes", xlabel="ml", ylabel="cases")
    if not len(both):
        return
    bins = np.geomspace(both.min() * 0.9, both.max() * 1.1, 30)
    for name, values in volumes.items():
        if len(values):
            axis.hist(values, bins=bins, color=COLOURS[name], alpha=0.65, label=f"{name}, {len(values)} cases")
    plain_log(axis)
    axis.legend(frameon=False, fontsize=8)


def plain_log(axis) -> None:
    """A logarithmic axis with plain numbers."""
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter(NullFormatter())


def draw_areas(axis, store: Store) -> None:
    """The share of a slice's pixels that each target has, over the slices that show it."""
    axis.set(title="share of a slice, where there is any", xlabel="% of the pixels", ylabel="slices")
    shares = {
        task: np.concatenate([c.label_counts[:, v].sum(axis=1) / np.prod(c.shape[1:]) for c in store.cases.values()])
        for task, v in TASKS.items()
    }
    shares = {name: 100 * values[values > 0] for name, values in shares.items()}
    both = np.concatenate(list(shares.values()))
    if not len(both):
        return
    bins = np.geomspace(both.min(), both.max() * 1.01, 40)
    for name, values in shares.items():
        if len(values):
            axis.hist(values, bins=bins, color=COLOURS[name], alpha=0.65, label=f"{name}, {len(values)} slices")
    plain_log(axis)
    axis.legend(frameon=False, fontsize=8)


def draw_parts(axis, store: Store) -> None:
    """Cases of each part of each split, with and without tumour."""
    groups = groups_of(store)
    names = list(groups)[::-1]
    tumours = np.array([sum(bool(len(c.task_slices("tumour"))) for c in groups[name]) for name in names])
    totals = np.array([len(groups[name]) for name in names])
    axis.barh(names, tumours, color=COLOURS["tumour"], alpha=0.8, label="with tumour")
    axis.barh(names, totals - tumours, left=tumours, color=COLOURS["background"], alpha=0.8, label="without")
    for k, name in enumerate(names):
        slices = sum(case.shape[0] for case in groups[name])
        axis.text(totals[k], k, f" {totals[k]} cases, {slices:,} slices", va="center", fontsize=8)
    axis.set_title("cases of the splits", loc="left")
    axis.set(xlabel="cases", xlim=(0, 1.6 * totals.max()))
    axis.tick_params(axis="y", labelsize=8)
    axis.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0.3)
