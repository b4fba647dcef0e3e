"""A contact sheet for each case of a store, and one page over all."""

import html
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from .arrays import SHARD_SLICES
from .files import write_atomically, write_text
from .labels import fullest
from .location import finished, open_array
from .ownership import MADE_BY, check_output
from .progress import progress
from .split import PARTS
from .store import Case, Store

COLOURS = ("#35c2b0", "#ff6a4d", "#3f63ff", "#ffe680", "#d9b8ff", "#a85a1f", "#9be15d", "#ff8ecb")
"""Of the regions in turn; colour-blind people tell the first six apart."""
SHEET = "sheets/{}.png"


def preview(store: Store, folder: Path, cases: Sequence[str], slices: int) -> Path:
    """Write FOLDER/sheets/CASE.png for each of the `cases`, with about `slices` slices, and FOLDER/index.html.

    The page holds every case of the store that has a sheet. Returns its path. Raises `UserError` for damaged voxels,
    and before anything is written, for files of these names that were not made here.
    """
    page = folder / "index.html"
    for file in (page, *(folder / SHEET.format(name) for name in cases)):
        check_output(file)
    (folder / "sheets").mkdir(parents=True, exist_ok=True)
    with progress(len(cases), "preview") as bar:
        for name in bar.track(cases, task_id=bar.task_ids[0]):
            draw_sheet(store, store.cases[name], folder / SHEET.format(name), slices)
    drawn = [case for case in store.cases.values() if (folder / SHEET.format(case.name)).exists()]
    write_text(page, page_of(store, drawn))
    return page


