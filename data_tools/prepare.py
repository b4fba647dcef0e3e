"""NIfTI volumes to a slice store, case by case in parallel processes."""

import fcntl
import math
import multiprocessing
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import zarr

from .errors import UserError
from .layouts import LAYOUTS, Source, msd_description
from .report import case_row, cases_table, console, progress, window_text
from .store import create_store, open_store, write_case
from .volumes import (
    check_same_grid,
    read_header,
    read_voxels,
    resized,
    resized_affine,
    sha256,
    stored_image,
    stored_label,
)

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
    channel: int | None = None
    size: tuple[int, int] | None = None
    """Rows and columns that all slices are resampled to."""
    spacing: tuple[float, float, float] | None = None
    """mm along a file's axes, for files that do not know theirs."""


class Result(NamedTuple):
    """What became of a case."""

    case: str
    status: str
    """prepared, unchanged or failed."""
    note: str = ""
    """Why it failed, or what somebody should know about it."""


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
    """`LOW,HIGH` or `percentile`; without it the layout's own, percentiles for MR. Raises `UserError`."""
    if text is None:
        low, high = HU_WINDOWS.get(layout, HU_WINDOWS["kits"])
        modality = str(msd_description(root).get("modality")) if layout == "msd" else ""
        text = "percentile" if "MR" in modality.upper() else f"{low},{high}"
    if text == "percentile":
        return {"kind": "percentile", "low": PERCENTILES[0], "high": PERCENTILES[1]}
    try:
        low, high = (float(value) for value in text.split(","))
    except ValueError:
        low = high = 0.0
    if not -math.inf < low < high < math.inf:
        raise UserError(f"--window {text}: write LOW,HIGH (for instance -200,300) or percentile")
    return {"kind": "fixed", "low": low, "high": high}


def find_sources(root: Path, layout: str, patterns: Sequence[str | None]) -> list[Source]:
    """The cases of a data set. Raises `UserError` if there is none."""
    if not root.is_dir():
        raise UserError(f"{root}: no such folder")
    sources = LAYOUTS[layout](root, *(patterns if layout == "pairs" else ()))
    if not sources:
        raise UserError(f"{root}: no case in layout {layout} ({LAYOUTS[layout].__doc__.splitlines()[0]})")
    return sources


def prepare(layout: str, sources: Sequence[Source], options: Options, workers: int) -> int:
    """Prepare all cases that are not there yet, print a table, and return how many failed.

    Raises `UserError` if the store was made with other options, or another process is preparing it.
    """
    facts = {"labels": options.labels, "other": options.other, "window": options.window, "layout": layout}
    if options.channel is not None:
        facts["channel"] = options.channel
    create_store(options.store, facts)
    single, double = separate_doubles(sources)
    done: dict[str, Result] = {}
    with sole_writer(options.store), progress(len(single) + len(double), "prepare") as bar:
        for result in (*double, *results(single, options, workers)):
            done[result.case] = result
            if result.status == "failed":
                print(f"error: {result.case}: {result.note}", file=sys.stderr)
            bar.advance(bar.task_ids[0])
    summary(options, done)
    return sum(result.status == "failed" for result in done.values())


def separate_doubles(sources: Sequence[Source]) -> tuple[list[Source], list[Result]]:
    """The cases that are found once, and failures for those whose name several files have."""
    groups: dict[str, list[Source]] = {}
    for source in sources:
        groups.setdefault(source.case, []).append(source)
    doubles = []
    for case, group in groups.items():
        if len(group) > 1:
            images, labels = ({getattr(source, kind) for source in group} for kind in ("image", "label"))
            files = " and ".join(map(str, sorted(images if len(images) > 1 else labels)))
            doubles.append(Result(case, "failed", f"{files} have one case name; rename or remove all but one"))
    return [group[0] for group in groups.values() if len(group) == 1], doubles


@contextmanager
def sole_writer(store: Path) -> Iterator[None]:
    """Hold the store's lock. Raises `UserError` if another process has it; it ends with the process."""
    with open(store / "zarr.json", "r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{store}: another spark-data prepare is writing to it; wait until it has ended") from None
        except OSError:
            pass  # This file system has no locks.
        yield


def results(sources: Sequence[Source], options: Options, workers: int) -> Iterator[Result]:
    """The result of each case as it is done, one case at a time in each of `workers` processes."""
    workers = min(workers, len(sources))
    if workers <= 1:
        yield from (prepare_case(source, options) for source in sources)
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=start_worker)
    try:
        futures = {pool.submit(prepare_case, source, options): source for source in sources}
        for future in as_completed(futures):
            try:
                yield future.result()
            except BrokenProcessPool:
                source = futures[future]
                reason = "not done, as a worker process was killed (out of memory?); use fewer --workers"
                yield Result(source.case, "failed", f"{source.image}: {reason}")
    finally:
        pool.shutdown(cancel_futures=True)


