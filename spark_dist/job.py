"""What a training job consists of: its folder, its runs in MLflow, and its stages (a teacher's, a student's)."""

import json
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn

from data_tools.errors import UserError
from data_tools.store import Store, open_store

from .checkpoint import load_network, save_network, states, write_text
from .cli import Interrupted
from .config import TrainingOptions
from .data import EpochSampler, SliceDataset, SliceTable, slice_table, support_set, training_loader
from .distillation import Distillation
from .distributed import listen_for_stop, make_accelerator, shut_down
from .evaluate import evaluate_cases, format_summaries, summaries
from .metrics import write_cases
from .networks import build_network
from .networks.resnet import load_pretrained
from .picture import predictions_picture
from .progress import console
from .teacher_cache import TeacherTargets
from .tracking import Tracker, null_tracker, open_run
from .trainer import fit

MAY_DIFFER = (
    "out",
    "overwrite",
    "tracking_uri",
    "workers",
    "log_every",
    "checkpoint_minutes",
    "checkpoint_steps",
    "keep_checkpoints",
    "timeout_minutes",
    "cache_folder",
    "cache_memory",
)
"""Options in which a resumed job may differ from what it was."""

Teaching = Callable[[nn.Module], tuple[Distillation, TeacherTargets]]
"""From a student to what is trained and the source of its distiller's targets."""


@dataclass(frozen=True)
class Job:
    """One invocation of train or distill."""

    options: TrainingOptions
    accelerator: Accelerator
    store: Store
    tracker: Tracker

    @property
    def folder(self) -> Path:
        return self.options.folder

    @cached_property
    def table(self) -> SliceTable:
        """The training slices."""
        return slice_table(self.store, self.options.split, "train", self.options.task, self.options.slices)

    def say(self, text: str) -> None:
        """A line for people, once per job."""
        if self.accelerator.is_main_process:
            console.print(text)


@contextmanager
def open_job(options: TrainingOptions, tags: Mapping[str, Any]) -> Iterator[Job]:
    """Check the options against the data, claim the job's folder, and open the parent run.

    Raises `UserError` if the folder holds a job with other options.
    """
    store = open_store(options.dataset)
    for part in ("train", "val", "test"):
        slice_table(store, options.split, part, options.task)
    listen_for_stop()
    accelerator = make_accelerator(options.accumulate, options.clip, options.timeout_minutes)
    if options.sync_batchnorm and accelerator.device.type != "cuda":
        raise UserError("--sync_batchnorm needs GPUs; leave it out on CPUs")
    claim(options.folder, options, accelerator)
    facts = {"world_size": accelerator.num_processes, "git_commit": git_commit(), "seed": options.seed}
    facts |= {"dataset": options.dataset.stem, "task": options.task, **tags}
    with tracked(accelerator, options, options.folder.name, options.folder, facts) as tracker:
        tracker.artifact(options.folder / "config.yaml")
        yield Job(options, accelerator, store, tracker)
    shut_down(accelerator)


@contextmanager
def tracked(
    accelerator: Accelerator,
    options: TrainingOptions,
    name: str,
    folder: Path,
    tags: Mapping[str, Any],
    parent: Tracker | None = None,
) -> Iterator[Tracker]:
    """An MLflow run that ends as the block does; a stand-in on all processes but the main one."""
    if accelerator.is_main_process:
        tags = {key: str(value) for key, value in tags.items()}
        uri, experiment = options.tracking_uri, options.experiment_name
        tracker = open_run(uri, experiment, name, folder, tags, plain(options), parent or options.sweep)
    else:
        tracker = null_tracker()
    status = "FAILED"
    try:
        yield tracker
        status = "FINISHED"
    except (Interrupted, KeyboardInterrupt):
        status = "KILLED"
        raise
    finally:
        tracker.finish(status)


