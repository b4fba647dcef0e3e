"""NIfTI volumes to a slice store, case by case in parallel processes."""

import multiprocessing
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from .errors import UserError
from .layouts import LAYOUTS, Source, msd_description
from .report import console
from .store import Case, create_store, open_store, write_case
from .volumes import check_same_grid, read_volume, sha256, stored_image, stored_label

HU_WINDOWS = {"kits": (-200.0, 300.0), "lits": (-60.0, 140.0)}
"""Hounsfield units that the original system maps to −1 and 1."""
PERCENTILES = (0.5, 99.5)


@dataclass(frozen=True)
class Options:
    """How volumes become a store."""

    store: Path
    labels: dict[str, list[int]]
    other: bool
    window: dict[str, Any]
    channel: int


def parse_labels(text: str) -> dict[str, list[int]]:
    """`organ=1+3,tumour=2` to the source values of each. Raises `UserError`."""
    mapping: dict[str, list[int]] = {}
    for part in text.split(","):
        name, _, values = part.partition("=")
        try:
            numbers = [int(value) for value in values.split("+")]
        except ValueError:
            numbers = []
        if name.strip() not in ("organ", "tumour") or not numbers or name.strip() in mapping or 0 in numbers:
            raise UserError(f"--labels {text}: write it like organ=1,tumour=2 or organ=1+3 (0 is background)")
        mapping[name.strip()] = numbers
    repeated = [v for v, n in Counter(v for group in mapping.values() for v in group).items() if n > 1]
    if repeated or "organ" not in mapping:
        raise UserError(f"--labels {text}: each value once, and organ at least")
    return mapping


def parse_window(text: str | None, layout: str, root: Path) -> dict[str, Any]:
    """`LOW,HIGH` or `percentile`; without it the layout's own (percentiles for MR, else −200…300). Raises `UserError`."""
    if text is None:
        low, high = HU_WINDOWS.get(layout, HU_WINDOWS["kits"])
        modality = " ".join(msd_description(root).get("modality", {}).values()) if layout == "msd" else ""
        text = "percentile" if "MR" in modality.upper() else f"{low},{high}"
    if text == "percentile":
        return {"kind": "percentile", "low": PERCENTILES[0], "high": PERCENTILES[1]}
    try:
        low, high = (float(value) for value in text.split(","))
    except ValueError:
        low = high = 0.0
    if not low < high:
        raise UserError(f"--window {text}: write LOW,HIGH (for instance -200,300) or percentile")
    return {"kind": "fixed", "low": low, "high": high}


def find_sources(root: Path, layout: str, patterns: Sequence[str | None]) -> list[Source]:
    """The cases of a data set. Raises `UserError` if there is none, or two have one name."""
    if not root.is_dir():
        raise UserError(f"{root}: no such folder")
    sources = LAYOUTS[layout](root, *(patterns if layout == "pairs" else ()))
    if not sources:
        raise UserError(f"{root}: no case in layout {layout} ({LAYOUTS[layout].__doc__.splitlines()[0]})")
    for name, count in Counter(source.case for source in sources).items():
        if count > 1:
            raise UserError(f"{root}: {count} images have the case name '{name}'; rename all but one")
        if name in (".", "..") or "/" in name or "\\" in name:
            raise UserError(f"{root}: '{name}' is no case name")
    return sources


def prepare(root: Path, layout: str, sources: Sequence[Source], options: Options, workers: int) -> int:
    """Prepare all cases that are not there yet, print a table, and return how many failed."""
    facts = {"labels": options.labels, "other": options.other, "window": options.window, "layout": layout}
    create_store(options.store, facts)
    status: dict[str, str] = {}
    notes: dict[str, str] = {}
    columns = (TextColumn("prepare"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("prepare", total=len(sources))
        for case, result, note in results(sources, options, workers):
            status[case], notes[case] = result, note
            if result == "failed":
                console.print(f"[red]failed[/red] {case}: {note}")
            progress.advance(bar)
    failed = sum(result == "failed" for result in status.values())
    summary(options, sources, status, notes)
    return failed


def results(sources: Sequence[Source], options: Options, workers: int):
    """(case, status, note) of each case as it is done."""
    if workers <= 1:
        yield from (prepare_case(source, options) for source in sources)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(sources)), mp_context=context) as pool:
        futures = {pool.submit(prepare_case, source, options): source.case for source in sources}
        for future in as_completed(futures):
            try:
                yield future.result()
            except BrokenProcessPool:
                yield futures[future], "failed", "a worker process was killed (out of memory?); use fewer --workers"


