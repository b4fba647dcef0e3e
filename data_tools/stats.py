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

from .files import write_atomically
from .location import finished, open_array
from .ownership import MADE_BY, check_output
from .progress import console, progress
from .split import PARTS
from .store import Case, Store
from .suggest import suggested_recipe

BACKGROUND = "#9aa3ad"
COLOURS = ("#159f8e", "#b8371b", "#3456d1", "#e3b23c", "#b58be0", "#3a1f5c", "#c7488f", "#7a5a3c")
"""Of the regions in turn."""
PARTS_DRAWN = 15
"""Bars of the figure of splits that there is room for, three for each."""
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
    """(1 + L, BINS) of the background and of each of L labels."""
    sums: np.ndarray
    """(1 + L, 2) sums of the intensities and of their squares."""

    def row(self, label: int) -> tuple[float, ...]:
        """Mean, standard deviation, and the percentiles 0.5, 50, 99.5 of one label; NaN without voxels."""
        number = self.counts[label].sum()
        if not number:
            return (np.nan,) * 5
        mean, square = self.sums[label] / number
        return mean, float(np.sqrt(max(square - mean**2, 0))), *self.percentiles([label], 0.005, 0.5, 0.995)

    def percentiles(self, labels: Sequence[int], *shares: float) -> list[float]:
        """The intensities below which these shares of some labels' voxels lie; NaN without voxels."""
        counts = self.counts[labels].sum(axis=0)
        if not counts.any():
            return [np.nan] * len(shares)
        return self.edges[np.searchsorted(counts.cumsum(), counts.sum() * np.array(shares))].tolist()


def stats(store: Store, figure: Path, memory: float = 8) -> None:
    """Print the tables of a store and lines for a recipe, with a batch for `memory` (GiB), and draw its figure.

    Raises `UserError` for damaged voxels, and for a file in the figure's place that was not made here.
    """
    check_output(figure)
    intensities = count_intensities(store)
    console.print(parts_table(store))
    console.print(cases_range_table(store))
    console.print(intensities_table(store, intensities))
    stats_figure(store, intensities, figure)
    console.print(f"figure: {figure}")
    if any(case.labelled for case in store.cases.values()):
        labelled = intensities.percentiles(range(1, len(intensities.counts)), 0.005, 0.995)
        console.print("\nsuggested for a recipe:", style="bold")
        console.print(suggested_recipe(store, labelled, memory), soft_wrap=True, markup=False, highlight=False)


def count_intensities(store: Store) -> Intensities:
    """Histograms of up to `SLICES_PER_CASE` slices of each case with labels."""
    own = store.attributes["window"]["kind"] != "fixed"
    low, high = (0.0, 1.0) if own else next(iter(store.cases.values())).window
    width = high - low
    edges = np.linspace(low - REACH * width, high + REACH * width, BINS + 1)
    values = 1 + len(store.labels)
    counts, sums = np.zeros((values, BINS), np.int64), np.zeros((values, 2))
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
                    sums[:, power - 1] += np.bincount(flat, voxels**power, minlength=values)
    return Intensities(edges, counts, sums)


def groups_of(store: Store) -> dict[str, list[Case]]:
    """All cases, and those of each part of each split."""
    groups = {"all": list(store.cases.values())}
    for name, record in store.splits.items():
        for part in PARTS:
            groups[f"{name}: {part}"] = [store.cases[case] for case in record[part] if case in store.cases]
    return groups


def found_in(cases: Sequence[Case], region: str) -> tuple[int, int]:
    """Numbers of cases and of slices that have a region."""
    slices = [len(case.slices_with(region)) for case in cases]
    return sum(map(bool, slices)), sum(slices)


def parts_table(store: Store) -> Table:
    """Cases and slices of the store and of each part of its splits, and how many of them have each region."""
    table = table_of("cases and slices", "part", "region", "cases", "slices")
    for name, cases in groups_of(store).items():
        table.add_row(name, "", str(len(cases)), str(sum(case.shape[0] for case in cases)))
        for region in store.regions:
            table.add_row("", region, *map(str, found_in(cases, region)))
    return table