def chosen_slices(case: Case, count: int) -> list[int]:
    """`count` slices in order: the fullest, apart from one another where the case is long enough, then others
    evenly."""
    total = case.shape[0]
    counts = case.voxels(*case.regions) if case.labelled else np.zeros((total, 0), int)
    shown = np.flatnonzero(counts.any(axis=1))
    ranked = [int(z) for z in fullest(counts)[: len(shown)]]
    ranked += [int(z) for z in np.linspace(0, total - 1, count).round()]
    extent = max(np.ptp(shown) if len(shown) else 0, 1)
    picked: list[int] = []
    for gap in (max(1, extent // count), 1):
        for z in ranked:
            if len(picked) < count and all(abs(z - other) >= gap for other in picked):
                picked.append(z)
    return sorted(picked)


def draw_sheet(store: Store, case: Case, path: Path, count: int) -> None:
    """A coronal section and the chosen slices in the case's window, with outlines of the regions, as a PNG."""
    folder, what = store.path / "cases" / case.name, f"{store.path}: case {case.name}"
    arrays = [open_array(folder / kind) for kind in (("image", "label") if case.labelled else ("image",))]
    row, box = middle_of_labels(case, arrays[-1], what) if case.labelled else (case.shape[1] // 2, (slice(None),) * 2)
    chosen = chosen_slices(case, count)
    lines, columns = (2, -(-len(chosen) // 2)) if len(chosen) > 3 else (1, len(chosen))

    width = 2.5 + 2.3 * columns
    figure = Figure(figsize=(width, 2.45 * lines + 0.5), layout="constrained", facecolor="#15171a")
    left, right = figure.subfigures(1, 2, width_ratios=(2.5, 2.3 * columns))
    figure.suptitle(textwrap.fill(sheet_title(case), int(12 * width)), color="white", fontsize=9)
    axis = left.subplots()
    coronal = [finished(array[:, row, :].read(), what) for array in arrays]
    draw(axis, case, coronal, f"coronal section, row {row}", (case.spacing[0], case.spacing[2]), edges=("S", "R"))
    for z in chosen:
        for end in ((0, 0.06), (0.94, 1)):
            axis.axhline(z, *end, color="#ffd166", linewidth=0.8)
    axes = right.subplots(lines, columns, squeeze=False).ravel()
    for axis in axes:
        axis.set_axis_off()
    for axis, z in zip(axes, chosen, strict=False):
        section = [finished(array[z, *box].read(), f"{what} slice {z}") for array in arrays]
        edges = ("A", "R") if z == chosen[0] else ()
        draw(axis, case, section, slice_title(case, z), case.spacing[1:], edges)
    write_atomically(path, lambda file: figure.savefig(file, dpi=110, format="png", metadata={"Software": MADE_BY}))


def middle_of_labels(case: Case, labels: Any, what: str) -> tuple[int, tuple[slice, slice]]:
    """The fullest row, and a window in the plane around all labels (the whole without any)."""
    rows, columns = np.zeros((case.shape[1], len(case.regions)), int), np.zeros(case.shape[2], int)
    for start in range(0, case.shape[0], SHARD_SLICES):
        block = finished(labels[start : min(start + SHARD_SLICES, case.shape[0])].read(), what)
        rows += np.stack([np.isin(block, values).sum(axis=(0, 2)) for values in case.regions.values()], axis=1)
        columns += (block > 0).sum(axis=(0, 1))
    if not columns.any():
        return case.shape[1] // 2, (slice(None), slice(None))
    places = [np.flatnonzero(found) for found in (rows.any(axis=1), columns)]
    spacings, box = case.spacing[1:], []
    # A square in mm: larger by half than the labels, and no less than a good part of the slice.
    shortest = 0.6 * min(n * s for n, s in zip(case.shape[1:], spacings, strict=True))
    side = max(shortest, *(1.5 * np.ptp(place) * s for place, s in zip(places, spacings, strict=True)))
    for place, spacing, length in zip(places, spacings, case.shape[1:], strict=True):
        wanted = int(np.ceil(side / spacing))
        start = max(0, min((place[0] + place[-1] - wanted) // 2, length - wanted))
        box.append(slice(int(start), int(min(start + wanted, length))))
    return int(fullest(rows)[0]), tuple(box)


def draw(
    axis,
    case: Case,
    section: Sequence[np.ndarray],
    title: str,
    spacing: tuple[float, float],
    edges: Sequence[str] = (),
) -> None:
    """An image (rows, columns), with outlines of its labels, if it has any; `edges`: what lies at its top and left."""
    image, *labels = section
    low, high = case.window
    axis.imshow(image, cmap="gray", vmin=low, vmax=high, aspect=spacing[0] / spacing[1], interpolation="antialiased")
    for label in labels:
        # Regions of many labels first, so that those within them lie on top.
        coloured = zip(case.regions.values(), cycle(COLOURS), strict=False)
        for values, colour in sorted(coloured, key=lambda region: -len(region[0])):
            region = np.isin(label, values)
            if region.any() and not region.all():
                outline(axis, region, colour)
    for text, place in zip(edges, ((0.5, 0.98), (-0.01, 0.5)), strict=False):
        alignment = {"ha": "center", "va": "top"} if text in "SA" else {"ha": "right", "va": "center"}
        axis.text(*place, text, transform=axis.transAxes, color="#ffd166", fontsize=8, **alignment)
    axis.set_title(textwrap.fill(title, 42), fontsize=7, color="#d8dce2", pad=3)
    axis.set_axis_off()


def outline(axis, region: np.ndarray, colour: str) -> None:
    """The outline of a region (rows, columns). That of a single row or column is closed around it."""
    x, y = (np.arange(n) for n in region.shape[::-1])
    if min(region.shape) < 2:
        region, x, y = np.pad(region, 1), *(np.arange(-1, len(places) + 1) for places in (x, y))
    limits = axis.get_xlim(), axis.get_ylim()
    axis.contour(x, y, region, [0.5], colors=colour, linewidths=0.9)
    axis.set(xlim=limits[0], ylim=limits[1])


def slice_title(case: Case, z: int) -> str:
    """A slice and the areas of its labels."""
    if not case.labelled:
        return f"slice {z}"
    square = case.spacing[1] * case.spacing[2] / 100
    areas = {region: count * square for region, count in zip(case.regions, case.voxels(*case.regions)[z], strict=True)}
    parts = ", ".join(f"{name} {area:.3g}" for name, area in areas.items() if area)
    return f"slice {z}" + (f": {parts} cm²" if parts else "")


def sheet_title(case: Case) -> str:
    """A case's size, spacing and so on, in one line."""
    size = "×".join(map(str, case.shape))
    spacing = " × ".join(f"{s:.3g}" for s in case.spacing)
    volumes = [f"{region} {case.volume_ml(region):,.1f} ml" for region in case.regions] if case.labelled else []
    window = f"{case.window[0]:.4g}…{case.window[1]:.4g}"
    return f"{case.name}    {size} voxels of {spacing} mm    window {window}    {', '.join(volumes) or 'no labels'}"


def page_of(store: Store, cases: Iterable[Case]) -> str:
    """The HTML page over all cases. It needs nothing from the network."""
    cases = list(cases)
    cards = "\n".join(card(case, parts_of(store.splits, case.name)) for case in cases)
    title = html.escape(str(store.path).encode(errors="backslashreplace").decode())
    facts = f"{len(cases)} of {len(store.cases)} cases, {sum(case.shape[0] for case in cases)} slices"
    colours = dict(zip(store.regions, cycle(COLOURS), strict=False))
    facts += "".join(f', <i style="color: {colour}">{html.escape(name)}</i>' for name, colour in colours.items())
    keys = "".join(f'<option value="{key_of(colours, name)}">{html.escape(name)} volume' for name in colours)
    page = PAGE.replace("MADE_BY", MADE_BY).replace("TITLE", title).replace("FACTS", facts)
    return page.replace("KEYS", keys).replace("CARDS", cards)


def key_of(regions: Iterable[str], name: str) -> str:
    """The name that a region's volume has among a card's data, where no other letters can be."""
    return f"volume{list(regions).index(name)}"


def parts_of(splits: Mapping[str, Any], name: str) -> list[str]:
    """The parts of the splits that a case is in, as `default: train`."""
    return [f"{split}: {part}" for split, record in splits.items() for part in PARTS if name in record[part]]


def card(case: Case, parts: Sequence[str]) -> str:
    """A case on the page, with the values that it is sorted by."""
    volumes = {region: case.volume_ml(region) for region in case.regions}
    values = {"slices": case.shape[0], "thickness": case.spacing[0]}
    values |= {key_of(volumes, region): volume for region, volume in volumes.items()}
    data = " ".join(f'data-{key}="{value:g}"' for key, value in values.items())
    missing = [f"no {region}" for region in volumes if not volumes[region]] if case.labelled else ["no labels"]
    text = " ".join([case.name, *parts, *missing])
    name = html.escape(case.name, quote=True)
    tags = "".join(f"<span>{html.escape(part)}</span>" for part in parts)
    return (
        f'<figure {data} data-name="{name}" data-text="{html.escape(text.lower(), quote=True)}">'
        f"<figcaption><b>{name}</b>{tags}</figcaption>"
        f'<a href="{SHEET.format(name)}"><img loading="lazy" src="{SHEET.format(name)}" alt="{name}"></a></figure>'
    )


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta name="generator" content="MADE_BY">
<title>TITLE</title>
<style>
  body { margin: 0; background: #0e1012; color: #d8dce2; font: 15px/1.4 system-ui, sans-serif }
  header { position: sticky; top: 0; display: flex; flex-wrap: wrap; gap: .6rem 1.2rem; align-items: center;
           padding: .7rem 1.2rem; background: #0e1012ee; border-bottom: 1px solid #2b2f35 }
  h1 { font-size: 1rem; margin: 0 } input, select { font: inherit; color: inherit; background: #1c1f24;
       border: 1px solid #3a3f47; border-radius: 4px; padding: .25rem .5rem }
  i { font-style: normal }
  main { display: grid; gap: 1rem; padding: 1rem 1.2rem;
         grid-template-columns: repeat(auto-fill, minmax(min(100%, 46rem), 1fr)) }
  figure { margin: 0; background: #15171a; border: 1px solid #2b2f35; border-radius: 6px; overflow: hidden }
  figure[hidden] { display: none } figcaption { padding: .4rem .7rem } img { width: 100%; display: block }
  span { margin-left: .6rem; padding: 0 .4rem; border-radius: 3px; background: #2b2f35; font-size: .8rem }
</style>
<header><h1>TITLE</h1><div>FACTS.
A is anterior, S superior, R the patient's right.</div>
<input id="filter" type="search" placeholder="case, split: part, no label" size="28">
<label>sorted by <select id="key"><option value="name">caseKEYS
<option value="slices">slices<option value="thickness">slice spacing</select></label>
<div id="shown"></div></header>
<main>
CARDS
</main>
<script>
const main = document.querySelector("main"), cards = [...main.children];
const field = document.getElementById("filter"), key = document.getElementById("key");
function show() {
  const words = field.value.toLowerCase();
  for (const card of cards) card.hidden = !card.dataset.text.includes(words);
  cards.sort((a, b) => key.value === "name" ? a.dataset.name.localeCompare(b.dataset.name)
                                            : b.dataset[key.value] - a.dataset[key.value]);
  main.append(...cards);
  document.getElementById("shown").textContent = cards.filter(card => !card.hidden).length + " shown";
}
field.oninput = key.onchange = show; show();
</script>
</html>
"""