def prepare_case(source: Source, options: Options) -> tuple[str, str, str]:
    """Write one case unless it is there already. Returns its name, its status (prepared, there, failed) and a note."""
    try:
        for path in (source.image, source.label):
            if not path.is_file():
                raise UserError(f"{path}: no such file; put it there, or take the case out")
        hashes = {"image_sha256": sha256(source.image), "label_sha256": sha256(source.label)}
        if is_there(source.case, hashes, options.store):
            return source.case, "there", ""
        return source.case, "prepared", write(source, hashes, options)
    except UserError as error:
        return source.case, "failed", str(error)
    except OSError as error:
        place = error.filename or options.store
        return source.case, "failed", f"{place}: {error.strerror or error}; mend that and run the command again"
    except MemoryError:
        return source.case, "failed", f"{source.image}: does not fit into memory; use fewer --workers"


def is_there(case: str, hashes: dict[str, str], store: Path) -> bool:
    """Whether the store has this case, made of these files."""
    try:
        known = open_store(store, only=case).cases
    except UserError:
        return False
    return case in known and all(known[case].source.get(key) == value for key, value in hashes.items())


def write(source: Source, hashes: dict[str, str], options: Options) -> str:
    image, label = read_volume(source.image, options.channel), read_volume(source.label)
    check_same_grid(image, label, (source.image, source.label))
    voxels, note = stored_image(image.voxels, source.image)
    window = options.window
    limits = (window["low"], window["high"])
    if window["kind"] == "percentile":
        limits = tuple(float(v) for v in np.percentile(voxels, limits))
    if not limits[0] < limits[1]:
        raise UserError(f"{source.image}: nearly all voxels have the value {limits[0]:g}, so there is nothing to see")
    attributes = {
        "affine": image.affine.tolist(),
        "spacing": image.spacing,
        "window": limits,
        "source": {"image": image.source, "label": label.source, **hashes},
    }
    write_case(
        options.store,
        source.case,
        voxels,
        stored_label(label.voxels, options.labels, options.other, source.label),
        attributes,
    )
    return note


def summary(options: Options, sources: Sequence[Source], status: dict[str, str], notes: dict[str, str]) -> None:
    """A table of the cases, and a line with their numbers."""
    try:
        cases = open_store(options.store).cases
    except UserError:
        cases = {}
    table = cases_table(f"{options.store}")
    table.add_column("status")
    for source in sources:
        row = case_row(cases[source.case]) if source.case in cases else [source.case, *[""] * 6]
        table.add_row(
            *row,
            status[source.case]
            + (f": {notes[source.case]}" if notes[source.case] and status[source.case] != "failed" else ""),
        )
    console.print(table)
    counts = Counter(status.values())
    window = options.window
    console.print(
        f"{counts['prepared']} prepared, {counts['there']} there already, {counts['failed']} failed; "
        f"window {window['low']:g}…{window['high']:g}{' percentile' if window['kind'] == 'percentile' else ''}"
    )


def cases_table(title: str) -> Table:
    """The head of a table of cases."""
    return Table("case", "slices", "size", "spacing mm", "source axes", "voxels", "organ / tumour slices", title=title)


def case_row(case: Case) -> list[str]:
    """A case in such a table."""
    return [
        case.name,
        str(case.shape[0]),
        f"{case.shape[1]}×{case.shape[2]}",
        " ".join(f"{value:.3g}" for value in case.spacing),
        case.source["image"]["orientation"],
        case.dtype,
        f"{len(case.task_slices('organ'))} / {len(case.task_slices('tumour'))}",
    ]


def default_workers() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0))
