"""The plan of `prepare`: all that it would do, without writing anything.

Errors are those that names and headers show; voxels are read of one case alone, the sample that bytes and time are
estimated from.
"""

import math
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import zarr
from rich import box
from rich.table import Table
from zarr.storage import MemoryStore

from .arrays import write_arrays
from .creation import check_store
from .errors import UserError, say_error
from .layouts import Source
from .location import is_local
from .nifti import Header
from .options import Options
from .prepare import check_files, check_needed, convert, is_there, read_headers, reason, separate_doubles, source_hashes
from .progress import console, progress
from .report import bytes_text, window_text
from .store import check_name, read_case
from .volumes import plane_size, resized_affine

SAMPLES = 3
"""How many cases are tried as the sample, if the voxels of the first can't be stored."""


@dataclass(frozen=True)
class Planned:
    """The plan for a case."""

    case: str
    status: str
    """new, changed (made of other files, or damaged, and to be prepared again), unchanged or error."""
    note: str = ""
    """The error, or what somebody should know about the case."""
    shape: tuple[int, int, int] = (0, 0, 0)
    """As stored: slices, rows, columns."""
    spacing: tuple[float, ...] = ()
    """mm between slices, rows, columns."""
    axes: str = ""
    """Those of the source."""
    itemsize: int | None = None
    """Bytes of a stored voxel; None where only the voxels tell whether int16 holds them."""
    labelled: bool = True

    @property
    def voxels(self) -> int:
        """Of the stored image."""
        return math.prod(self.shape)

    def raw_bytes(self, unknown: int) -> int:
        """Bytes of image and label before compression, with `unknown` bytes for a voxel whose type is not known."""
        return self.voxels * ((self.itemsize or unknown) + self.labelled)


@dataclass(frozen=True)
class Sample:
    """One case, prepared into memory."""

    case: Planned
    seconds: float
    itemsize: int
    """Bytes of a stored voxel."""
    stored: int
    """Bytes of the compressed arrays."""

    def unknown(self) -> int:
        """Bytes to expect of a voxel whose header does not tell: the sample's, if its own does not either."""
        return self.itemsize if self.case.itemsize is None else 4

    def ratio(self) -> float:
        """Stored bytes over raw ones."""
        return self.stored / self.case.raw_bytes(self.itemsize)


def plan(sources: Sequence[Source], options: Options, workers: int) -> int:
    """Print what `prepare` would do with these cases, and return how many have an error. Nothing is written.

    Raises `UserError` if the store was made with other options.
    """
    check_store(options.store, options.facts())
    single, double = separate_doubles(sources)
    cases = {result.case: Planned(result.case, "error", result.note) for result in double}
    start = time.perf_counter()
    with ThreadPoolExecutor(workers) as threads, progress(len(single), "look") as bar:
        for case in threads.map(partial(look, options), single):
            cases[case.case] = case
            bar.advance(bar.task_ids[0])
    looked = time.perf_counter() - start
    sample = take_sample({source.case: source for source in single}, cases, options, workers)
    for name, case in sorted(cases.items()):
        if case.status == "error":
            say_error(f"{name}: {case.note}")
    show(options, cases, sample)
    if sample:
        expect(options.store, todo(cases.values()), sample, workers, looked)
    return sum(case.status == "error" for case in cases.values())


def look(options: Options, source: Source) -> Planned:
    """The plan for a case. The files of one that is in the store are hashed, of others the headers are read."""
    try:
        check_name("case", source.case)
        check_files(source)
        try:
            known = read_case(options.store, source.case)
            status = "new" if known is None else "changed"
        except UserError:
            known, status = None, "changed"
        if status == "new":
            check_needed(source, options)
        elif is_there(source, source_hashes(source), options):
            axes, itemsize = known.source["image"]["orientation"], np.dtype(known.dtype).itemsize
            return Planned(
                source.case, "unchanged", "", known.shape, known.spacing, axes, itemsize, labelled=known.labelled
            )
        image, label = read_headers(source, options)
        size = plane_size(image, options.size, options.plane_spacing)
    except (UserError, OSError, MemoryError) as error:
        return Planned(source.case, "error", reason(error, source, options.store))
    slices, *plane = image.stored_shape
    affine = resized_affine(image.stored_affine, plane, size)
    return Planned(
        case=source.case,
        status=status,
        note="; ".join(image.notes),
        shape=(slices, *size),
        spacing=tuple(np.linalg.norm(affine[:3, :3], axis=0)),
        axes=image.source["orientation"],
        itemsize=known_itemsize(image),
        labelled=label is not None,
    )


def known_itemsize(image: Header) -> int | None:
    """Bytes of a stored voxel, if the header tells."""
    return 2 if not image.scaling and np.can_cast(image.dtype, np.int16) else None


