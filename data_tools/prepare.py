"""NIfTI volumes to a slice store, case by case in parallel processes."""

import errno
import fcntl
import math
import multiprocessing
import signal
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import zarr

from .errors import UserError, unknown_name
from .layouts import LAYOUTS, Source, modality
from .location import is_local
from .report import case_row, cases_table, console, progress, window_text
from .store import create_store, read_attributes, read_case, write_case
from .volumes import (
    Header,
    check_same_grid,
    read_header,
    read_voxels,
    resized,
    resized_affine,
    sha256,
    stored_image,
    stored_label,
)
from .workers import end_with_parent

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
    layout: str = "kits"
    patterns: tuple[str, str] | None = None
    """Images and labels in layout pairs."""
    spacing: tuple[float, float, float] | None = None
    """mm along a file's axes, for files that do not know theirs."""

    def facts(self) -> dict[str, Any]:
        """What a store remembers of them: all cases of a store are made alike."""
        facts = {"labels": self.labels, "other": self.other, "window": self.window, "layout": self.layout}
        further = {"channel": self.channel, "size": self.size, "patterns": self.patterns}
        return facts | {key: value for key, value in further.items() if value is not None}


def options_of(store: Path) -> Options:
    """The options that a store was made with. Raises `UserError`."""
    facts = read_attributes(store)
    return Options(store, **{field.name: facts[field.name] for field in fields(Options) if field.name in facts})


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
        text = "percentile" if "MR" in modality(root, layout).upper() else f"{low},{high}"
    if text == "percentile":
        return {"kind": "percentile", "low": PERCENTILES[0], "high": PERCENTILES[1]}
    try:
        low, high = (float(value) for value in text.split(","))
    except ValueError:
        low = high = 0.0
    if not -math.inf < low < high < math.inf:
        raise UserError(f"--window {text}: write LOW,HIGH (for instance -200,300) or percentile")
    return {"kind": "fixed", "low": low, "high": high}


def parse_size(text: str | None) -> tuple[int, int] | None:
    """`512` or `512,384` (rows, columns). Raises `UserError`."""
    if text is None:
        return None
    try:
        numbers = [int(number) for number in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2) or not all(0 < number < 2**15 for number in numbers):
        raise UserError(f"--size {text}: write 512, or ROWS,COLUMNS")
    return numbers[0], numbers[-1]


def parse_spacing(text: str | None) -> tuple[float, float, float] | None:
    """`0.7,0.7,2.5`, mm along the three axes of a file. Raises `UserError`."""
    if text is None:
        return None
    try:
        numbers = tuple(float(number) for number in text.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) != 3 or not all(0 < number < 1e3 for number in numbers):
        raise UserError(f"--spacing {text}: write three lengths in mm, along the file's axes, like 0.7,0.7,2.5")
    return numbers


def parse_part(text: str | None) -> tuple[int, int] | None:
    """`3/8` to (3, 8). Raises `UserError`."""
    if text is None:
        return None
    numbers = [int(number) if number.isdecimal() else 0 for number in text.split("/")]
    if len(numbers) != 2 or not 1 <= numbers[0] <= numbers[1]:
        raise UserError(f"--part {text}: write K/N with K from 1 to N, like 1/8 … 8/8")
    return numbers[0], numbers[1]


def find_sources(
    root: Path,
    layout: str,
    patterns: Sequence[str | None] | None = None,
    channel: int | None = None,
    unlabelled: bool = False,
) -> list[Source]:
    """The cases of a data set; volumes without a label too if `unlabelled`. Raises `UserError` if there is none."""
    if not root.is_dir():
        raise UserError(f"{root}: no such folder")
    more = {"pairs": patterns or (None, None), "nnunet": (channel,)}
    sources = LAYOUTS[layout](root, *more.get(layout, ()))
    if unlabelled:
        sources = [s if s.label and s.label.is_file() else replace(s, label=None) for s in sources]
    else:
        sources = [source for source in sources if source.label]
    if not sources:
        raise UserError(f"{root}: no case in layout {layout} ({' '.join(LAYOUTS[layout].__doc__.split())})")
    return sources


def choose(sources: Sequence[Source], only: str | None, part: tuple[int, int] | None) -> list[Source]:
    """The sources of the cases `only` names (separated by commas, * and ? allowed), and of these part k of n.

    Raises `UserError` for a name that is no case's.
    """
    names = named({source.case for source in sources}, only)
    if part is not None:
        names = names[part[0] - 1 :: part[1]]
    return [source for source in sources if source.case in set(names)]


def named(cases: Iterable[str], only: str | None) -> list[str]:
    """The cases that `only` names, sorted; all if it is None. Raises `UserError` for a name that is no case's."""
    names = sorted(cases)
    if only is None:
        return names
    chosen = set()
    for pattern in filter(None, (pattern.strip() for pattern in only.split(","))):
        matching = [name for name in names if fnmatchcase(name, pattern)]
        if not matching:
            raise UserError(f"--only {only}: {unknown_name('case', pattern, names)}")
        chosen.update(matching)
    return sorted(chosen)


def prepare(sources: Sequence[Source], options: Options, workers: int) -> int:
    """Prepare all cases that are not there yet, print a table, and return how many failed.

    Others may prepare into the same store at the same time, from here or from other machines. Raises `UserError` if
    the store was made with other options.
    """
    create_store(options.store, options.facts())
    single, double = separate_doubles(sources)
    done: dict[str, Result] = {}
    with progress(len(single) + len(double), "prepare") as bar:
        for result in (*double, *results(partial(prepare_case, options), single, workers, lost_source)):
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
            files = " and ".join(sorted(map(str, images if len(images) > 1 else labels - {None})))
            doubles.append(Result(case, "failed", f"{files} have one case name; rename or remove all but one"))
    return [group[0] for group in groups.values() if len(group) == 1], doubles


