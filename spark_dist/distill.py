"""Train a student with a teacher: accelerate launch -m spark_dist.distill --dataset STORE --task organ …"""

if __name__ == "__main__":
    from spark_dist.cli import module_main

    module_main("spark_dist.distill")

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from torch import nn

from data_tools.errors import UserError
from spark_dist.data.predictions import kind_of_predictions
from spark_dist.teacher.saved import WITH_FLIPS, SavedNetworks
from spark_dist.teacher.targets import TeacherTargets
from spark_dist.training.checks import check
from spark_dist.training.distillation import Distillation, distillation_factor
from spark_dist.training.distributed import by_main
from spark_dist.training.frozen_teacher import (
    choose_cache,
    distiller_between,
    foreign_teacher,
    frozen_teacher,
    matching_cache,
    only_generation,
    saved_teacher,
)
from spark_dist.training.job import Job, is_done, open_job
from spark_dist.training.live import LiveTeacher
from spark_dist.training.loop import Teaching
from spark_dist.training.outcome import log_outcome
from spark_dist.training.stage import Stage, build, model_card, stage_tracker, train_stage, without_teacher
from spark_dist.training.validation import evaluate_foreign_on_test, evaluate_on_test

from .config import DistillOptions

OPTIONS = DistillOptions


def run(options: DistillOptions) -> None:
    """Train the teacher (or take a trained one), then the student with it; test both."""
    check(options)
    tags = {"method": options.method, "teacher": name_of_teacher(options), "student": options.student}
    with open_job(options, tags) as job:
        if options.together == "live":
            train_together(job)
        else:
            train_in_turns(job)
        log_outcome(job)


def train_in_turns(job: Job) -> None:
    """Round by round, a stretch of the teacher's epochs and then as large a part of the student's, which learns from
    the teacher that was best on val until then; with one round, the teacher and then the student.

    Several rounds are route-constrained distillation (Jin et al., ICCV 2019, arXiv 1904.09149).
    """
    o, teacher, student = job.options, teacher_stage(job), student_stage(job)
    if o.teacher_predictions:
        test_foreign_teacher(job)
        train_stage(job, student, partial(with_predictions, job))
        return
    for part in range(1, o.rounds + 1):
        if o.teacher_checkpoint:
            source = given_teacher(job)
        else:
            best = train_stage(job, teacher, without_teacher, stop_epoch=teacher.epochs * part // o.rounds)
            source = SavedNetworks((best,), o.teacher_tta == "flips")
        first, last = (student.epochs * n // o.rounds for n in (part - 1, part))
        teach = partial(with_teacher, job, source, range(first, last))
        train_stage(job, student, teach, stop_epoch=last, teacher=source)


def train_together(job: Job) -> None:
    """Teacher and student at every step, the teacher on the ground truth alone."""
    stage, folder = teacher_stage(job), job.folder / "teacher"
    if all([is_done(job, job.folder / role) for role in ("teacher", "student")]):
        job.say(f"teacher and student: done already, {job.folder}")
        return
    network, card, best = build(job, stage), model_card(job, stage), folder / "best.safetensors"
    with stage_tracker(job, stage.role, card, network, stage.epochs) as tracker:
        teach = partial(with_live_teacher, job, LiveTeacher(network, folder, card, tracker))
        train_stage(job, student_stage(job), teach, teacher=SavedNetworks((best,)))
        tracker.artifact(best)
        evaluate_on_test(job, stage.role, SavedNetworks((best,)), folder, tracker)


def teacher_stage(job: Job) -> Stage:
    """The teacher's own training."""
    options = job.options
    return Stage(
        role="teacher",
        network=options.teacher,
        width=options.teacher_width,
        epochs=options.teacher_epochs_of(job.table),
        pretrained=options.teacher_pretrained,
    )


def student_stage(job: Job) -> Stage:
    """The student's training with its teacher."""
    options = job.options
    return Stage(
        role="student",
        network=options.student,
        width=options.student_width,
        epochs=options.epochs_of(job.transfer_table),
        method=options.method,
        pretrained=options.student_pretrained,
    )


def name_of_teacher(options: DistillOptions) -> str:
    """The teacher as tables name it."""
    if options.teacher_predictions:
        return options.teacher_predictions
    if options.teacher_checkpoint:
        return saved_teacher(options).card().network
    return options.teacher + WITH_FLIPS * (options.teacher_tta == "flips")


def given_teacher(job: Job) -> SavedNetworks:
    """The teacher from the command line, tested as a run of its own so that it can be compared."""
    o, folder = job.options, job.folder / "teacher"
    teacher = saved_teacher(o)
    if not is_done(job, folder):
        network, card = teacher.load()
        # It is tested on this job's data, as this job sees them.
        card = replace(card, dataset=job.options.dataset.stem, split=job.options.split, spec=job.spec)
        with stage_tracker(job, "teacher", card, network) as tracker:
            evaluate_on_test(job, "teacher", teacher, folder, tracker)
    return teacher


def test_foreign_teacher(job: Job) -> None:
    """Test the predictions of a foreign teacher, if all test cases have one, as a run of its own so that it can be
    compared."""
    name, cases = job.options.teacher_predictions, job.store.split(job.options.split, "test")
    if is_done(job, job.folder / "teacher"):
        return

    def lacking() -> str:
        try:
            kind_of_predictions(job.store, name, cases)
        except UserError as error:
            return f"teacher: not in the comparison, for want of predictions of all test cases ({error})"
        return ""

    if line := by_main(job.accelerator, lacking):
        job.say(line)
        return
    card = model_card(job, Stage(role="teacher", network=name, width=1.0, epochs=0))
    with stage_tracker(job, "teacher", card, nn.Identity()) as tracker:
        evaluate_foreign_on_test(job, card, tracker)


def with_teacher(job: Job, teacher: SavedNetworks, epochs: range, student: nn.Module) -> Teaching:
    """A student with the distiller between it and a saved teacher, and the source of its targets in `epochs`."""
    o = job.options
    targets, card = frozen_teacher(job, teacher, student.taps)
    if o.cache != "off" and o.views >= 0:
        cache = matching_cache(job, targets, card)
        choose_cache(job, targets, cache, epochs)
        targets.cache = cache
        if o.rounds > 1:
            only_generation(job, cache.folder)
    return Teaching(Distillation(student, targets.distiller, schedule=schedule_of(o)), targets)


def with_predictions(job: Job, student: nn.Module) -> Teaching:
    """A student with the distiller between it and a foreign teacher's predictions."""
    targets = foreign_teacher(job, student.taps)
    return Teaching(Distillation(student, targets.distiller, schedule=schedule_of(job.options)), targets)


def with_live_teacher(job: Job, teacher: LiveTeacher, student: nn.Module) -> Teaching:
    """A student with the distiller between it and a teacher that trains at every step."""
    distiller = distiller_between(job, student.taps, teacher.network.taps)
    distillation = Distillation(student, distiller, teacher.network, schedule_of(job.options))
    return Teaching(distillation, TeacherTargets(None, distiller, None, None), teacher)


def schedule_of(options: DistillOptions) -> Callable[[int, int], float]:
    """The factor on the distillation's terms as a function of (step, total steps)."""
    return partial(distillation_factor, options.distill_schedule, options.distill_warmup)
