"""A stage of a job: one network is trained, validated and tested."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import nn

from data_tools.errors import UserError
from data_tools.files import write_text
from spark_dist.config import TrainingOptions
from spark_dist.data.batches import SliceDataset, support_set
from spark_dist.data.loader import training_loader
from spark_dist.data.order import EpochSampler
from spark_dist.distillers.plain import Plain
from spark_dist.networks import build_network
from spark_dist.networks.checkpoint import ModelCard
from spark_dist.networks.resnet import load_pretrained
from spark_dist.teacher.targets import TeacherTargets

from .checkpoint import states
from .distillation import Distillation
from .job import Job, tracked
from .live import Beside
from .loop import fit
from .validation import evaluate_on_test, validation

Teaching = Callable[[nn.Module], tuple[Distillation, TeacherTargets]]
"""From a student to what is trained and the source of its distiller's targets."""


def build(job: Job, name: str, width: float, pretrained: Path | None) -> nn.Module:
    """A network with the weights that the job's seed (or ImageNet) gives it, the same with and without a teacher.

    One that is shown examples gets them from the training slices.
    """
    options = job.options
    set_seed(options.seed)
    network = build_network(name, width=width)
    if pretrained:
        load_pretrained(network, pretrained)
    if hasattr(network, "set_support"):
        images, masks, names = support_set(job.table, options.slice_spec, options.support_slices, options.seed)
        network.set_support(images, masks)
        job.say(f"{name}: support set of {len(names)} training slices, listed in {job.folder}/support.txt")
        if job.accelerator.is_main_process:
            write_text(job.folder / "support.txt", "\n".join(names) + "\n")
        job.tracker.artifact(job.folder / "support.txt")
    return network


def train_stage(
    job: Job,
    role: str,
    name: str,
    width: float,
    teaching: Teaching,
    epochs: int,
    method: str = "none",
    pretrained: Path | None = None,
    teacher: Path | None = None,
    until: int | None = None,
    beside: "Beside | None" = None,
) -> Path:
    """Train the network `name` as the job's `role`, test the epoch that was best on val, and return its checkpoint.

    With `until`, only so many of the epochs: the last call tests. `beside` is a network that the stage trains along.
    A stage that is done already is left as it is.
    """
    folder = job.folder / role
    best = folder / "best.safetensors"
    if (folder / "test_cases.json").exists():
        job.say(f"{role}: done already, {best}")
        return best
    until = until or epochs
    if until < epochs and epochs_done(job, folder) >= until:
        return best
    options, accelerator = job.options, job.accelerator
    network = build(job, name, width, pretrained)
    card = model_card(job, name, width, method)
    with tracked(
        accelerator, options, f"{role} {name}", folder, stage_tags(role, card, network), job.tracker
    ) as tracker:
        model, targets = teaching(network)
        table = job.transfer_table if targets.teacher is not None else job.table
        sampler = EpochSampler(
            options.order(table), accelerator.process_index, accelerator.num_processes, options.accumulate
        )
        dataset = SliceDataset(table, options.slice_spec, targets.cache, options.slice_views)
        loader = training_loader(dataset, sampler, options.workers)
        if options.sync_batchnorm:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        if options.channels_last:
            model.to(memory_format=torch.channels_last)
        if options.compile:
            model.student.compile()
        with memory_explained(options, accelerator.num_processes):
            fit(
                accelerator,
                model,
                targets,
                loader,
                beside.validation(job) if beside else validation(job),
                options,
                epochs,
                until,
                folder,
                card,
                beside.tracking(tracker) if beside else tracker,
            )
        if targets.teacher is not None:
            counts = torch.tensor([targets.hits, targets.forwards, targets.damaged], device=accelerator.device)
            hits, forwards, damaged = accelerator.reduce(counts).tolist()
            found = f", {damaged} damaged entries" if damaged else ""
            job.say(f"{role}: {hits} targets read from the cache, {forwards} by a teacher forward{found}")
            figures = {"cache/hits": hits, "cache/teacher_forwards": forwards, "cache/damaged": damaged}
            tracker.metrics(figures | {"cache/waited_seconds": loader.waited}, step=until * sampler.steps)
        if until < epochs:
            return best
        tracker.artifact(best)
        evaluate_on_test(job, role, best, folder, tracker, teacher)
    return best


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


def epochs_done(job: Job, folder: Path) -> int:
    """How many whole epochs a stage has behind it, by the name of its newest state."""
    steps = -(-len(job.table) // job.options.batch_size)
    found = states(folder / "checkpoints")
    return int(found[-1].stem.removeprefix("step-")) // steps if found else 0


def model_card(job: Job, name: str, width: float, method: str) -> ModelCard:
    """The facts about a network of the job, before it has been trained."""
    options = job.options
    return ModelCard(
        network=name,
        width=width,
        method=method,
        seed=options.seed,
        dataset=options.dataset.stem,
        store=job.store.fingerprint(),
        split=options.split,
        spec=options.slice_spec,
    )


def stage_tags(role: str, card: ModelCard, network: nn.Module) -> dict[str, Any]:
    """What runs are compared by."""
    keys = ("network", "width", "method", "seed", "dataset", "split")
    parameters = sum(p.numel() for p in network.parameters())
    return {"role": role, "parameters": parameters, "task": card.spec.task, **{key: getattr(card, key) for key in keys}}


def untaught(network: nn.Module) -> tuple[Distillation, TeacherTargets]:
    """Training on the truth alone."""
    distiller = Plain()
    return Distillation(network, distiller), TeacherTargets(None, distiller, None, None)