def measures(case: Case) -> dict[str, float]:
    """The measures that vary from case to case. Volumes are NaN where there is none."""
    return {
        "slices": case.shape[0],
        "rows": case.shape[1],
        "columns": case.shape[2],
        "slice spacing mm": case.spacing[0],
        "pixel spacing mm": case.spacing[1],
        **{f"{region} ml": case.volume_ml(region) or np.nan for region in case.regions},
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
    for label, name in enumerate(["background", *store.labels]):
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
    draw_volumes(axes[3], store, column)
    draw_areas(axes[4], store)
    draw_parts(axes[5], store)
    for counts in (axes[1].xaxis, *(axis.yaxis for axis in axes[[1, 3, 4]])):
        counts.get_major_locator().set_params(integer=True)
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
    for label, name in enumerate(["background", *store.labels]):
        counts = intensities.counts[label].reshape(-1, together).sum(axis=1)
        if counts.any():
            density = counts / counts.sum() / np.diff(edges)
            colour = colour_of(store, name)
            axis.fill_between(middle[shown], density[shown], step="mid", alpha=0.25, color=colour)
            axis.step(middle[shown], density[shown], where="mid", color=colour, linewidth=1.2, label=name)
    for end in (low, high):
        axis.axvline(end, color="black", linestyle=":", linewidth=1)
    axis.set(title="intensities of each label (dots: window)", ylabel="density", ylim=(0, None))
    axis.set_xlabel("window of each case: 0 … 1" if own else "stored intensity (CT: HU)")
    if intensities.counts.any():
        axis.legend(frameon=False, fontsize=8)


def colour_of(store: Store, name: str) -> str:
    """The colour of a region, or of the background."""
    return COLOURS[list(store.regions).index(name) % len(COLOURS)] if name in store.regions else BACKGROUND


def draw_volumes(axis, store: Store, column: Mapping[str, np.ndarray]) -> None:
    """The volumes of the regions."""
    volumes = {name: values[~np.isnan(values)] for name in store.regions for values in [column[f"{name} ml"]]}
    axis.set(title="volumes", xlabel="ml", ylabel="cases")
    draw_histograms(axis, store, volumes, "cases", 0.9)


def draw_histograms(axis, store: Store, values: Mapping[str, np.ndarray], what: str, margin: float = 1.0) -> None:
    """Histograms of positive values of each region over one logarithmic axis; nothing if there are none."""
    together = np.concatenate([np.zeros(0), *values.values()])
    if not len(together):
        return
    bins = np.geomspace(together.min() * margin, together.max() * (1.01 + 1 - margin), 40)
    for name, found in values.items():
        if len(found):
            axis.hist(found, bins=bins, color=colour_of(store, name), alpha=0.65, label=f"{name}, {len(found)} {what}")
    plain_log(axis)
    axis.legend(frameon=False, fontsize=8)


def plain_log(axis) -> None:
    """A logarithmic axis with plain numbers."""
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter(NullFormatter())


def draw_areas(axis, store: Store) -> None:
    """The share of a slice's pixels that each region has, over the slices that show it."""
    axis.set(title="share of a slice, where there is any", xlabel="% of the pixels", ylabel="slices")
    shares = {
        region: np.concatenate([c.voxels(region)[:, 0] / np.prod(c.shape[1:]) for c in store.cases.values()])
        for region in store.regions
    }
    shares = {name: 100 * values[values > 0] for name, values in shares.items()}
    draw_histograms(axis, store, shares, "slices")


def draw_parts(axis, store: Store) -> None:
    """Cases of each part of the first splits, with and without the region that the fewest have."""
    groups = groups_of(store)
    names = list(groups)[PARTS_DRAWN::-1]
    totals, found = np.array([len(groups[name]) for name in names]), np.zeros(len(names), int)
    if store.regions:
        rarest = min(store.regions, key=lambda region: found_in(groups["all"], region))
        found = np.array([found_in(groups[name], rarest)[0] for name in names])
        axis.barh(names, found, color=colour_of(store, rarest), alpha=0.8, label=f"with {rarest}")
    axis.barh(names, totals - found, left=found, color=BACKGROUND, alpha=0.8, label="without")
    for k, name in enumerate(names):
        slices = sum(case.shape[0] for case in groups[name])
        axis.text(totals[k], k, f" {totals[k]} cases, {slices:,} slices", va="center", fontsize=8)
    shown = PARTS_DRAWN // len(PARTS)
    some = f", the first {shown} of {len(store.splits)}" if len(store.splits) > shown else ""
    axis.set(title=f"cases of the splits{some}", xlabel="cases", xlim=(0, 1.9 * totals.max()))
    axis.tick_params(axis="y", labelsize=8)
    axis.legend(frameon=False, fontsize=8, loc="lower right")
