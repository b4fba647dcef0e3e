"""Train a student with a teacher: accelerate launch -m spark_dist.distill --dataset STORE --task organ …"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from data_tools.errors import UserError
from data_tools.report import bytes_text

from .checkpoint import load_network, write_text
from .cli import module_main
from .config import DistillOptions
from .data import ORIENTATIONS, SliceDataset, to_device, visited
from .distillation import Distillation
from .distillers import build_distiller
from .distillers.base import Distiller
from .entries import entry_bytes
from .job import (
    Beside,
    Job,
    Teaching,
    build,
    check_network,
    describe,
    evaluate_on_test,
    open_job,
    stage_tags,
    tracked,
    train_stage,
)
from .networks.base import Taps
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
        if options.together == "live":
            train_together(job)
        else:
            train_in_turns(job)


def train_in_turns(job: Job) -> None:
    """Round by round, a stretch of the teacher's epochs and then as large a part of the student's, which learns from
    the teacher that was best on val until then; with one round, the teacher and then the student.

    Several rounds are route-constrained distillation (Jin et al., ICCV 2019, arXiv 1904.09149).
    """
    o = job.options
    teacher_epochs = o.teacher_epochs or o.epochs
    for part in range(1, o.rounds + 1):
        first, last = o.epochs * (part - 1) // o.rounds, o.epochs * part // o.rounds
        if o.teacher_checkpoint:
            teacher = given_teacher(job)
        else:
            until = teacher_epochs * part // o.rounds
            weights = {"pretrained": o.teacher_pretrained}
            teacher = train_stage(
                job, "teacher", o.teacher, o.teacher_width, untaught, teacher_epochs, until=until, **weights
            )

        def taught(student: nn.Module, teacher=teacher, epochs=range(first, last)):
            return teach(job, student, teacher, epochs)

        train_student(job, taught, teacher=teacher, until=last)


def train_together(job: Job) -> None:
    """Teacher and student at every step, the teacher on the truth alone."""
    o = job.options
    teacher = build(job, o.teacher, o.teacher_width, o.teacher_pretrained)
    folder, description = job.folder / "teacher", describe(o, o.teacher, o.teacher_width, "none")
    tags = stage_tags("teacher", description, teacher)
    with tracked(job.accelerator, o, f"teacher {o.teacher}", folder, tags, job.tracker) as tracker:

        def taught(student: nn.Module) -> tuple[Distillation, TeacherTargets]:
            distiller = distiller_between(job, student.taps, teacher.taps)
            return Distillation(student, distiller, teacher), TeacherTargets(None, distiller, None, None)

        best = folder / "best.safetensors"
        train_student(job, taught, teacher=best, beside=Beside(teacher, folder, description, tracker))
        if not (folder / "test_cases.json").exists():
            tracker.artifact(best)
            evaluate_on_test(job, "teacher", best, folder, tracker)


def train_student(job: Job, taught: Teaching, **how: Any) -> Path:
    """The student's stage, or a part of it."""
    o = job.options
    how |= {"method": o.method, "pretrained": o.student_pretrained}
    return train_stage(job, "student", o.student, o.student_width, taught, o.epochs, **how)


def check(options: DistillOptions) -> None:
    """Find mistakes before the teacher is trained. Raises `UserError`."""
    if options.teacher_checkpoint and (options.rounds > 1 or options.together == "live"):
        raise UserError(
            "--teacher-checkpoint is of a teacher that is trained already; leave out --rounds and --together"
        )
    if options.together == "live" and (options.rounds > 1 or options.teacher_epochs):
        raise UserError(
            "--together live trains both networks at every step; leave out --rounds, and set --teacher-epochs 0 if a "
            "recipe sets it"
        )
    if not 1 <= options.rounds <= min(options.epochs, options.teacher_epochs or options.epochs):
        raise UserError(
            f"--rounds {options.rounds} must be at least 1, and at most the number of epochs of each network"
        )
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


def teach(job: Job, student: nn.Module, checkpoint: Path, epochs: range) -> tuple[Distillation, TeacherTargets]:
    """A student with the distiller between it and a teacher's checkpoint, and the source of its targets in `epochs`."""
    o = job.options
    targets, description = frozen_teacher(job, checkpoint, student.taps)
    if o.cache != "off":
        cache = matching_cache(job, targets, description)
        weigh(job, targets, cache, epochs)
        targets.cache = cache
        if o.rounds > 1:
            only_generation(job, cache.folder)
    return Distillation(student, targets.distiller), targets


def distiller_between(job: Job, student: Taps, teacher: Taps) -> Distiller:
    """The job's method for two networks."""
    o = job.options
    return build_distiller(o.method, student=student, teacher=teacher, samples=len(job.table), **o.weights)


def frozen_teacher(job: Job, checkpoint: Path, student: Taps) -> tuple[TeacherTargets, dict[str, Any]]:
    """What a saved teacher says to a student with these taps, without a cache, and the teacher's description."""
    teacher, description = load_network(checkpoint)
    distiller = distiller_between(job, student, teacher.taps)
    return TeacherTargets(teacher.to(job.accelerator.device), distiller, None, job.accelerator.autocast), description


def only_generation(job: Job, folder: Path) -> None:
    """Remove the cache of the round before, whose teacher is no more."""
    file = job.folder / "generation.txt"
    if job.accelerator.is_main_process:
        before = Path(file.read_text()) if file.exists() else folder
        write_text(file, str(folder))
        if before != folder:
            shutil.rmtree(before, ignore_errors=True)
    job.accelerator.wait_for_everyone()


def matching_cache(job: Job, targets: TeacherTargets, facts: dict[str, Any]) -> TeacherCache:
    """The cache of this teacher, method, crop and data; `facts` describe the teacher."""
    o, crop = job.options, job.options.crop_window
    probe, shapes = probe_targets(targets.distiller, targets.teacher.taps, crop.size)
    description = {
        "teacher": facts["network"],
        "teacher_width": facts["width"],
        "teacher_weights": weights_hash(targets.teacher),
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


def weigh(job: Job, targets: TeacherTargets, cache: TeacherCache, epochs: range) -> None:
    """Try the cache on a few slices; say what it needs, gains and costs; with `--cache auto`, leave it idle where it is
    of no use. Training is the same with an idle cache, which still rounds.
    """
    o, accelerator, device = job.options, job.accelerator, job.accelerator.device
    choices, n = o.orientation_choices, len(job.table)
    keys = np.array([row * ORIENTATIONS + choices[(row + 1) % len(choices)] for row in range(min(4, n))])
    batch = to_device(SliceDataset(job.table, o.crop_window).__getitems__(keys), o.task, device)
    found = try_cache(targets, cache, batch)
    forward, read = accelerator.reduce(torch.tensor([found.forward, found.read], device=device), "mean").tolist()

    planned = np.unique(cache.stored(visited(n, o.seed, epochs, choices)))
    missing, seen = int(cache.missing(planned).sum()), n * len(epochs)
    needed = missing * entry_bytes(cache.shapes, cache.dtype)
    free = shutil.disk_usage(cache.folder).free
    live, cached = seen * forward, missing * forward + (seen - missing) * read
    job.say(
        f"teacher cache {cache.folder} ({'new' if missing == len(planned) else 'reuses it'}): "
        f"{len(planned) - missing} of {len(planned)} entries there, {bytes_text(needed)} to come before "
        f"compression, {bytes_text(free)} free; a slice takes {1000 * forward:.1f} ms by the teacher, "
        f"{1000 * read:.1f} ms to read: {cached / 60:.1f} instead of {live / 60:.1f} minutes in {len(epochs)} epochs"
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
