"""Teacher caches: fill one ahead of training, list, check, remove: spark-dist cache --list

Filling takes the options of the distill job that the cache is for, and any number of processes:
accelerate launch --config-file accelerate_config.yaml -m spark_dist.cache --config RECIPE --teacher-checkpoint FILE
"""

if __name__ == "__main__":
    from spark_dist.cli import module_main

    module_main("spark_dist.cache")

import time
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch.utils.data import DataLoader

from data_tools.errors import UserError
from data_tools.files import unfinished
from data_tools.location import first_line, open_array
from data_tools.ownership import owned, remove_owned
from data_tools.progress import console, progress_bar
from data_tools.report import folder_size
from data_tools.store import open_store
from data_tools.workers import FORGOTTEN
from spark_dist.data.batches import SliceDataset, to_device
from spark_dist.data.cache import SEGMENT
from spark_dist.data.loader import Prefetcher
from spark_dist.data.number_formats import ROUNDING, as_tensor, decode, encode
from spark_dist.data.shared_memory import pack
from spark_dist.teacher.targets import TeacherTargets
from spark_dist.teacher.trial import TRIAL
from spark_dist.training.checks import check, check_network, check_teacher_task
from spark_dist.training.distributed import make_accelerator, shut_down
from spark_dist.training.frozen_teacher import frozen_teacher, matching_cache, saved_teacher
from spark_dist.training.job import Job
from spark_dist.training.tracking import null_tracker

from .config import DistillOptions
from .options import Natural

FLUSH_SECONDS = 60
"""How much work of each process is lost at most when it is killed."""


@dataclass(kw_only=True)
class CacheOptions(DistillOptions):
    """Fill a teacher cache ahead of training, or list, check and remove caches."""

    dataset: Path | None = None
    """Slice store made by spark-data prepare."""
    task: str = "organ"
    """What is segmented: a region of the store, several, or all."""
    list: bool = False
    """Show the caches in the cache folder: what each belongs to, its size and age."""
    prune: Natural | None = None
    """Remove the caches that no job has used for so many days (0: all), and what killed jobs left."""
    verify: Natural = 0
    """Compute so many random entries again with the teacher, and compare."""


OPTIONS = CacheOptions


def run(options: CacheOptions) -> None:
    """List, prune, verify or fill caches, as the options ask."""
    if options.prune is not None:
        prune(options.cache_folder, options.prune)
    if options.list:
        console.print(listing(options.cache_folder))
    if options.list or options.prune is not None:
        return
    for name in ("dataset", "teacher_checkpoint"):
        if not getattr(options, name):
            raise UserError(f"--{name} says what the cache is for; give the options of the distill job, or --list")
    check(options)
    store = open_store(options.dataset)
    check_teacher_task(store, options)
    accelerator = make_accelerator()
    job = Job(options, accelerator, store, null_tracker())
    targets = targets_of(job)
    if options.verify:
        verify(job, targets, options.verify)
    else:
        fill(job, targets)
    shut_down(accelerator)


def targets_of(job: Job) -> TeacherTargets:
    """The teacher of the options, and its cache."""
    o = job.options
    student = check_network(o, o.student, o.student_width)
    targets, card = frozen_teacher(job, saved_teacher(o), student.taps)
    targets.cache = matching_cache(job, targets, card)
    return targets


def fill(job: Job, targets: TeacherTargets) -> None:
    """Compute what is missing of all that the job's epochs will ask for.

    Batches are the same for any number of processes and after any interruption, and are dealt out to the processes,
    so that the entries are the same to the byte.
    """
    o, cache, accelerator = job.options, targets.cache, job.accelerator
    keys = cache.layout.stored(o.order(job.transfer_table).visited(range(o.epochs_of(job.transfer_table))))
    keys = keys[np.sort(np.unique(keys, return_index=True)[1])]
    batches = [keys[start : start + o.batch_size] for start in range(0, len(keys), o.batch_size)]
    mine = [b.tolist() for b in batches if cache.missing(b).any()][
        accelerator.process_index :: accelerator.num_processes
    ]
    accelerator.wait_for_everyone()
    job.say(f"teacher cache {cache.folder}: {int((~cache.missing(keys)).sum())} of {len(keys)} entries there")
    dataset = SliceDataset(job.transfer_table, job.spec, views=o.slice_views)
    loader = Prefetcher(DataLoader(dataset, batch_sampler=mine, collate_fn=pack))
    flushed = time.monotonic()
    with progress_bar("teacher cache", len(mine), 0, accelerator.is_main_process) as advance:
        for raw in loader:
            targets(to_device(raw, dataset, accelerator.device))
            if time.monotonic() - flushed > FLUSH_SECONDS:
                targets.flush()
                flushed = time.monotonic()
            if cache.full:
                break
            advance()
    targets.flush()
    accelerator.wait_for_everyone()
    left = int(cache.missing(keys).sum())
    job.say(f"teacher cache {cache.folder}: {len(keys) - left} of {len(keys)} entries, {folder_size(cache.folder)}")
    if left:
        raise UserError(
            f"{cache.folder}: {left} entries could not be written; make room and run the same command again"
        )


