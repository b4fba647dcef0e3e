"""A stage of a job: one network is trained, validated and tested."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import set_seed
from torch import nn

from data_tools.errors import UserError
from data_tools.files import write_atomically, write_text
from data_tools.labels import source_values
from data_tools.preparation import Preparation
from data_tools.store import Store
from spark_dist.config import DistillOptions, TrainingOptions
from spark_dist.data.batches import SliceDataset, support_set
from spark_dist.data.identity import image_fingerprint
from spark_dist.data.loader import Prefetcher, training_loader
from spark_dist.data.order import EpochSampler
from spark_dist.data.slices import slice_table
from spark_dist.distillers import distiller_settings
from spark_dist.distillers.plain import Plain
from spark_dist.evaluation.panel import shown_slices
from spark_dist.networks import build_network
from spark_dist.networks.checkpoint import ModelCard
from spark_dist.networks.cost import Model, gflops_of
from spark_dist.networks.resnet import load_pretrained
from spark_dist.teacher.saved import SavedNetworks
from spark_dist.teacher.targets import ForeignTargets, TeacherTargets

from .checkpoint import epochs_done
from .distillation import Distillation
from .distributed import by_main
from .folder import plain
from .job import Job, RunFacts, dataset_facts, is_done, tracked
from .journal import read_journal
from .loop import StageRun, Teaching, fit
from .tracking import Tracker
from .validation import evaluate_on_test, log_results, panel, validation

OF_A_STAGE = (
    *("teacher", "student", "method", "weights", "distill_", "allow_", "cache", "rounds", "together", "unlabelled"),
    *("hard_", "epochs", "steps", "network", "width", "pretrained"),
)
"""Beginnings of the options that hold of one network of a job, and are told of that alone."""
OF_A_STUDENT = (
    *("teacher_tta", "hard_labels", "rounds", "together", "cache"),
    *("distill_schedule", "distill_warmup", "unlabelled_share"),
)
"""Options that hold of a student with a teacher."""
OF_ITS_TEACHER = ("teacher", "teacher_width", "teacher_epochs", "teacher_steps")
"""Those that hold of a student whose teacher is trained in the same job."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One network of a job, as the options say: how it is built and for how long it trains."""

    role: str
    """`teacher`, `student`, or `network` where one is trained alone; its folder in the job's has this name."""
    network: str
    width: float
    epochs: int
    method: str = "none"
    """The distillation method that it learns by."""
    pretrained: Path | None = None
    """ImageNet weights for its encoder."""


def train_stage(
    job: Job,
    stage: Stage,
    teach: Callable[[nn.Module], Teaching],
    stop_epoch: int | None = None,
    teacher: SavedNetworks | None = None,
) -> Path:
    """Train a network, test the epoch that was best on val, and return its checkpoint.

    `teach` puts the network together with what it learns from. With `stop_epoch`, only so many of the epochs: the last
    call tests. Its picture shows the predictions of the `teacher` too. A stage that is done already is left
    as it is.
    """
    options, accelerator, folder = job.options, job.accelerator, job.folder / stage.role
    best, stop_epoch = folder / "best.safetensors", stop_epoch or stage.epochs
    if is_done(job, folder):
        job.say(f"{stage.role}: done already, {best}")
        if by_main(accelerator, lambda: registers(job, stage.role)):
            with stage_tracker(job, stage.role, model_card(job, stage), build(job, stage), stage.epochs) as tracker:
                register(job, best, tracker)
        return best
    if stop_epoch < stage.epochs and epochs_done(accelerator, folder) >= stop_epoch:
        return best
    network, card = build(job, stage), model_card(job, stage)
    with stage_tracker(job, stage.role, card, network, stage.epochs) as tracker:
        teaching = teach(network)
        adapt(teaching.distillation, options)
        loader = stage_loader(job, teaching.targets)
        with memory_explained(options, accelerator.num_processes):
            run = StageRun(options, stage.epochs, stop_epoch, folder, card, tracker, panel(job))
            fit(accelerator, teaching, loader, validation(job), run)
        if teaching.targets.taught:
            metrics = count_cache_use(job, stage.role, teaching.targets)
            metrics["cache/waited_seconds"] = loader.waited
            tracker.metrics(metrics, step=stop_epoch * loader.batch_sampler.steps)
        if stop_epoch == stage.epochs:
            tracker.artifact(best)
            evaluate_on_test(job, stage.role, SavedNetworks((best,)), folder, tracker, teacher)
            if by_main(accelerator, lambda: registers(job, stage.role)):
                register(job, best, tracker)
    return best