@contextmanager
def case_lock(store: Path, case: str) -> Iterator[None]:
    """Wait until no other process, here or on another machine, prepares this case; it ends with the process.

    It is a lock on one byte of a file that nothing else opens: record locks are what network file systems share, and a
    process loses its own as soon as it closes that file. Object stores have no locks.
    """
    if not is_local(store):
        yield
        return
    with open(store / ".lock", "a+b") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX, 1, zlib.crc32(case.encode()) & 0x7FFFFFFF)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                raise  # Those: this file system has no locks.
        yield


def results(
    work: Callable[[Any], Result], jobs: Sequence[Any], workers: int, lost: Callable[[Any, str], Result]
) -> Iterator[Result]:
    """The result of `work` on each job as it is done, one job at a time in each of `workers` processes.

    A job that was not done, as a process was killed, has the result of `lost`, which is given the reason.
    """
    workers = min(workers, len(jobs))
    if workers <= 1:
        yield from map(work, jobs)
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=start_worker)
    try:
        # Workers start here, and inherit that Ctrl-C is left to the main process, even while they still import.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        futures = {pool.submit(work, job): job for job in jobs}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        for future in as_completed(futures):
            try:
                yield future.result()
            except BrokenProcessPool:
                yield lost(futures[future], "as a worker process was killed (out of memory?); use fewer --workers")
    finally:
        pool.shutdown(cancel_futures=True)


def lost_source(source: Source, reason: str) -> Result:
    """A case that was not prepared."""
    return Result(source.case, "failed", f"{source.image}: not done, {reason}")


def start_worker() -> None:
    """End when the main process ends, and use one thread."""
    zarr.config.set({"threading.max_workers": 1})
    end_with_parent()


def prepare_case(options: Options, source: Source, force: bool = False) -> Result:
    """Write one case unless it is there already, or in any case with `force`."""
    try:
        hashes = source_hashes(source)
        with case_lock(options.store, source.case):
            if not force and is_there(source.case, hashes, options):
                return Result(source.case, "unchanged")
            return Result(source.case, "prepared", write(source, hashes, options))
    except (UserError, OSError, MemoryError) as error:
        return Result(source.case, "failed", reason(error, source, options.store))


def reason(error: Exception, source: Source, store: Path) -> str:
    """Why a case can't be prepared, and what to do about it."""
    if isinstance(error, MemoryError):
        return f"{source.image}: does not fit into memory; use fewer --workers"
    if isinstance(error, OSError):
        return f"{error.filename or store}: {error.strerror or error}; mend that and run the command again"
    return str(error)


def check_files(source: Source) -> None:
    """Raise `UserError` if a file of a case is missing."""
    if not source.image.is_file():
        raise UserError(f"{source.image}: no such file; put it there, or take the case out")
    if source.label and not source.label.is_file():
        raise UserError(f"{source.label}: no such file; put it there, or pass --unlabelled to store it for prediction")


def source_hashes(source: Source) -> dict[str, str]:
    """The hashes of a case's files. Raises `UserError` if one is missing."""
    check_files(source)
    files = {"image": source.image} | ({"label": source.label} if source.label else {})
    return {f"{kind}_sha256": sha256(path) for kind, path in files.items()}


def is_there(case: str, hashes: dict[str, str], options: Options) -> bool:
    """Whether the store has this case, made of these files, and with this spacing if they know none."""
    try:
        known = read_case(options.store, case)
    except UserError:
        return False
    if known is None or {key: value for key, value in known.source.items() if key.endswith("_sha256")} != hashes:
        return False
    if options.spacing is None or not known.source["image"]["lacks_spacing"]:
        return True
    return np.allclose(np.linalg.norm(np.array(known.source["image"]["affine"])[:3, :3], axis=0), options.spacing)


def write(source: Source, hashes: dict[str, str], options: Options) -> str:
    """Read, check and write a case. Returns notes on it. Raises `UserError`."""
    voxels, labels, attributes, notes = convert(source, options)
    attributes["source"] |= hashes
    write_case(options.store, source.case, voxels, labels, attributes)
    return notes


def read_headers(source: Source, options: Options) -> tuple[Header, Header | None]:
    """The headers of a case's image and, if it has one, label. Raises `UserError` if they don't belong together."""
    image = read_header(source.image, options.channel, options.spacing)
    if not source.label:
        return image, None
    label = read_header(source.label, spacing=options.spacing)
    check_same_grid(image, label)
    return image, label


def convert(source: Source, options: Options) -> tuple[np.ndarray, np.ndarray | None, dict[str, Any], str]:
    """A case as it is stored: image (Z, H, W), label (Z, H, W) if it has one, attributes, and notes on it.

    Raises `UserError` if it can't be stored.
    """
    (image, label), labels = read_headers(source, options), None
    sources = {"image": image.source}
    if label:
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
    cases = {name: read_case(options.store, name) for name, r in done.items() if r.status != "failed"}
    table = cases_table(str(options.store), ["status"])
    for name, result in sorted(done.items()):
        row = case_row(cases[name]) if cases.get(name) else [name, *[""] * 7]
        table.add_row(*row, result.status)
    console.print(table)
    for name, result in sorted(done.items()):
        if result.note and result.status != "failed":
            console.print(f"note: {name}: {result.note}")
    counts = Counter(result.status for result in done.values())
    others = sum(folder.name not in done for folder in (options.store / "cases").iterdir() if folder.is_dir())
    console.print(
        f"{len(done)} cases: "
        + ", ".join(f"{counts[status]} {status}" for status in ("prepared", "unchanged", "failed"))
        + (f"; {others} more in the store" if others else "")
        + f"; {window_text(options.window)}"
    )