def verify(job: Job, targets: TeacherTargets, count: int) -> None:
    """Compare `count` random entries with the teacher, and write damaged ones anew.

    Raises `UserError` if any differs by more than rounding: two steps of the number format, of the largest value.
    """
    o, cache, accelerator = job.options, targets.cache, job.accelerator
    keys = o.order(job.transfer_table).visited(range(o.epochs_of(job.transfer_table)))
    there = np.unique(cache.layout.stored(keys)[~cache.missing(keys)])
    if not len(there):
        raise UserError(f"{cache.folder}: holds no entry yet; fill it with the same command without --verify")
    chosen = np.random.default_rng().permutation(there)[:count]
    allowed = max(4 * ROUNDING[cache.layout.dtype], 1e-4)
    dataset = SliceDataset(job.transfer_table, job.spec, views=o.slice_views)
    worst, wrong, damaged = 0.0, 0, 0
    for key in chosen[accelerator.process_index :: accelerator.num_processes]:
        batch = to_device(dataset.__getitems__([int(key)]), dataset, accelerator.device)
        stored = cache.read(batch.keys)
        again = targets.compute(batch.image, batch.mask, batch.known)
        if stored.arrays is None:
            damaged += 1
            cache.add(batch.keys, again)
            continue
        rounded = decode({name: as_tensor(x) for name, x in encode(again, cache.layout.dtype).items()})
        kept = decode(stored.arrays)
        error = max(float((kept[n] - x).abs().max() / x.abs().max().clamp(min=1e-6)) for n, x in rounded.items())
        worst, wrong = max(worst, error), wrong + (error > allowed)
    cache.flush()
    counts = accelerator.reduce(torch.tensor([wrong, damaged], device=accelerator.device)).tolist()
    worst = float(accelerator.gather(torch.tensor([worst], device=accelerator.device)).max())
    text = f"{len(chosen)} entries computed again: {counts[0]} differ, {counts[1]} damaged and written anew"
    job.say(f"teacher cache {cache.folder}: {text}; the largest difference is {worst:.1e} of the largest value")
    if counts[0]:
        raise UserError(f"{cache.folder}: {text}; remove this cache, it is not this teacher's")


def listing(root: Path) -> Table:
    """A table of the caches in a folder."""
    table = Table(title=f"teacher caches in {root}")
    for name in ("cache", "teacher", "method", "dataset", "crop", "format", "entries", "size", "filled", "used"):
        table.add_column(name, justify="right" if name in ("entries", "size") else "left", no_wrap=name == "cache")
    for folder, about in caches(root).items():
        teacher = (
            f"{about.get('teacher', '?')} ×{about.get('teacher_width', 0):g} {about.get('teacher_weights', '')[:6]}"
        )
        data = f"{about.get('dataset', '?')} {about.get('task', '')}"
        crop = "×".join(map(str, about.get("crop", ["?"])))
        facts = (folder.name, teacher, about.get("method", "?"), data, crop, about.get("dtype", "?"))
        ages = (age(folder / "segments"), age(folder / "description.json"))
        table.add_row(*map(str, facts), f"{count(folder):,}", folder_size(folder), *ages)
    return table


def prune(root: Path, days: float) -> None:
    """Remove the caches that were not used for `days`, and what killed processes left half-written in the others."""
    for folder in caches(root):
        if time.time() - (folder / "description.json").stat().st_mtime >= 86400 * days:
            size = folder_size(folder)
            try:
                remove_owned(folder, "cache")
            except UserError as error:
                console.print(str(error))
            else:
                console.print(f"removed {folder} ({size})")
            continue
        left = [*unfinished(folder, "description.json"), *folder.glob(f"segments/{SEGMENT}.tmp")]
        left += folder.glob(f"{TRIAL}.tmp")
        old = [path for path in left if time.time() - path.lstat().st_mtime > FORGOTTEN]
        remove_owned(folder, "cache", [escape(str(path.relative_to(folder))) for path in old])


def caches(root: Path) -> dict[Path, dict[str, Any]]:
    """The caches' folders with their descriptions; a line names folders like them that bear no cache's mark.

    Raises `UserError` if there is no such folder.
    """
    if not Path(root).is_dir():
        raise UserError(f"{root}: no such folder; give the --cache-folder of the distill job")
    found = {folder: owned(folder, "cache") for folder in sorted(Path(root).iterdir())}
    for folder, about in found.items():
        if about is None and (folder / "segments").is_dir():
            console.print(f"{folder}: left alone, its description.json is not that of a cache of this name")
    return {folder: about for folder, about in found.items() if about is not None}


def count(folder: Path) -> int:
    """How many entries a cache holds, by its segments' keys."""
    keys = [np.zeros(0, np.int64)]
    for path in (folder / "segments").glob("*/keys"):
        try:
            keys.append(open_array(path).read().result())
        except (ValueError, OSError, UserError) as error:
            console.print(f"{path}: damaged ({first_line(error)})")
    return len(np.unique(np.concatenate(keys)))


def age(path: Path) -> str:
    """How long ago a file or folder changed."""
    if not path.exists():
        return "?"
    minutes = (time.time() - path.stat().st_mtime) / 60
    return (
        f"{minutes:.0f} min ago"
        if minutes < 90
        else f"{minutes / 60:.0f} h ago"
        if minutes < 2880
        else f"{minutes / 1440:.0f} d ago"
    )
