"""A training job: its folder, its runs in MLflow, and its stages (a teacher's, a student's)."""

import getpass
import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator

from data_tools.errors import Interrupted, UserError
from data_tools.location import is_local
from data_tools.ownership import fingerprint
from data_tools.progress import console
from data_tools.split import PARTS
from data_tools.store import Store, open_store
from spark_dist.config import DistillOptions, TrainingOptions
from spark_dist.data.coverage import coverage_line, unseen_target
from spark_dist.data.identity import fold_of, split_fingerprints
from spark_dist.data.slices import SliceTable, slice_table, with_unlabelled
from spark_dist.data.views import SliceSpec
from spark_dist.teacher.fingerprint import weights_hash
from spark_dist.teacher.saved import SavedNetworks

from .checks import (
    check_crop,
    check_predictions,
    check_rounds,
    check_shares,
    check_teacher_cases,
    check_teacher_task,
    check_warmup,
)
from .distributed import by_main, listen_for_stop, make_accelerator, shut_down
from .folder import check_folder, claim, plain
from .journal import finished
from .lock import locked
from .tracking import Tracker, failure_of, null_tracker, open_run, page_of, send_rest


@dataclass(frozen=True)
class Job:
    """One invocation of train or distill."""

    options: TrainingOptions
    accelerator: Accelerator
    store: Store
    tracker: Tracker
    """The run above those of the stages; a stand-in where one network is trained, whose run is the job's."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Tags of the job's run."""

    @property
    def folder(self) -> Path:
        return self.options.folder

    @cached_property
    def spec(self) -> SliceSpec:
        """How slices are seen, with the regions of the task by their names."""
        return replace(self.options.slice_spec, task=",".join(self.store.task(self.options.task).regions))

    @cached_property
    def table(self) -> SliceTable:
        """The training slices with ground truth."""
        return training_table(self.store, self.options)

    @cached_property
    def transfer_table(self) -> SliceTable:
        """The slices that a student learns from: with `--unlabelled-share`, those without ground truth too."""
        return transfer_table(self.table, self.options)

    def say(self, text: str) -> None:
        """A line for people, once per job."""
        if self.accelerator.is_main_process:
            console.print(text)


def training_table(store: Store, options: TrainingOptions) -> SliceTable:
    """The training slices with ground truth."""
    return slice_table(store, options.split, "train", options.task, options.slices)


def transfer_table(table: SliceTable, options: TrainingOptions) -> SliceTable:
    """The slices that a student learns from: with `--unlabelled-share`, those without ground truth too."""
    return with_unlabelled(table, options.split) if getattr(options, "unlabelled_share", 0) else table


def what_crops_see(store: Store, options: TrainingOptions) -> str:
    """A line on the share of the target that training's crops never see."""
    shown, views = slice_table(store, options.split, "train", options.task), options.slice_views
    return coverage_line(unseen_target(shown, options.task, views), views)


@contextmanager
def open_job(options: TrainingOptions, tags: Mapping[str, Any]) -> Iterator[Job]:
    """Check the options against the data, claim the job's folder, and open the run above those of several stages.

    Raises `UserError` if the folder is not a job's, another process works in it, or it holds a job with other options
    or data.
    """
    store = open_store(options.dataset)
    task = ",".join(store.task(options.task).regions)
    for part in ("train", "val", "test"):
        slice_table(store, options.split, part, options.task)
    table = training_table(store, options)
    transfer = transfer_table(table, options)
    check_crop(store, options)
    if isinstance(options, DistillOptions):
        check_rounds(options.rounds, options.epochs_of(transfer), options.teacher_epochs_of(table))
    taught, warning = {"teacher": None}, ""
    if isinstance(options, DistillOptions) and options.teacher_checkpoint:
        check_teacher_task(store, options)
        warning = check_teacher_cases(store, options)
        taught = {"teacher": weights_hash(SavedNetworks(tuple(options.teacher_checkpoint)).load()[0])}
    elif isinstance(options, DistillOptions) and options.teacher_predictions:
        predicted, warning = check_predictions(transfer, options.teacher_predictions)
        taught |= {"predicted": predicted}
    listen_for_stop()
    accelerator = make_accelerator(options.accumulate, options.clip, options.timeout_minutes)
    if options.sync_batchnorm and accelerator.device.type != "cuda":
        raise UserError("--sync-batchnorm needs GPUs; leave it out on CPUs")
    check_shares(options, table, accelerator.num_processes)
    check_shares(options, transfer, accelerator.num_processes)
    check_warmup(options, transfer)
    data = split_fingerprints(store, options.split)
    facts = {"world_size": accelerator.num_processes, "git_commit": git_commit(), "seed": options.seed}
    facts |= {"job": options.folder.name, "dataset": options.dataset.stem, "task": task, "data": fingerprint(data)}
    facts |= tags
    facts |= fold_of(store, options.split, data)
    with ExitStack() as stack:

        def enter() -> None:
            check_folder(options.folder)
            options.folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(options.folder))
            claim(options.folder, options, data | taught)

        by_main(accelerator, enter)
        with above_stages(accelerator, options, facts) as tracker:
            tracker.dataset(dataset_facts(store, options))
            job = Job(options, accelerator, store, tracker, facts)
            if warning:
                job.say(f"warning: {warning}")
            job.say(by_main(accelerator, lambda: what_crops_see(store, options)))
            yield job
        if accelerator.is_main_process and (page := page_of(options.folder, options.tracking_uri)):
            job.say(page)
        shut_down(accelerator)


