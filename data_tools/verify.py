"""Is every byte of a store as it was written, and every voxel that of its source?"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .arrays import SHARD_SLICES
from .errors import Conflict, UserError, say_error
from .identity import attributes_of, gone, identity_of, is_known, known_cases
from .labels import regions_of
from .layouts import Source, find_sources
from .location import exists, finished, located, open_array
from .options import Options, options_of
from .pool import results
from .predictions import FORMAT
from .prepare import Result, convert, prepare_case, source_hashes
from .progress import console, progress
from .report import add_case, cases_table
from .sealed import is_sealed, read_sealed
from .store import Case, read_case, root_attributes

AGAIN = "prepare it again with --replace, if that is what it shall be"
CONFLICTS = ("changed", "foreign")
"""Findings of a case that is sound, and made of other files than it should be."""


class Job(NamedTuple):
    """A case to verify, and its source if there is one to compare it with."""

    case: str
    source: Source | None


class Repair(NamedTuple):
    """How far verification mends a store."""

    damaged: bool
    """Metadata are restored from their copies, and damaged and missing cases prepared again."""
    replace: bool
    """Sound cases too, if they are other files' or another store's."""


def verify(store: Path, root: Path | None, patterns: Sequence[str] | None, repair: Repair, workers: int) -> int:
    """Verify the store's own metadata, its splits, all cases and the predictions beside them, print a table, and return
    how many are damaged.

    With `root`, the folder that the cases came from, every voxel is compared with the NIfTI files; `patterns` are
    those of layout pairs if the files have other names now. What `repair` healed is not counted; predictions are not
    mended, as the folder that they came from is not known. Raises `UserError` if `store` is no store, or there is
    something to repair without a `root`.
    """
    if repair.damaged and root is None:
        raise UserError(f"{store}: --repair prepares damaged cases again and needs --source, the folder they came from")
    if repair.replace and not repair.damaged:
        raise UserError("--replace says what --repair may replace; give both")
    groups = check_groups(store, repair.damaged)
    for name, problem in groups.items():
        say_error(f"{name}: {problem}")
    if identity_of(store) is None and not groups:
        say_error(f"{store}: made by an earlier version; spark-data prepare gives it an identity", "note")
    jobs, options = find_jobs(store, root, patterns)
    if options:
        options = replace(options, replace=repair.replace)
    done: dict[str, Result] = {}
    with progress(len(jobs), "verify") as bar:
        for result in results(partial(verify_case, store, options), jobs, workers, lost):
            if repair.damaged and result.status not in ("sound", *(() if repair.replace else CONFLICTS)):
                result = repaired(store, options, next(job for job in jobs if job.case == result.case), result)
            done[result.case] = result
            if result.status != "sound":
                say_error(f"{result.case}: {result.note}", "note" if result.status == "repaired" else "error")
            bar.advance(bar.task_ids[0])
    return summary(store, done, groups) + verify_predictions(store, workers)


def check_groups(path: Path, repair: bool) -> dict[str, str]:
    """Faults in the metadata of a store and of its splits, by their files. All metadata are there twice.

    With `repair`, what is damaged is restored from its other copy, and said to be restored. Raises `UserError` if there
    is no store at all.
    """
    path = located(path)
    if not exists(path / "cases"):
        root_attributes(path)
    alike = [(path, path / "cases", path / "splits")]
    alike += [(folder, folder / "copy") for folder in sorted(path.glob("splits/*")) if folder.is_dir()]
    problems = {}
    for folders in alike:
        sound = [folder for folder in folders if is_sealed(folder)]
        identities = Counter(filter(None, (read_sealed(folder).get("identity") for folder in sound)))
        foreign = []
        if len(identities) > 1:
            # Of three copies, the one that differs was copied from another store.
            (ours, count), *_ = identities.most_common()
            foreign = [folder for folder in sound if read_sealed(folder).get("identity") != ours or count == 1]
        sound = [folder for folder in sound if folder not in foreign]
        for folder in (folder for folder in folders if folder not in sound):
            file, problem = folder / "zarr.json", "another store's" if folder in foreign else "damaged"
            problems[str(file)] = problem if sound else f"{problem}, and so are its copies; make a new one"
            if repair and sound:
                file.parent.mkdir(exist_ok=True)
                file.write_bytes((sound[0] / "zarr.json").read_bytes())
                problems[str(file)] = f"{problem}, and restored from its copy"
    return problems


def find_jobs(store: Path, root: Path | None, patterns: Sequence[str] | None) -> tuple[list[Job], Options | None]:
    """All cases of the store and, with `root`, the labelled ones of the data set that the store lacks."""
    names = {folder.name for folder in store.glob("cases/*") if folder.is_dir()} | set(known_cases(store))
    if root is None:
        return [Job(name, None) for name in sorted(names)], None
    options = options_of(store)
    found = find_sources(root, options.layout, patterns or options.patterns, options.channel, unlabelled=True)
    sources = {source.case: source for source in found}
    names |= {source.case for source in found if source.label}
    return [Job(name, sources.get(name)) for name in sorted(names)], options


def lost(job: Job, reason: str) -> Result:
    """The result of a case whose process died."""
    return Result(job.case, "damaged", f"not verified, {reason}")


def verify_case(store: Path, options: Options | None, job: Job) -> Result:
    """Whether a case is sound, damaged, missing, or made of files that changed since."""
    try:
        case = read_case(store, job.case)
        if case is None and is_known(store, job.case) and not (store / "cases" / job.case).exists():
            return Result(job.case, "missing", gone(store, job.case))
        if case is None:
            return Result(job.case, "missing", "not in the store, or not complete; prepare it")
        if problems := list(damages(store, case)):
            return Result(job.case, "damaged", "; ".join(problems))
        return compare(store, options, case, job.source) if options else Result(job.case, "sound")
    except Conflict as error:
        return Result(job.case, "foreign", str(error))
    except (UserError, OSError) as error:
        return Result(job.case, "damaged", str(error))


def damages(store: Path, case: Case) -> Iterator[str]:
    """Damage to the voxels of a case: slices that can't be read, and labels that were not counted so."""
    for kind in ("image", "label") if case.labelled else ("image",):
        array = open_array(store / "cases" / case.name / kind)
        if tuple(array.shape) != case.shape:
            yield f"{kind} of shape {array.shape}, not {case.shape}"
            continue
        bad, miscounted = [], []
        for z, voxels in slices_of(array):
            if voxels is None:
                bad.append(z)
            elif kind == "label" and counts(voxels, case.label_counts.shape[1]) != case.label_counts[z].tolist():
                miscounted.append(z)
        if bad:
            yield f"{kind} slice {ranges(bad)} can't be read"
        if miscounted:
            yield f"label counts of slice {ranges(miscounted)} are wrong"


