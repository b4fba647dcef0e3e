"""Mistakes in options that are found before anything is trained."""

import torch
from torch import nn

from data_tools.errors import UserError
from data_tools.ownership import fingerprint
from data_tools.predictions import prediction_facts
from data_tools.split import PARTS
from data_tools.store import Store
from spark_dist.config import DistillOptions, TrainingOptions, TrainOptions
from spark_dist.data.identity import image_fingerprint
from spark_dist.data.order import EpochSampler
from spark_dist.data.predictions import kind_of_predictions
from spark_dist.data.slices import SliceTable
from spark_dist.distillers import DISTILLERS, build_distiller, prediction_methods
from spark_dist.networks import build_network
from spark_dist.networks.checkpoint import load_card
from spark_dist.teacher.saved import check_alike


def check(options: TrainOptions | DistillOptions) -> None:
    """Find what is wrong with the options of a job before anything is trained. Raises `UserError`."""
    if isinstance(options, TrainOptions):
        check_network(options, options.network, options.width)
        return
    check_together(options)
    check_cache(options)
    if options.hard_labels and options.method not in prediction_methods():
        raise UserError(
            f"--hard-labels: method {options.method} learns from a teacher's features too; take one of "
            f"{', '.join(prediction_methods())}"
        )
    if options.teacher_predictions:
        check_foreign_teacher(options)
        return
    check_pair(options)
    if options.teacher_checkpoint:
        check_given_teacher(options)


def check_network(options: TrainingOptions, name: str, width: float) -> nn.Module:
    """The network without weights. Raises `UserError` if there is none of that name, or the crop does not fit it."""
    with torch.device("meta"):
        network = build_network(name, options.slice_spec.channels, width=width)
    rows, columns = options.slice_spec.crop.size
    if rows % network.stride or columns % network.stride:
        raise UserError(f"--crop {rows}×{columns}: the sides must be multiples of {network.stride} for {name}")
    return network


def check_crop(store: Store, options: TrainingOptions) -> None:
    """Raises `UserError` for a crop that sees nothing of a case."""
    crop = options.slice_spec.crop
    for part in PARTS:
        for name in store.split(options.split, part):
            plane = store.cases[name].shape[1:]
            if any(side.start == side.stop for side in crop.overlap(plane)[0]):
                raise UserError(
                    f"--crop-shift {list(crop.shift)}: a crop of {crop.size[0]}×{crop.size[1]} there sees nothing of "
                    f"{name}, whose slices have {plane[0]}×{plane[1]} pixels ({store.path})"
                )


def check_teacher_cases(store: Store, options: DistillOptions) -> str:
    """A warning for a given teacher that may know val or test cases of the split; nothing if it does not.

    Raises `UserError` if it does, unless that is allowed.
    """
    warnings = []
    for path in options.teacher_checkpoint or ():
        seen = load_card(path).trained_on
        if seen is None:
            warnings.append(
                f"{path} does not say which cases it was trained on; if any are val or test cases, metrics are too good"
            )
            continue
        for part in ("val", "test"):
            if known := [name for name in store.split(options.split, part) if image_fingerprint(store, name) in seen]:
                what = f"{path} was trained on {len(known)} {part} cases of split '{options.split}' ({known[0]} …)"
                if not options.allow_teacher_overlap:
                    raise UserError(
                        f"{what}, so that metrics would say nothing of new cases; take a teacher of this split, or "
                        "give --allow-teacher-overlap"
                    )
                warnings.append(f"{what}, as --allow-teacher-overlap allows; metrics say nothing of new cases")
                break
    return next(iter(warnings), "")


def check_shares(options: TrainingOptions, table: SliceTable, processes: int) -> None:
    """Raises `UserError` if some process gets too few of a batch's slices to train, or to learn by the method."""
    o = options
    sampler = EpochSampler(o.order(table), 0, processes, o.accumulate)
    fewest = DISTILLERS[o.method].fewest_slices if isinstance(o, DistillOptions) else 1
    if sampler.smallest < fewest:
        raise UserError(
            f"method {o.method} compares the slices that a process has with each other and learns nothing from fewer "
            f"than {fewest}; {len(table)} slices in batches of {o.batch_size}, on {processes} processes and in "
            f"{o.accumulate} parts, leave {sampler.smallest} to one: raise --batch-size, or use fewer processes or a "
            "smaller --accumulate"
        )


def check_warmup(options: TrainingOptions, table: SliceTable) -> None:
    """Raises `UserError` for a warm-up of the distillation that the student's training on a table does not outlast."""
    if isinstance(options, DistillOptions):
        steps = options.epochs_of(table) * options.order(table).steps
        if options.distill_warmup >= steps:
            given = f"--distill-warmup {options.distill_warmup:g}"
            raise UserError(f"{given} must be less than the {steps} steps that the student trains for")