def start_worker() -> None:
    """Leave Ctrl-C to the main process, end when it ends, and use one thread."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    zarr.config.set({"threading.max_workers": 1})

    def end_with_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def prepare_case(source: Source, options: Options) -> Result:
    """Write one case unless it is there already."""
    try:
        for path in (source.image, source.label):
            if not path.is_file():
                raise UserError(f"{path}: no such file; put it there, or take the case out")
        hashes = {"image_sha256": sha256(source.image), "label_sha256": sha256(source.label)}
        if is_there(source.case, hashes, options.store):
            return Result(source.case, "unchanged")
        return Result(source.case, "prepared", write(source, hashes, options))
    except UserError as error:
        return Result(source.case, "failed", str(error))
    except OSError as error:
        place = error.filename or options.store
        reason = f"{place}: {error.strerror or error}; mend that and run the command again"
        return Result(source.case, "failed", reason)
    except MemoryError:
        return Result(source.case, "failed", f"{source.image}: does not fit into memory; use fewer --workers")


def is_there(case: str, hashes: dict[str, str], store: Path) -> bool:
    """Whether the store has this case, made of these files."""
    try:
        known = open_store(store, only=case).cases
    except UserError:
        return False
    return case in known and all(known[case].source.get(key) == value for key, value in hashes.items())


def write(source: Source, hashes: dict[str, str], options: Options) -> str:
    """Read, check and write a case. Returns notes on it. Raises `UserError`."""
    voxels, labels, attributes, notes = convert(source, options)
    attributes["source"] |= hashes
    write_case(options.store, source.case, voxels, labels, attributes)
    return notes


def convert(source: Source, options: Options) -> tuple[np.ndarray, np.ndarray | None, dict[str, Any], str]:
    """A case as it is stored: image (Z, H, W), label (Z, H, W) if it has one, attributes, and notes on it.

    Raises `UserError` if it can't be stored.
    """
    image, labels = read_header(source.image, options.channel, options.spacing), None
    sources = {"image": image.source}
    if source.label:
        label = read_header(source.label, spacing=options.spacing)
        check_same_grid(image, label)
        labels, _ = read_voxels(label, stored_label(options.labels, options.other))
        sources["label"] = label.source
    voxels, rounded = read_voxels(image, stored_image)
    plane, size = voxels.shape[1:], options.size or voxels.shape[1:]
    voxels = resized(voxels, size, nearest=False)
    labels = labels if labels is None else resized(labels, size, nearest=True)
    affine = resized_affine(image.stored_affine, plane, size)
    attributes = {
        "affine": affine.tolist(),
        "spacing": np.linalg.norm(affine[:3, :3], axis=0).tolist(),
        "window": resolve_window(options.window, voxels, source.image),
        "source": sources,
    }
    resampled = "" if plane == size else f"resampled from {plane[0]}×{plane[1]} to {size[0]}×{size[1]}"
    return voxels, labels, attributes, "; ".join(filter(None, (*image.notes, rounded, resampled)))


def resolve_window(window: dict[str, Any], voxels: np.ndarray, path: Path) -> tuple[float, float]:
    """The intensities that become −1 and 1 in one case. Raises `UserError` for a constant image."""
    if window["kind"] == "fixed":
        return window["low"], window["high"]
    low, high = (float(value) for value in np.percentile(voxels, (window["low"], window["high"])))
    if low == high:
        raise UserError(f"{path}: a constant image, nearly all voxels are {low:g}; take the case out, or give --window")
    return low, high


def summary(options: Options, done: dict[str, Result]) -> None:
    """A table of the cases, the notes on them, and a line with their numbers."""
    try:
        cases = open_store(options.store).cases
    except UserError:
        cases = {}
    table = cases_table(str(options.store), ["status"])
    for name, result in sorted(done.items()):
        row = case_row(cases[name]) if name in cases else [name, *[""] * 7]
        table.add_row(*row, result.status)
    console.print(table)
    for name, result in sorted(done.items()):
        if result.note and result.status != "failed":
            console.print(f"note: {name}: {result.note}")
    counts = Counter(result.status for result in done.values())
    others = len(set(cases) - set(done))
    console.print(
        f"{len(done)} cases: "
        + ", ".join(f"{counts[status]} {status}" for status in ("prepared", "unchanged", "failed"))
        + (f"; {others} more in the store" if others else "")
        + f"; {window_text(options.window)}"
    )


def default_workers() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