def claim(folder: Path, options: TrainingOptions, accelerator: Accelerator) -> None:
    """Make the job's folder, or find that it holds this very job, which then goes on."""
    wanted = {key: value for key, value in plain(options).items() if key not in MAY_DIFFER}
    file = folder / "config.yaml"
    if file.exists() and not options.overwrite:
        found = yaml.safe_load(file.read_text())
        if differing := [key for key, value in wanted.items() if found.get(key) != value]:
            key = differing[0]
            raise UserError(
                f"{folder}: holds a job with {key}={found.get(key)!r}, not {wanted[key]!r}; "
                "give another --out, or --overwrite true to begin again"
            )
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if options.overwrite and file.exists():
            discard(folder)
        write_text(file, yaml.safe_dump(wanted, sort_keys=False))
    accelerator.wait_for_everyone()


def discard(folder: Path) -> None:
    """Remove what a job leaves in its folder, and nothing else."""
    for part in (folder, folder / "teacher", folder / "student"):
        for pattern in (
            "config.yaml",
            "checkpoints/step-*",
            "best.safetensors",
            "test_cases.json",
            "generation.txt",
            "*.png",
            "tracking*",
        ):
            for file in part.glob(pattern):
                file.unlink()


def plain(options: TrainingOptions) -> dict[str, Any]:
    """Options as YAML and JSON can hold them."""
    return json.loads(json.dumps(asdict(options), default=str))


def git_commit() -> str:
    """The commit of the working directory, or nothing outside a repository."""
    result = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return result.stdout.strip()


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
        images, masks, names = support_set(
            job.table, options.crop_window, options.task, options.support_slices, options.seed
        )
        network.set_support(images, masks)
        job.say(f"{name}: support set of {len(names)} training slices, listed in {job.folder}/support.txt")
        if job.accelerator.is_main_process:
            write_text(job.folder / "support.txt", "\n".join(names) + "\n")
        job.tracker.artifact(job.folder / "support.txt")
    return network