def registers(job: Job, role: str) -> bool:
    """Whether a stage's network is still to be registered as a model."""
    name, events = job.options.register, read_journal(job.folder / role)
    return bool(name) and role != "teacher" and not any(event.get("register") == name for _, event in events)


def register(job: Job, best: Path, tracker: Tracker) -> None:
    """Register a stage's network as a model of MLflow, a val slice's crop being the example of its input."""
    example = best.with_name("example.npy")
    if job.accelerator.is_main_process:
        (shown,) = shown_slices(job.store, job.store.split(job.options.split, "val"), job.spec, count=1)
        inside, _ = job.spec.crop.overlap(shown.image.shape[1:])
        slices = shown.image[shown.position][inside][np.newaxis]
        write_atomically(example, lambda aside: aside.write_bytes(array_bytes(slices)))
    tracker.model(best, example, job.options.register)


def array_bytes(array: np.ndarray) -> bytes:
    """An array as a .npy file holds it."""
    buffer = BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def without_teacher(network: nn.Module) -> Teaching:
    """Training on the ground truth alone."""
    distiller = Plain()
    return Teaching(Distillation(network, distiller), TeacherTargets(None, distiller, None, None))


def build(job: Job, stage: Stage) -> nn.Module:
    """A network with the weights that the job's seed (or ImageNet) gives it, the same with and without a teacher.

    One that is shown examples gets them from the training slices that show the target.
    """
    options = job.options
    set_seed(options.seed)
    network = build_network(stage.network, job.spec.channels, job.spec.classes, stage.width)
    if stage.pretrained:
        load_pretrained(network, stage.pretrained)
    if hasattr(network, "set_support"):
        shown = slice_table(job.store, options.split, "train", options.task)
        images, masks, names = support_set(shown, job.spec, options.support_slices, options.seed)
        network.set_support(images, masks)
        job.say(f"{stage.network}: support set of {len(names)} training slices, listed in {job.folder}/support.txt")
        if job.accelerator.is_main_process:
            write_text(job.folder / "support.txt", "\n".join(names) + "\n")
    return network


def model_card(job: Job, stage: Stage) -> ModelCard:
    """The facts about a stage's network before it has been trained."""
    options = job.options
    return ModelCard(
        network=stage.network,
        width=stage.width,
        classes=job.spec.classes,
        in_channels=job.spec.channels,
        method=stage.method,
        seed=options.seed,
        dataset=options.dataset.stem,
        store=job.store.fingerprint(),
        split=options.split,
        trained_on=trained_on(job),
        spec=job.spec,
        preparation=Preparation.of_store(job.store.attributes),
        label_values=label_values(job.store, job.spec.task),
    )


def label_values(store: Store, task: str) -> tuple[int, ...]:
    """The value of each class of a task but the background in the label files that a store was made of: its first,
    where it has several."""
    values = source_values(store.attributes["labels"])
    return tuple(int(values[min(stored)]) for stored in store.task(task).values)


@contextmanager
def stage_tracker(
    job: Job, role: str, card: ModelCard, network: nn.Module, epochs: int | None = None
) -> Iterator[Tracker]:
    """A run below the job's, or the job's where there is none above, with the tags that runs are compared by; one of a
    network that is trained elsewhere has no `epochs`."""
    tags = dict(job.facts) if role == "network" else {"job": job.folder.name}
    tags |= {key: getattr(card, key) for key in ("network", "width", "method", "seed", "dataset", "split")}
    tags |= {"role": role, "task": card.spec.task, "parameters": sum(p.numel() for p in network.parameters())}
    params = stage_params(job.options, card, role, epochs)
    name = f"{run_title(role, card.method)} {card.network}"
    about = RunFacts(name, job.folder / role, tags, params)
    with tracked(job.accelerator, job.options, about, job.tracker) as tracker:
        tracker.dataset(dataset_facts(job.store, job.options))
        if role == "network":
            tracker.artifact(job.folder / "config.yaml")
        if hasattr(network, "set_support") and (job.folder / "support.txt").exists():
            tracker.artifact(job.folder / "support.txt")
        # Nobody knows those of a foreign teacher.
        cost = {"parameters": tags["parameters"]} if tags["parameters"] else {}
        # Not on torch's meta device, or of several networks.
        with suppress(RuntimeError, NotImplementedError, UserError):
            model = Model(card.network, card.width, card.in_channels, card.classes)
            cost["gflops"] = gflops_of(model, card.spec.crop.size)
        log_results(job, role, tracker, cost)
        yield tracker


