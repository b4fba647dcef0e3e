"""Train a student with a teacher: accelerate launch -m spark_dist.distill --dataset STORE --task organ …"""

if __name__ == "__main__":
    from spark_dist.cli import module_main

    module_main("spark_dist.distill")

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from spark_dist.networks.checkpoint import load_network
from spark_dist.teacher.targets import TeacherTargets
from spark_dist.training.checks import check, check_rounds
from spark_dist.training.distillation import Distillation
from spark_dist.training.frozen_teacher import distiller_between, frozen_teacher, matching_cache, only_generation, weigh
from spark_dist.training.job import Job, open_job, tracked
from spark_dist.training.live import Beside
from spark_dist.training.stage import Teaching, build, model_card, stage_tags, train_stage, untaught
from spark_dist.training.validation import evaluate_on_test

from .config import DistillOptions

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
    epochs, teacher_epochs = o.epochs_of(job.transfer_table), o.teacher_epochs_of(job.table)
    check_rounds(o.rounds, epochs, teacher_epochs)
    for part in range(1, o.rounds + 1):
        first, last = epochs * (part - 1) // o.rounds, epochs * part // o.rounds
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
    folder, card = job.folder / "teacher", model_card(job, o.teacher, o.teacher_width, "none")
    tags = stage_tags("teacher", card, teacher)
    with tracked(job.accelerator, o, f"teacher {o.teacher}", folder, tags, job.tracker) as tracker:

        def taught(student: nn.Module) -> tuple[Distillation, TeacherTargets]:
            distiller = distiller_between(job, student.taps, teacher.taps)
            return Distillation(student, distiller, teacher), TeacherTargets(None, distiller, None, None)

        best = folder / "best.safetensors"
        train_student(job, taught, teacher=best, beside=Beside(teacher, folder, card, tracker))
        if not (folder / "test_cases.json").exists():
            tracker.artifact(best)
            evaluate_on_test(job, "teacher", best, folder, tracker)


def train_student(job: Job, taught: Teaching, **how: Any) -> Path:
    """The student's stage, or a part of it."""
    o = job.options
    how |= {"method": o.method, "pretrained": o.student_pretrained}
    epochs = o.epochs_of(job.transfer_table)
    return train_stage(job, "student", o.student, o.student_width, taught, epochs, **how)


def given_teacher(job: Job) -> Path:
    """The teacher from the command line, tested as a run of its own so that it can be compared."""
    path, folder = job.options.teacher_checkpoint, job.folder / "teacher"
    if not (folder / "test_cases.json").exists():
        network, found = load_network(path)
        card = replace(model_card(job, found.network, found.width, found.method), seed=found.seed)
        tags = stage_tags("teacher", card, network)
        name = f"teacher {found.network}"
        with tracked(job.accelerator, job.options, name, folder, tags, job.tracker) as tracker:
            evaluate_on_test(job, "teacher", path, folder, tracker)
    return path


def teach(job: Job, student: nn.Module, checkpoint: Path, epochs: range) -> tuple[Distillation, TeacherTargets]:
    """A student with the distiller between it and a teacher's checkpoint, and the source of its targets in `epochs`."""
    o = job.options
    targets, card = frozen_teacher(job, checkpoint, student.taps)
    if o.cache != "off" and o.views >= 0:
        cache = matching_cache(job, targets, card)
        weigh(job, targets, cache, epochs)
        targets.cache = cache
        if o.rounds > 1:
            only_generation(job, cache.folder)
    return Distillation(student, targets.distiller), targets
