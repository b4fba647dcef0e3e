"""NIfTI volumes to a slice store, case by case in parallel processes."""

import errno
import fcntl
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .creation import create_store
from .errors import Conflict, UserError, say_error
from .identity import adopt, identity_of, stamp
from .labels import regions_of
from .layouts import Source
from .location import is_local
from .nifti import Header, read_header, read_voxels
from .options import Options
from .pool import results
from .preparation import resolve_window
from .progress import console, progress
from .report import add_case, cases_table, window_text
from .split import PARTS
from .store import Case, check_name, read_case, read_splits, write_case
from .volumes import (
    check_same_grid,
    plane_size,
    resized,
    resized_affine,
    sha256,
    stored_image,
    stored_label,
)


class Result(NamedTuple):
    """The outcome for a case."""

    case: str
    status: str
    """prepared, unchanged or failed."""
    note: str = ""
    """Why it failed, or what somebody should know about it."""


def prepare(sources: Sequence[Source], options: Options, workers: int) -> int:
    """Prepare all cases that are not there yet, print a table, and return how many failed.

    Others may prepare into the same store at the same time, from here or from other machines. Raises `UserError` if
    the store was made with other options.
    """
    create_store(options.store, options.facts())
    with case_lock(options.store, ""):
        adopt(options.store)
    single, double = separate_doubles(sources)
    done: dict[str, Result] = {}
    with progress(len(single) + len(double), "prepare") as bar:
        for result in (*double, *results(partial(prepare_case, options), single, workers, lost_source)):
            done[result.case] = result
            if result.status == "failed":
                say_error(f"{result.case}: {result.note}")
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


def lost_source(source: Source, reason: str) -> Result:
    """A case that was not prepared."""
    return Result(source.case, "failed", f"{source.image}: not done, {reason}")


def prepare_case(options: Options, source: Source, force: bool = False) -> Result:
    """Write one case unless it is there already, or in any case with `force`."""
    try:
        check_name("case", source.case)
        hashes = source_hashes(source)
        with case_lock(options.store, source.case):
            if is_there(source, hashes, options) and not force:
                stamp(options.store, source.case, identity_of(options.store))
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


def is_there(source: Source, hashes: dict[str, str], options: Options) -> bool:
    """Whether the store has this case, made of these files, and with this spacing if they know none.

    Raises `Conflict` if it has one of other files, unless options say to replace it; a label that was missing is no
    conflict. Raises `UserError` if a split has the case, and there is no label now.
    """
    known = known_case(source.case, options)
    before = {key: value for key, value in known.source.items() if key.endswith("_sha256")} if known else {}
    if known is None or before != hashes:
        check_needed(source, options)
        gained = {key: value for key, value in hashes.items() if key != "label_sha256"}
        if before not in ({}, gained) and not options.replace:
            read_headers(source, options)  # which may say that the file is damaged
            other = [
                name for name in ("image", "label") if before.get(f"{name}_sha256") != hashes.get(f"{name}_sha256")
            ]
            raise Conflict(
                f"{source.image}: the store has a case {source.case} of other files ({', '.join(other)}); pass "
                "--replace to replace it, or prepare into another store"
            )
        return False
    if options.spacing is None or not known.source["image"]["lacks_spacing"]:
        return True
    return np.allclose(np.linalg.norm(np.array(known.source["image"]["affine"])[:3, :3], axis=0), options.spacing)


def known_case(case: str, options: Options) -> Case | None:
    """A case that is in the store and sound. Raises `Conflict` if it is of another store, unless options replace it."""
    try:
        return read_case(options.store, case)
    except Conflict:
        if options.replace:
            return None
        raise
    except UserError:
        return None


def check_needed(source: Source, options: Options) -> None:
    """Raise `UserError` if a case without a label is in a part of a split: it would drop out of it without a word."""
    if source.label is not None:
        return
    for name, record in read_splits(options.store).items():
        for part in PARTS:
            if source.case in record[part]:
                raise UserError(
                    f"{source.image}: has no label, and case {source.case} is in part {part} of split '{name}', which "
                    "needs one; put its label there, or prepare into another store"
                )


def write(source: Source, hashes: dict[str, str], options: Options) -> str:
    """Read, check and write a case. Returns notes on it. Raises `UserError`."""
    voxels, labels, attributes, notes = convert(source, options)
    attributes["source"] |= hashes
    write_case(options.store, source.case, voxels, labels, attributes, options.replace)
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
    plane, size = voxels.shape[1:], plane_size(image, options.size, options.plane_spacing)
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


def summary(options: Options, done: dict[str, Result]) -> None:
    """A table of the cases, the notes on them, and a line with their numbers."""
    cases = {name: read_case(options.store, name) for name, r in done.items() if r.status != "failed"}
    table = cases_table(str(options.store), list(regions_of(options.facts())), ["status"])
    for name, result in sorted(done.items()):
        add_case(table, name, cases.get(name), result.status)
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