def dataset_facts(store: Store, options: TrainingOptions) -> dict[str, str]:
    """A store as a dataset of MLflow, which knows it by its name and fingerprint."""
    local = is_local(options.dataset)
    place = {"uri": str(options.dataset.absolute())} if local else {"url": str(options.dataset)}
    profile = {"cases": len(store.cases), "labels": ", ".join(store.attributes["labels"])}
    profile |= {part: len(store.split(options.split, part)) for part in PARTS}
    return {
        "name": options.dataset.stem,
        "digest": store.fingerprint(),
        "source_type": "local" if local else "http",
        "source": json.dumps(place),
        "profile": json.dumps(profile | {"split": options.split}),
        "context": "training",
    }


@contextmanager
def above_stages(accelerator: Accelerator, options: TrainingOptions, facts: Mapping[str, Any]) -> Iterator[Tracker]:
    """The run above those of a job's stages; a stand-in where the job is one network's training, unless an earlier
    version has begun it with one."""
    if not isinstance(options, DistillOptions) and not (options.folder / "tracking.jsonl").exists():
        yield null_tracker()
        return
    about = RunFacts(options.folder.name, options.folder, facts, plain(options))
    with tracked(accelerator, options, about) as tracker:
        tracker.artifact(options.folder / "config.yaml")
        yield tracker


class RunFacts(NamedTuple):
    """The name of an MLflow run, the folder of its journal, and its tags and parameters."""

    name: str
    folder: Path
    tags: Mapping[str, Any]
    params: Mapping[str, Any]


@contextmanager
def tracked(
    accelerator: Accelerator,
    options: TrainingOptions,
    about: RunFacts,
    parent: Tracker | None = None,
) -> Iterator[Tracker]:
    """An MLflow run that ends as the block does; a stand-in on all processes but the main one."""
    if accelerator.is_main_process:
        tags = {key: str(value) for key, value in (origin(accelerator) | dict(about.tags)).items()}
        uri, experiment = options.tracking_uri, options.experiment_name
        above = parent if isinstance(parent, Tracker) else options.sweep
        tracker = open_run(uri, experiment, about.name, about.folder, tags, about.params, above)
    else:
        tracker = null_tracker()
    status, failure = "FAILED", ""
    try:
        yield tracker
        status = "FINISHED"
    except (Interrupted, KeyboardInterrupt):
        status = "KILLED"
        raise
    except Exception as error:
        failure = failure_of(error)
        raise
    finally:
        tracker.finish(status, failure)


def is_done(job: Job, folder: Path) -> bool:
    """Whether a stage is over: tested, and its journal complete. What the server lacks of that is sent."""

    def look() -> bool:
        done = (folder / "test_cases.json").exists() and finished(folder)
        if done:
            send_rest(folder, job.options.tracking_uri)
        return done

    return by_main(job.accelerator, look)


def origin(accelerator: Accelerator) -> dict[str, str]:
    """Who runs what on which machine, as tags under MLflow's own names where it has some."""
    device = torch.cuda.get_device_name(accelerator.device) if accelerator.device.type == "cuda" else "cpu"
    return {
        "mlflow.user": user(),
        "mlflow.source.name": "spark-dist",
        "mlflow.source.type": "LOCAL",
        "mlflow.source.git.commit": git_commit(),
        "mixed_precision": accelerator.mixed_precision,
        "device": device,
        "torch": torch.__version__,
    }


def user() -> str:
    """The name of the one who runs this; a number where a machine has no names."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


@cache
def git_commit() -> str:
    """The commit of this package, or nothing where it does not lie in a repository."""
    line = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(line, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # no git here
        return ""
