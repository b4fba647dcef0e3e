"""Train a student with a teacher: accelerate launch -m spark_dist.distill --dataset STORE --task organ …"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from data_tools.errors import UserError

from .checkpoint import load_network
from .cli import module_main
from .config import DistillOptions
from .data import ORIENTATIONS, SliceDataset, to_device, visited
from .distillers import build_distiller
from .distillers.base import Distiller
from .entries import entry_bytes
from .job import Job, check_network, describe, evaluate_on_test, open_job, stage_tags, tracked, train_stage
from .teacher_cache import (
    TeacherCache,
    TeacherTargets,
    open_cache,
    probe_targets,
    try_cache,
    weights_hash,
)
from .train import untaught

OPTIONS = DistillOptions


def run(options: DistillOptions) -> None:
    """Train the teacher (or take a trained one), then the student with it; test both."""
    check(options)
    tags = {"method": options.method, "teacher": options.teacher, "student": options.student}
    with open_job(options, tags) as job:
        teacher = given_teacher(job) if options.teacher_checkpoint else trained_teacher(job)

        def taught(student: nn.Module) -> tuple[Distiller, TeacherTargets]:
            return teach(job, student, teacher)

        train_stage(
            job,
            "student",
            options.student,
            options.student_width,
            taught,
            options.epochs,
            method=options.method,
            pretrained=options.student_pretrained,
            teacher=teacher,
        )


def trained_teacher(job: Job) -> Path:
    """The checkpoint of a teacher trained in this job."""
    o = job.options
    epochs = o.teacher_epochs or o.epochs
    return train_stage(job, "teacher", o.teacher, o.teacher_width, untaught, epochs, pretrained=o.teacher_pretrained)


def check(options: DistillOptions) -> None:
    """Find mistakes before the teacher is trained. Raises `UserError`."""
    teacher = check_network(options, options.teacher, options.teacher_width)
    student = check_network(options, options.student, options.student_width)
    with torch.device("meta"):
        build_distiller(options.method, student=student.taps, teacher=teacher.taps, **options.weights)
    pair = (options.teacher, options.teacher_width), (options.student, options.student_width)
    if options.method == "tfkd" and pair[0] != pair[1]:
        raise UserError(
            f"method tfkd has a teacher of the student's own network and width, and --teacher is {options.teacher} "
            f"×{options.teacher_width:g}, --student {options.student} ×{options.student_width:g}"
        )
    if path := options.teacher_checkpoint:
        found = load_network(path)[1]
        for option, key in (("teacher", "network"), ("task", "task")):
            if getattr(options, option) != found[key]:
                raise UserError(
                    f"{path}: holds a {found['network']} for task {found['task']}, "
                    f"but --{option} says {getattr(options, option)}"
                )


def given_teacher(job: Job) -> Path:
    """The teacher from the command line, tested as a run of its own so that it can be compared."""
    path, folder = job.options.teacher_checkpoint, job.folder / "teacher"
    if not (folder / "test_cases.json").exists():
        network, found = load_network(path)
        description = describe(job.options, found["network"], found["width"], found["method"])
        description["seed"] = found["seed"]
        tags = stage_tags("teacher", description, network)
        name = f"teacher {found['network']}"
        with tracked(job.accelerator, job.options, name, folder, tags, job.tracker) as tracker:
            evaluate_on_test(job, "teacher", path, folder, tracker)
    return path


def teach(job: Job, student: nn.Module, checkpoint: Path) -> tuple[Distiller, TeacherTargets]:
    """The distiller between a teacher's checkpoint and a student, and the source of its targets."""
    o = job.options
    teacher, description = load_network(checkpoint)
    distiller = build_distiller(
        o.method, student=student.taps, teacher=teacher.taps, samples=len(job.table), **o.weights
    )
    targets = TeacherTargets(teacher.to(job.accelerator.device), distiller, None, job.accelerator.autocast)
    if o.cache != "off":
        cache = matching_cache(job, teacher, distiller, description)
        weigh(job, targets, cache)
        targets.cache = cache
    return distiller, targets


def matching_cache(job: Job, teacher: nn.Module, distiller: Distiller, facts: dict[str, Any]) -> TeacherCache:
    """The cache of this teacher, method, crop and data."""
    o, crop = job.options, job.options.crop_window
    probe, shapes = probe_targets(distiller, teacher.taps, crop.size)
    description = {
        "teacher": facts["network"],
        "teacher_width": facts["width"],
        "teacher_weights": weights_hash(teacher),
        "method": o.method,
        "method_probe": probe,
        "targets": shapes,
        "crop": crop.size,
        "crop_shift": crop.shift,
        "dataset": o.dataset.stem,
        "slices": job.table.fingerprint,
        "task": o.task,
        "dtype": o.cache_dtype,
        "mixed_precision": job.accelerator.mixed_precision,
    }
    size = len(job.table) * ORIENTATIONS
    settings = {"canonical": o.cache == "canonical", "memory": o.cache_memory * 2**20}
    cache = open_cache(o.cache_folder, description, size, shapes, o.cache_dtype, **settings)
    job.accelerator.wait_for_everyone()
    return cache


def weigh(job: Job, targets: TeacherTargets, cache: TeacherCache) -> None:
    """Try the cache on a few slices; say what it needs, gains and costs; with `--cache auto`, leave it idle where it is
    of no use. Training is the same with an idle cache, which still rounds.
    """
    o, accelerator, device = job.options, job.accelerator, job.accelerator.device
    choices, n = o.orientation_choices, len(job.table)
    keys = np.array([row * ORIENTATIONS + choices[(row + 1) % len(choices)] for row in range(min(4, n))])
    batch = to_device(SliceDataset(job.table, o.crop_window).__getitems__(keys), o.task, device)
    found = try_cache(targets, cache, batch)
    forward, read = accelerator.reduce(torch.tensor([found.forward, found.read], device=device), "mean").tolist()

    planned = np.unique(cache.stored(visited(n, o.seed, o.epochs, choices)))
    missing, seen = int(cache.missing(planned).sum()), n * o.epochs
    needed = missing * entry_bytes(cache.shapes, cache.dtype)
    free = shutil.disk_usage(cache.folder).free
    live, cached = seen * forward, missing * forward + (seen - missing) * read
    job.say(
        f"teacher cache {cache.folder} ({'new' if missing == len(planned) else 'reuses it'}): "
        f"{len(planned) - missing} of {len(planned)} entries there, {needed / 2**20:.0f} MiB to come before "
        f"compression, {free / 2**30:.1f} GiB free; a slice takes {1000 * forward:.1f} ms by the teacher, "
        f"{1000 * read:.1f} ms to read: {cached / 60:.1f} instead of {live / 60:.1f} minutes in {o.epochs} epochs"
    )
    if cache.dtype == "int8" or cache.canonical:
        what = "turned features" if cache.canonical else "int8"
        errors = ", ".join(f"{name} {error:.2%}" for name, error in found.error.items())
        job.say(f"{what}: approximate, by (root mean square, relative) {errors}")
    if needed > free:
        job.say("teacher cache: the disk has no room for all of it")
    if o.cache == "auto":
        cache.idle = cached >= live or needed > free
        chosen = "computes the teacher at every step, which is faster" if cache.idle else "uses the cache"
        job.say(f"--cache auto: {chosen}")


if __name__ == "__main__":
    module_main("spark_dist.distill")