def verify_predictions(store: Path, workers: int) -> int:
    """Verify the predictions of foreign models in a store, print a line on each model's, and return how many are
    damaged."""
    folders = [folder for folder in sorted(store.glob("predictions/*/*")) if not folder.name.startswith(".")]
    names = [f"{folder.parent.name}/{folder.name}" for folder in folders]
    tally: dict[str, Counter] = {}
    for result in results(partial(verify_prediction, store), names, workers, lost_prediction):
        tally.setdefault(result.case.partition("/")[0], Counter())[result.status] += 1
        if result.note:
            say_error(f"{store / 'predictions' / result.case}: {result.note}")
    for name, counted in sorted(tally.items()):
        found = ", ".join(f"{counted[status]} {status}" for status in ("sound", "damaged") if counted[status])
        console.print(f"predictions '{name}': {found}")
    return sum(counted["damaged"] for counted in tally.values())


def lost_prediction(name: str, reason: str) -> Result:
    """The result of a prediction whose process died."""
    return Result(name, "damaged", f"not verified, {reason}")


def verify_prediction(store: Path, name: str) -> Result:
    """Whether a prediction, `model/case`, is sound, or damaged, or of a case that is not there or of another image."""
    folder, case = store / "predictions" / name, None
    with suppress(UserError):  # what is wrong with the case itself is said of that
        case = read_case(store, folder.name)
    try:
        facts = read_sealed(folder)
        if facts.get("format") != FORMAT:
            problem = "is no prediction"
        elif case is None:
            problem = "is of a case that the store lacks"
        elif facts.get("image_sha256") != case.source.get("image_sha256"):
            problem = "was made for another image"
        else:
            problem = "; ".join(prediction_damages(folder, case, len(attributes_of(store)["labels"])))
    except (UserError, OSError) as error:
        problem = str(error)
    advice = "move it away, and run spark-data predictions again"
    return Result(name, "damaged", f"{problem}; {advice}") if problem else Result(name, "sound")


def prediction_damages(folder: Path, case: Case, labels: int) -> Iterator[str]:
    """Damage to the voxels of a case's prediction."""
    kind = "label" if (folder / "label").is_dir() else "probabilities"
    array = open_array(folder / kind)
    depth, *plane = case.shape
    wanted = (depth, *plane) if kind == "label" else (depth, labels, *plane)
    if tuple(array.shape) != wanted:
        yield f"{kind} of shape {tuple(array.shape)}, not {wanted}"
    elif bad := [z for z, voxels in slices_of(array) if voxels is None]:
        yield f"{kind} slice {ranges(bad)} can't be read"