def run_title(role: str, method: str) -> str:
    """The beginning of a run's name, by which it is told from others in a narrow list."""
    return "teacher" if role == "teacher" else "alone" if method == "none" else method


def stage_params(options: TrainingOptions, card: ModelCard, role: str, epochs: int | None) -> dict[str, Any]:
    """The options that hold of this very network's training, a method's weights and settings each by its name."""
    found = {key: value for key, value in plain(options).items() if not key.startswith(OF_A_STAGE)}
    found |= {"network": card.network, "width": card.width, "seed": card.seed, "method": card.method}
    if epochs:
        found |= {"epochs": epochs, "steps": steps_told(options, role)}
    if role == "student" and isinstance(options, DistillOptions):
        found |= {f"method.{key}": v for key, v in (distiller_settings(options.method) | options.weights).items()}
        given = [key for key in ("teacher_checkpoint", "teacher_predictions") if getattr(options, key)]
        keys = (*OF_A_STUDENT, *(given or OF_ITS_TEACHER))
        found |= {key: value for key, value in plain(options).items() if key in keys}
    return found


def steps_told(options: TrainingOptions, role: str) -> int:
    """The optimizer steps that options ask for of a job's network; 0 where its epochs count."""
    if role == "teacher" and isinstance(options, DistillOptions):
        return options.teacher_steps or (0 if options.teacher_epochs else options.steps)
    return options.steps


def adapt(distillation: Distillation, options: TrainingOptions) -> None:
    """Prepare a model, in place, for how the options want it computed."""
    if options.sync_batchnorm:
        nn.SyncBatchNorm.convert_sync_batchnorm(distillation)
    if options.channels_last:
        distillation.to(memory_format=torch.channels_last)
    if options.compile:
        distillation.student.compile()


def stage_loader(job: Job, targets: TeacherTargets | ForeignTargets) -> Prefetcher:
    """This process's shares of the training batches, with what the cache holds of their targets."""
    options, accelerator = job.options, job.accelerator
    table = job.transfer_table if targets.taught else job.table
    sampler = EpochSampler(
        options.order(table), accelerator.process_index, accelerator.num_processes, options.accumulate
    )
    dataset = SliceDataset(table, job.spec, targets.cache, options.slice_views)
    return training_loader(dataset, sampler, options.workers)


def count_cache_use(job: Job, role: str, targets: TeacherTargets | ForeignTargets) -> dict[str, float]:
    """Count the targets that came from the cache and from the teacher, over all processes; said, too."""
    counts = torch.tensor([targets.hits, targets.forwards, targets.damaged], device=job.accelerator.device)
    hits, forwards, damaged = job.accelerator.reduce(counts).tolist()
    found = f", {damaged} damaged entries" if damaged else ""
    job.say(f"{role}: {hits} targets read from the cache, {forwards} by a teacher forward{found}")
    return {"cache/hits": hits, "cache/teacher_forwards": forwards, "cache/damaged": damaged}


@contextmanager
def memory_explained(options: TrainingOptions, processes: int) -> Iterator[None]:
    """Out of memory, said in terms of what can be done about it."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "allocate memory" not in str(error):
            raise
        slices = -(-options.batch_size // (processes * options.accumulate))
        rows, columns = options.slice_spec.crop.size
        raise UserError(
            f"out of memory with {slices} slices of {rows}×{columns} at a time in each process; try --accumulate "
            f"{2 * options.accumulate}, --batch-size {max(options.batch_size // 2, 1)}, more processes, --crop "
            f"{rows // 2 // 32 * 32 or rows // 2} or mixed precision, in a new folder (--out)"
        ) from None


def trained_on(job: Job) -> tuple[str, ...] | None:
    """Hashes of the images that the job's networks learn from; None if a given teacher does not say what it did."""
    options = job.options
    names = [*job.store.split(options.split, "train")]
    if getattr(options, "unlabelled_share", 0):
        names += job.store.split(options.split, "unlabelled")
    found = {image_fingerprint(job.store, name) for name in names}
    if getattr(options, "teacher_predictions", ""):
        return None
    if teacher := getattr(options, "teacher_checkpoint", None):
        if (before := SavedNetworks(tuple(teacher)).card().trained_on) is None:
            return None
        found |= set(before)
    return tuple(sorted(found))