def check_network(options: TrainingOptions, name: str, width: float) -> nn.Module:
    """The network without weights. Raises `UserError` if there is none of that name, or the crop does not fit it."""
    with torch.device("meta"):
        network = build_network(name, width=width)
    rows, columns = options.crop_window.size
    if rows % network.stride or columns % network.stride:
        raise UserError(f"--crop {rows}×{columns}: the sides must be multiples of {network.stride} for {name}")
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
    description = describe(options, name, width, method)
    with tracked(
        accelerator, options, f"{role} {name}", folder, stage_tags(role, description, network), job.tracker
    ) as tracker:
        model, targets = teaching(network)
        sampler = EpochSampler(
            len(job.table),
            options.batch_size,
            options.seed,
            options.orientation_choices,
            accelerator.process_index,
            accelerator.num_processes,
            options.accumulate,
        )
        dataset = SliceDataset(job.table, options.crop_window, targets.cache)
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
                description,
                beside.tracking(tracker) if beside else tracker,
            )
        if targets.teacher is not None:
            counts = torch.tensor([targets.hits, targets.forwards, targets.damaged], device=accelerator.device)
            hits, forwards, damaged = accelerator.reduce(counts).tolist()
            found = f", {damaged} damaged entries" if damaged else ""
            job.say(f"{role}: {hits} targets read from the cache, {forwards} by a teacher forward{found}")
            figures = {"cache/hits": hits, "cache/teacher_forwards": forwards, "cache/damaged": damaged}
            tracker.metrics(figures | {"cache/waited_seconds": loader.waited}, step=0)
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
        slices, (rows, columns) = -(-options.batch_size // (processes * options.accumulate)), options.crop_window.size
        raise UserError(
            f"out of memory with {slices} slices of {rows}×{columns} at a time in each process; try --accumulate "
            f"{2 * options.accumulate}, --batch_size {max(options.batch_size // 2, 1)}, more processes, --crop "
            f"{rows // 2 // 32 * 32 or rows // 2} or mixed precision, in a new folder (--out)"
        ) from None


def epochs_done(job: Job, folder: Path) -> int:
    """How many whole epochs a stage has behind it, by the name of its newest state."""
    steps = -(-len(job.table) // job.options.batch_size)
    found = states(folder / "checkpoints")
    return int(found[-1].stem.removeprefix("step-")) // steps if found else 0


@dataclass
class Beside:
    """A network that is trained along with the stage's own, with a folder, a description and a run of its own."""

    network: nn.Module
    folder: Path
    description: dict[str, Any]
    tracker: Tracker

    def __post_init__(self):
        best = self.folder / "best.safetensors"
        self.best = load_network(best)[1]["val_dice"] if best.exists() else -1.0

    def validation(self, job: Job) -> Callable[[nn.Module], dict[str, float]]:
        """Like the function `validation`, but both networks are looked at; this one's best is kept in its folder."""
        look = validation(job)

        def validate(network: nn.Module) -> dict[str, float]:
            own = look(self.network)
            if own["val/dice"] > self.best:
                self.best = own["val/dice"]
                if job.accelerator.is_main_process:
                    facts = self.description | {"val_dice": self.best}
                    save_network(self.folder / "best.safetensors", self.network, facts)
            return look(network) | {f"teacher/{key}": value for key, value in own.items()}

        return validate

    def tracking(self, tracker: Tracker) -> "Beside":
        """Takes the place of the stage's tracker in the loop: a teacher's figures go to the teacher's run."""
        self.stage = tracker
        return self

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        own = {key.removeprefix("teacher/"): v for key, v in values.items() if key.startswith("teacher/")}
        own |= {"train/loss": values["train/teacher"]} if "train/teacher" in values else {}
        if own:
            self.tracker.metrics(own, step)
        self.stage.metrics({key: v for key, v in values.items() if not key.startswith("teacher/")}, step)


def describe(options: TrainingOptions, name: str, width: float, method: str) -> dict[str, Any]:
    """What is saved with a network's weights."""
    return {
        "network": name,
        "width": width,
        "method": method,
        "seed": options.seed,
        "task": options.task,
        "dataset": options.dataset.stem,
        "split": options.split,
        "crop": options.crop_window.size,
        "crop_shift": options.crop_window.shift,
        "threshold": options.threshold,
    }


def stage_tags(role: str, description: Mapping[str, Any], network: nn.Module) -> dict[str, Any]:
    """What runs are compared by."""
    keys = ("network", "width", "method", "seed", "task", "dataset", "split")
    parameters = sum(p.numel() for p in network.parameters())
    return {"role": role, "parameters": parameters, **{key: description[key] for key in keys}}


def validation(job: Job) -> Callable[[nn.Module], dict[str, float]]:
    """A function from a network to its mean figures over the val cases."""
    cases = job.store.split(job.options.split, "val")

    def validate(network: nn.Module) -> dict[str, float]:
        o = job.options
        figures = evaluate_cases(
            job.accelerator, network, job.store, cases, o.task, o.crop_window, o.threshold, distances=False
        )
        return {f"val/{key}": s["mean"] for key, s in summaries(figures).items() if key.startswith("dice")}

    return validate


def evaluate_on_test(
    job: Job, role: str, checkpoint: Path, folder: Path, tracker: Tracker, teacher: Path | None = None
) -> None:
    """Figures of a checkpoint on the test cases, and a picture (beside the teacher's), into `folder` and the run."""
    o, device = job.options, job.accelerator.device
    network = load_network(checkpoint)[0].to(device)
    cases = job.store.split(o.split, "test")
    figures = evaluate_cases(job.accelerator, network, job.store, cases, o.task, o.crop_window, o.threshold)
    summary = summaries(figures)
    job.say(f"{role}: test {format_summaries(summary)}")
    tracker.metrics({f"test/{key}": s["mean"] for key, s in summary.items()}, step=0)
    if job.accelerator.is_main_process:
        networks = {"teacher": load_network(teacher)[0].to(device)} if teacher else {}
        networks[role] = network
        folder.mkdir(parents=True, exist_ok=True)
        picture = folder / "predictions.png"
        predictions_picture(job.store, cases, o.task, o.crop_window, o.threshold, networks, device, picture)
        tracker.artifact(picture)
        write_cases(folder / "test_cases.json", figures, task=o.task, split="test", threshold=o.threshold)
        tracker.artifact(folder / "test_cases.json")
    job.accelerator.wait_for_everyone()
