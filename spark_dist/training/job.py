"""What a training job consists of: its folder, its runs in MLflow, and its stages (a teacher's, a student's)."""

import json
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator

from data_tools.errors import Interrupted, UserError
from data_tools.files import write_text
from data_tools.progress import console
from data_tools.store import Store, open_store
from spark_dist.config import TrainingOptions
from spark_dist.data.slices import SliceTable, slice_table, with_unlabelled

from .checks import check_crop, check_shares
from .distributed import listen_for_stop, make_accelerator, shut_down
from .tracking import Tracker, failure_of, null_tracker, open_run

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
        """The training slices with ground truth."""
        return training_table(self.store, self.options)

    @cached_property
    def transfer_table(self) -> SliceTable:
        """The slices that a student learns from: with `--unlabelled-share`, those without ground truth too."""
        return with_unlabelled(self.table, self.options.split) if self.options.unlabelled_share else self.table

    def say(self, text: str) -> None:
        """A line for people, once per job."""
        if self.accelerator.is_main_process:
            console.print(text)


def training_table(store: Store, options: TrainingOptions) -> SliceTable:
    """The training slices with ground truth."""
    return slice_table(store, options.split, "train", options.task, options.slices)


@contextmanager
def open_job(options: TrainingOptions, tags: Mapping[str, Any]) -> Iterator[Job]:
    """Check the options against the data, claim the job's folder, and open the parent run.

    Raises `UserError` if the folder holds a job with other options.
    """
    store = open_store(options.dataset)
    for part in ("train", "val", "test"):
        slice_table(store, options.split, part, options.task)
    table = training_table(store, options)
    check_crop(store, options)
    listen_for_stop()
    accelerator = make_accelerator(options.accumulate, options.clip, options.timeout_minutes)
    if options.sync_batchnorm and accelerator.device.type != "cuda":
        raise UserError("--sync-batchnorm needs GPUs; leave it out on CPUs")
    check_shares(options, table, accelerator.num_processes)
    if getattr(options, "unlabelled_share", 0):
        check_shares(options, with_unlabelled(table, options.split), accelerator.num_processes)
    claim(options.folder, options, accelerator)
    facts = {"world_size": accelerator.num_processes, "git_commit": git_commit(), "seed": options.seed}
    facts |= {"dataset": options.dataset.stem, "task": options.task, **tags}
    with tracked(accelerator, options, options.folder.name, options.folder, facts) as tracker:
        tracker.artifact(options.folder / "config.yaml")
        job = Job(options, accelerator, store, tracker)
        yield job
    if tracker.page:
        job.say(tracker.page)
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


def claim(folder: Path, options: TrainingOptions, accelerator: Accelerator) -> None:
    """Make the job's folder, or find that it holds this very job, which then goes on."""
    wanted = {key: value for key, value in plain(options).items() if key not in MAY_DIFFER}
    file = folder / "config.yaml"
    if file.exists() and not options.overwrite:
        found = read_options(file)
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


def read_options(file: Path) -> dict[str, Any]:
    """A job's record of its options. Raises `UserError` if it is none."""
    try:
        found = yaml.safe_load(file.read_text())
    except (ValueError, yaml.YAMLError) as error:
        found = " ".join(str(error).split())
    if not isinstance(found, dict):
        raise UserError(f"{file}: not the options of a job ({str(found)[:160]}); restore it, or give another --out")
    return found


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
