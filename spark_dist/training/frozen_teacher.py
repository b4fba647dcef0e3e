"""A job's trained teacher: what it says to the student, and the cache of that."""

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_tools.files import write_text
from data_tools.ownership import owned, remove_owned
from data_tools.report import bytes_text
from spark_dist.config import DistillOptions
from spark_dist.data.batches import SliceDataset, to_device
from spark_dist.data.cache import CacheLayout, TeacherCache
from spark_dist.data.number_formats import PREDICTION, entry_bytes
from spark_dist.data.predictions import StoredPredictions
from spark_dist.data.transformations import GEOMETRIC, INTENSITY
from spark_dist.distillers import build_distiller
from spark_dist.distillers.base import Distiller
from spark_dist.networks.base import Taps
from spark_dist.networks.checkpoint import ModelCard
from spark_dist.teacher.fingerprint import open_cache, probe_targets, weights_hash
from spark_dist.teacher.saved import SavedNetworks
from spark_dist.teacher.targets import ForeignTargets, TeacherTargets
from spark_dist.teacher.trial import try_cache

from .job import Job


def distiller_between(job: Job, student: Taps, teacher: Taps) -> Distiller:
    """The job's method for two networks."""
    o = job.options
    return build_distiller(o.method, student=student, teacher=teacher, samples=len(job.transfer_table), **o.weights)


def saved_teacher(options: DistillOptions) -> SavedNetworks:
    """The trained teacher that is given, in its checkpoint or checkpoints."""
    return SavedNetworks(tuple(options.teacher_checkpoint), options.teacher_tta == "flips")


def frozen_teacher(job: Job, saved: SavedNetworks, student: Taps) -> tuple[TeacherTargets, ModelCard]:
    """A saved teacher's targets for a student with these taps, without a cache, and the teacher's card."""
    teacher, card = saved.load()
    distiller = distiller_between(job, student, teacher.taps)
    predicts, device = job.transfer_table.unlabelled > 0, job.accelerator.device
    hard = job.options.hard_labels
    return TeacherTargets(teacher.to(device), distiller, None, job.accelerator.autocast, predicts, hard), card


def foreign_teacher(job: Job, student: Taps) -> ForeignTargets:
    """The targets of `--teacher-predictions` for a student with these taps."""
    o, table = job.options, job.transfer_table
    predictions = StoredPredictions(table, o.teacher_predictions, job.store.task(job.spec.task), o.slice_views)
    return ForeignTargets(distiller_between(job, student, student), predictions, o.hard_labels)


def only_generation(job: Job, folder: Path) -> None:
    """Remove the cache of the round before, whose teacher is no more: the one that job.folder/generation.txt names.

    Nothing else is removed, whatever that file says: it must be a cache beside this one and by its own mark, and
    differ from it in the teacher's weights alone.
    """
    file = job.folder / "generation.txt"
    if job.accelerator.is_main_process:
        said = file.read_text(errors="replace").strip() if file.exists() else ""
        before = folder.with_name(Path(said).name or folder.name)
        write_text(file, folder.name)
        if before != folder and kin(before) == kin(folder) is not None:
            remove_owned(before, "cache")
    job.accelerator.wait_for_everyone()


def kin(folder: Path) -> dict[str, Any] | None:
    """The facts that a cache shares with those of the same job's other rounds; None for anything else."""
    facts = owned(folder, "cache") if not folder.is_symlink() else None
    return facts and {key: value for key, value in facts.items() if key != "teacher_weights"}


def matching_cache(job: Job, targets: TeacherTargets, card: ModelCard) -> TeacherCache:
    """The cache of this teacher, method, crop and data; `card` is the teacher's."""
    o, crop = job.options, job.options.slice_spec.crop
    table, views = job.transfer_table, o.slice_views
    probe, shapes = probe_targets(targets.distiller, targets.teacher.taps, crop.size, job.spec.classes)
    if targets.predicts:
        shapes[PREDICTION] = list(crop.size)
    description = {
        "teacher": card.network,
        "teacher_width": card.width,
        "teacher_weights": weights_hash(targets.teacher),
        "method": o.method,
        "method_probe": probe,
        "targets": shapes,
        "crop": crop.size,
        "crop_shift": crop.shift,
        "context": job.spec.context,
        "dataset": o.dataset.stem,
        "slices": table.fingerprint,
        "views": {**asdict(views), "count": views.count, "of": [*GEOMETRIC, *INTENSITY]}
        if views.drawn
        else sorted(views.orientations),
        "task": job.spec.task,
        "dtype": o.cache_dtype,
        "mixed_precision": job.accelerator.mixed_precision,
    }
    if o.hard_labels:
        description["hard_labels"] = True
    size, canonical = len(table) * views.count, o.cache == "canonical"
    layout = CacheLayout(size, shapes, o.cache_dtype, canonical, views.count, views.orientations)
    cache = open_cache(o.cache_folder, description, layout, o.cache_memory * 2**20)
    job.accelerator.wait_for_everyone()
    return cache


def choose_cache(job: Job, targets: TeacherTargets, cache: TeacherCache, epochs: range) -> None:
    """Try the cache on a few slices; say what it needs, gains and costs; with `--cache auto`, leave it idle where it is
    of no use. Training is the same with an idle cache, which still rounds.
    """
    o, accelerator, device = job.options, job.accelerator, job.accelerator.device
    order, table = o.order(job.transfer_table), job.transfer_table
    keys = np.array([row * cache.layout.views + (row + 1) % cache.layout.views for row in range(min(4, len(table)))])
    dataset = SliceDataset(table, job.spec, views=o.slice_views)
    batch = to_device(dataset.__getitems__(keys), dataset, device)
    found = try_cache(targets, cache, batch)
    forward, read = accelerator.reduce(torch.tensor([found.forward, found.read], device=device), "mean").tolist()

    planned = np.unique(cache.layout.stored(order.visited(epochs)))
    missing = int(cache.missing(planned).sum())
    seen = sum(stream.each_epoch for stream in order.streams) * len(epochs)
    needed = missing * entry_bytes(cache.layout.shapes, cache.layout.dtype)
    free = shutil.disk_usage(cache.folder).free
    live, cached = seen * forward, missing * forward + (seen - missing) * read
    job.say(
        f"teacher cache {cache.folder} ({'new' if missing == len(planned) else 'reuses it'}): "
        f"{len(planned) - missing} of {len(planned)} entries there, {bytes_text(needed)} to come before "
        f"compression, {bytes_text(free)} free; a slice takes {1000 * forward:.1f} ms by the teacher, "
        f"{1000 * read:.1f} ms to read: {cached / 60:.1f} instead of {live / 60:.1f} minutes in {len(epochs)} epochs"
    )
    if cache.layout.dtype == "int8" or cache.layout.canonical:
        what = "turned features" if cache.layout.canonical else "int8"
        errors = ", ".join(f"{name} {error:.2%}" for name, error in found.error.items())
        job.say(f"{what}: approximate, by (root mean square, relative) {errors}")
    if needed > free:
        job.say("teacher cache: the disk has no room for all of it")
    if o.cache == "auto":
        cache.idle = cached >= live or needed > free
        chosen = "computes the teacher at every step, which is faster" if cache.idle else "uses the cache"
        job.say(f"--cache auto: {chosen}")