def check_together(options: DistillOptions) -> None:
    """Raises `UserError` for ways of training teacher and student that exclude each other."""
    if options.teacher_checkpoint and (options.rounds > 1 or options.together == "live"):
        raise UserError(
            "--teacher-checkpoint is of a teacher that is trained already; leave out --rounds and --together"
        )
    if options.together == "live" and (options.rounds > 1 or options.teacher_epochs or options.teacher_steps):
        raise UserError(
            "--together live trains both networks at every step; leave out --rounds, and set --teacher-epochs 0 if a "
            "recipe sets it"
        )
    if options.together == "live" and options.teacher_tta != "none":
        raise UserError(
            "--teacher-tta is of a teacher that is trained already; leave out --together live, or --teacher-tta"
        )
    if options.together == "live" and options.unlabelled_share:
        raise UserError(
            "--unlabelled-share takes the prediction of a teacher that is trained already; leave out --together live"
        )
    if not (options.steps or options.teacher_steps):
        check_rounds(options.rounds, options.epochs, options.teacher_epochs or options.epochs)


def check_cache(options: DistillOptions) -> None:
    """Raises `UserError` for a cache that can't hold what the views ask of it."""
    if options.cache == "canonical" and options.slice_views.drawn:
        raise UserError("--cache canonical turns one entry into all orientations; use it with --augment none or flips")
    if options.cache in ("on", "canonical") and options.views < 0:
        raise UserError(
            "--views -1 shows each view of a slice only once, and no cache can keep that; use --cache off or auto"
        )


def check_pair(options: DistillOptions) -> None:
    """Raises `UserError` for networks or a method that are not there or do not fit each other."""
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


def check_given_teacher(options: DistillOptions) -> None:
    """Raises `UserError` for a checkpoint of another network than the options say; for several that do not fit each
    other, the crop or the method."""
    first, *others = options.teacher_checkpoint
    card = load_card(first)
    if options.teacher != card.network:
        raise UserError(
            f"{first}: holds a {card.network} for task {card.spec.task}, but --teacher says {options.teacher}"
        )
    if options.context != card.spec.context:
        raise UserError(f"{first}: was trained with --context {card.spec.context}; give its student the same one")
    if not others:
        return
    if options.method not in prediction_methods():
        raise UserError(
            f"method {options.method} learns from a teacher's features, and several checkpoints have only their "
            f"prediction in common; give --teacher-checkpoint one, or take one of {', '.join(prediction_methods())}"
        )
    check_alike(options.teacher_checkpoint)
    for path in others:
        card = load_card(path)
        check_network(options, card.network, card.width)


def check_foreign_teacher(options: DistillOptions) -> None:
    """Raises `UserError` for options that a teacher without a network can't follow."""
    student = check_network(options, options.student, options.student_width)
    if options.method not in FOREIGN_METHODS:
        raise UserError(
            f"method {options.method} needs more of a teacher than --teacher-predictions; take one of "
            f"{', '.join(FOREIGN_METHODS)}"
        )
    with torch.device("meta"):
        build_distiller(options.method, student=student.taps, teacher=student.taps, **options.weights)
    if options.cache in ("on", "canonical"):
        raise UserError("--teacher-predictions lie in the store, and no cache is needed; leave out --cache")
    others = {
        "--teacher-checkpoint": options.teacher_checkpoint,
        "--teacher-tta": options.teacher_tta != "none",
        "--rounds": options.rounds > 1,
        "--together": options.together == "live",
    }
    if given := [name for name, there in others.items() if there]:
        raise UserError(f"--teacher-predictions takes the place of a teacher's network; leave out {given[0]}")


def check_predictions(table: SliceTable, name: str) -> tuple[dict[str, str], str]:
    """Hashes of a foreign teacher's predictions for the cases of a table, and a warning.

    Raises `UserError` if a case lacks its own, or they are not of one kind.
    """
    kind_of_predictions(table.store, name, table.cases)
    warning = (
        f"predictions '{name}' do not say which cases their model was trained on; if any are val or test cases, "
        "metrics are too good"
    )
    return {
        case: fingerprint(facts) for case, facts in prediction_facts(table.store, name, table.cases).items()
    }, warning


FOREIGN_METHODS = [name for name in prediction_methods() if name != "tfkd"]
"""Methods that learn from predictions alone, whoever made them."""


def check_teacher_task(store: Store, options: DistillOptions) -> None:
    """Raises `UserError` for a checkpoint of another task than the options say."""
    path = options.teacher_checkpoint[0]
    card, wanted = load_card(path), tuple(store.task(options.task).regions)
    if card.spec.regions != wanted:
        raise UserError(
            f"{path}: holds a {card.network} for task {card.spec.task}, but --task says {options.task}"
            + (f" ({','.join(wanted)})" if options.task == "all" else "")
        )


def check_rounds(rounds: int, epochs: int, teacher_epochs: int) -> None:
    """Raises `UserError` for more rounds than a network has epochs."""
    if rounds > min(epochs, teacher_epochs):
        raise UserError(
            f"--rounds {rounds} must be at most the number of epochs of each network; the student has {epochs}, and "
            f"the teacher {teacher_epochs}"
        )