def slices_of(array) -> Iterator[tuple[int, np.ndarray | None]]:
    """All slices of a volume with their voxels, or None where they can't be read."""
    depth = array.shape[0]
    # The good slices of a damaged shard are read one by one.
    return chain.from_iterable(shard(array, z, min(z + SHARD_SLICES, depth)) for z in range(0, depth, SHARD_SLICES))


def shard(array, start: int, stop: int) -> Iterator[tuple[int, np.ndarray | None]]:
    """Slices with their voxels, or None where they can't be read."""
    try:
        block = finished(array[start:stop].read(), "")
    except UserError:
        block = None
    for z in range(start, stop):
        try:
            yield z, finished(array[z].read(), "") if block is None else block[z - start]
        except UserError:
            yield z, None


def counts(label: np.ndarray, values: int) -> list[int]:
    """The voxels of each value below `values` in a slice; a longer list if there are others."""
    return np.bincount(label.ravel(), minlength=values).tolist()


def compare(store: Path, options: Options, case: Case, source: Source | None) -> Result:
    """Whether a case is what its files would become now."""
    if source is None:
        return Result(case.name, "no source", "its files are not in the source folder")
    if not case.labelled:
        source = replace(source, label=None)
    hashes = source_hashes(source)
    changed = [kind for kind in ("image", "label") if hashes.get(f"{kind}_sha256") != case.source.get(f"{kind}_sha256")]
    if changed:
        return Result(case.name, "changed", f"its source ({', '.join(changed)}) is another file now; {AGAIN}")
    image, label, attributes, _ = convert(source, with_spacing(options, case))
    for key, value in (("affine", case.affine), ("spacing", case.spacing), ("window", case.window)):
        if not np.array_equal(attributes[key], value):
            return Result(case.name, "damaged", f"its {key} is not that of its source")
    for kind, voxels in (("image", image), ("label", label)):
        if voxels is None:
            continue
        array = open_array(store / "cases" / case.name / kind)
        if voxels.shape != case.shape or voxels.dtype != array.dtype.numpy_dtype:
            return Result(case.name, "damaged", f"its {kind} has not the shape and type of its source")
        for start in range(0, len(voxels), SHARD_SLICES):
            part = slice(start, min(start + SHARD_SLICES, len(voxels)))
            stored = finished(array[part].read(), f"{kind} slice {start}")
            if different := np.flatnonzero((stored != voxels[part]).any(axis=(1, 2))).tolist():
                found = ranges([start + z for z in different])
                return Result(case.name, "damaged", f"{kind} slice {found} differs from its source")
    return Result(case.name, "sound")


def with_spacing(options: Options, case: Case) -> Options:
    """The options with the spacing that was given for a case whose file has none."""
    source = case.source["image"]
    if not source["lacks_spacing"]:
        return options
    return replace(options, spacing=tuple(np.linalg.norm(np.array(source["affine"])[:3, :3], axis=0)))


def repaired(store: Path, options: Options, job: Job, before: Result) -> Result:
    """Prepare a case again, and verify it. A case without a source stays as it is."""
    if job.source is None:
        return before._replace(note=f"{before.note}; it can't be prepared again, as its files are not in the source")
    try:
        case = read_case(store, job.case)
        options = with_spacing(options, case) if case else options
        if case and not case.labelled:
            job = job._replace(source=replace(job.source, label=None))
    except UserError:
        pass
    again = prepare_case(options, job.source, force=True)
    if again.status == "failed":
        return before._replace(note=f"{before.note}; preparing it again failed: {again.note}")
    after = verify_case(store, options, job)
    return after if after.status != "sound" else Result(job.case, "repaired", f"{before.note}; prepared again")


def ranges(numbers: Sequence[int]) -> str:
    """`3, 5–9` for sorted numbers."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    shown = [f"{low}–{high}" if high > low else str(low) for low, high in runs[:8]]
    return ", ".join(shown) + (" …" if len(runs) > 8 else "")


def summary(store: Path, done: dict[str, Result], groups: dict[str, str]) -> int:
    """A table of the cases and a line with their numbers. Returns how many are not sound."""
    table = cases_table(str(store), list(regions_of(attributes_of(store))), ["status"])
    for name, result in sorted(done.items()):
        try:
            case = read_case(store, name)
        except UserError:
            case = None
        add_case(table, name, case, result.status)
    console.print(table)
    tally: dict[str, int] = {"sound": 0}
    for result in done.values():
        tally[result.status] = tally.get(result.status, 0) + 1
    console.print(f"{len(done)} cases: " + ", ".join(f"{number} {status}" for status, number in tally.items()))
    unsound = sum(number for status, number in tally.items() if status not in ("sound", "repaired"))
    return unsound + sum("restored" not in problem for problem in groups.values())