def todo(cases: Iterable[Planned]) -> list[Planned]:
    """The cases that would be prepared, from few voxels to many."""
    return sorted((case for case in cases if case.status in ("new", "changed")), key=lambda case: case.voxels)


def take_sample(sources: dict[str, Source], cases: dict[str, Planned], options: Options, workers: int) -> Sample | None:
    """The case of median size that would be prepared, measured; None if there is none, or none can be stored.

    A case whose voxels can't be stored becomes an error among `cases`, and the next one is tried.
    """
    for _ in range(SAMPLES):
        if not (candidates := todo(cases.values())):
            return None
        case = candidates[len(candidates) // 2]
        try:
            # As in a worker of a run, which has one thread.
            with zarr.config.set({} if workers == 1 else {"threading.max_workers": 1}), progress(1, "sample"):
                return measure(case, sources[case.case], options)
        except (UserError, OSError, MemoryError) as error:
            note = reason(error, sources[case.case], options.store)
            cases[case.case] = replace(case, status="error", note=note)
    return None


def measure(case: Planned, source: Source, options: Options) -> Sample:
    """Prepare a case into memory. Raises `UserError` if it can't be stored."""
    start = time.perf_counter()
    source_hashes(source)
    voxels, labels, _, _ = convert(source, options)
    memory = {}
    write_arrays(zarr.create_group(MemoryStore(memory)), voxels, labels, len(options.labels))
    stored = sum(len(data) for key, data in memory.items() if not key.endswith("zarr.json"))
    return Sample(case, time.perf_counter() - start, voxels.dtype.itemsize, stored)


def show(options: Options, cases: dict[str, Planned], sample: Sample | None) -> None:
    """A table of the cases, the notes on them, and a line with their numbers."""
    table = Table(title=f"{options.store} (dry run)", box=box.SIMPLE_HEAD)
    for column in ("case", "slices", "size", "spacing mm", "source axes", "to write", "status"):
        table.add_column(column, no_wrap=column == "case")
    table.caption = "spacing of slices, rows, columns; to write: an estimate"
    for name, case in sorted(cases.items()):
        facts = ["", "", "", ""]
        if case.voxels:
            spacing = " ".join(f"{value:.3g}" for value in case.spacing)
            facts = [str(case.shape[0]), f"{case.shape[1]}×{case.shape[2]}", spacing, case.axes]
        estimated = sample and case.status in ("new", "changed")
        size = bytes_text(case.raw_bytes(sample.unknown()) * sample.ratio()) if estimated else ""
        table.add_row(name, *facts, size, case.status)
    console.print(table)
    for name, case in sorted(cases.items()):
        if case.note and case.status != "error":
            console.print(f"note: {name}: {case.note}")
    counts = Counter(case.status for case in cases.values())
    console.print(
        f"{len(cases)} cases: {counts['new']} new, {counts['changed']} changed, {counts['unchanged']} unchanged, "
        f"{counts['error']} with an error; {window_text(options.window)}; nothing was written"
    )
    if not sample and todo(cases.values()):
        console.print(f"no estimate of bytes and time: the voxels of {SAMPLES} cases can't be stored")


def expect(store: Path, cases: Sequence[Planned], sample: Sample, workers: int, looked: float) -> None:
    """Lines on the bytes and the time to expect of the `cases` that would be prepared; a warning if the disk is small.

    `looked` is how many seconds it took to look at all cases, which a run does too.
    """
    raw = sum(case.raw_bytes(sample.unknown()) for case in cases)
    size = raw * sample.ratio()
    text = f"to write: about {bytes_text(size)} ({bytes_text(raw)} of voxels × {sample.ratio():.2f})"
    if is_local(store):
        disk = next(folder for folder in (store.resolve(), *store.resolve().parents) if folder.exists())
        free = shutil.disk_usage(disk).free
        text += f"; free at {disk}: {bytes_text(free)}"
        if size > free:
            say_error(f"{disk}: about {bytes_text(size)} to write, {bytes_text(free)} free", "warning")
    console.print(text)
    workers = min(workers, len(cases))
    # The cases share the workers, and no case has more than one.
    share = max(sum(case.voxels for case in cases) / workers, cases[-1].voxels)
    seconds = math.ceil(looked + sample.seconds * share / sample.case.voxels)
    console.print(f"time: about {timedelta(seconds=seconds)} with {workers} worker{'s' if workers > 1 else ''}")
    console.print(
        f"both are estimates from {sample.case.case}, {sample.case.shape[0]} slices, which took {sample.seconds:.2g} s "
        "to read, convert and compress; a slow disk takes longer"
    )
