"""Every fold of a cross-validation as a job: spark-dist crossval train --dataset STORE --split cv --network unet …"""

if __name__ == "__main__":
    from spark_dist.cli import module_main

    module_main("spark_dist.crossval")

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated

from data_tools.errors import Interrupted, UserError, unknown_name
from data_tools.progress import console
from data_tools.store import Store, open_store
from data_tools.workers import STOP_SIGNALS, started_by_this

from .cli import INTERRUPTED, REQUEUE
from .config import DistillOptions, NetworkOptions, TrainingOptions, TrainOptions
from .options import Bounds, flag

COMMANDS = {"train": TrainOptions, "distill": DistillOptions}


@dataclass(kw_only=True)
class CrossvalOptions(NetworkOptions, DistillOptions):
    """Train or distill on every fold of a cross-validation, one after another, with the options of either."""

    command: str = field(metadata={"positional": "train or distill"})
    network: str = ""
    """Name of the network that is trained alone (docs/networks.md)."""
    fold: Annotated[int, Bounds(at_least=-1, at_most=10**6)] = -1
    """Print this fold's options for the command, one word a line, for an array of jobs, and run nothing (-1: run
    all)."""
    accelerate_config: Path | None = None
    """Configuration of accelerate with which each fold's job is launched (none: one process)."""

    def __post_init__(self):
        super().__post_init__()
        if self.command not in COMMANDS:
            raise unknown_name("command", self.command, COMMANDS)
        if self.command == "train" and not self.network:
            raise UserError("--network must be given, the one to train")
        if self.accelerate_config and not self.accelerate_config.is_file():
            raise UserError(f"--accelerate-config {self.accelerate_config}: no such file")


OPTIONS = CrossvalOptions


def run(options: CrossvalOptions) -> None:
    """Run the folds' jobs. A fold that is done is not trained again, so that the same command goes on."""
    splits = folds_of(open_store(options.dataset), options.split)
    if options.fold >= len(splits):
        raise UserError(f"--fold {options.fold}: '{options.split}' has the folds 0 to {len(splits) - 1}")
    if options.fold >= 0:
        print("\n".join(words(job_options(options, splits[options.fold]))))
        return
    for number, split in enumerate(splits):
        job = job_options(options, split)
        console.print(f"fold {number} of {len(splits)}: {job.folder}", markup=False)
        code = start([*launcher(options), f"spark_dist.{options.command}", *words(job)])
        if code == REQUEUE:
            raise Interrupted(f"stopped as told in fold {number}; the same command goes on from there")
        if code == INTERRUPTED:
            raise KeyboardInterrupt
        if code:
            raise UserError(
                f"fold {number}: its job failed (exit code {code}); mend that, and the same command goes on"
            )
    compare = f"spark-dist compare --experiment {job.experiment_name} --tracking-uri {options.tracking_uri}"
    console.print(f"all {len(splits)} folds are done; {compare} pools them", markup=False)


def folds_of(store: Store, name: str) -> list[str]:
    """The splits of a cross-validation, in order. Raises `UserError` if there are none of that name, or not all."""
    found = {}
    for split, record in store.splits.items():
        made = record.get("made") or {}
        if re.fullmatch(re.escape(name) + r"-fold\d+", split) and "folds" in made:
            found[made["fold"]] = split
    if not found:
        make = f"spark-data split {store.path} --folds 5 --name {name}"
        raise UserError(f"{store.path}: has no folds of a split '{name}'; {make} makes them")
    if missing := set(range(store.splits[next(iter(found.values()))]["made"]["folds"])) - found.keys():
        raise UserError(f"{store.path}: split '{name}' lacks fold {min(missing)}; run spark-data split again")
    return [found[number] for number in sorted(found)]


def job_options(options: CrossvalOptions, split: str) -> TrainingOptions:
    """The options of a fold's job. Its folder lies in --out, if that is given."""
    kind = COMMANDS[options.command]
    values = {part.name: getattr(options, part.name) for part in fields(kind)}
    return kind(**values | {"split": split, "out": options.out and options.out / split})


def words(job: TrainingOptions) -> list[str]:
    """A command line of options, without those that have their default."""
    found = []
    for part in fields(job):
        value = getattr(job, part.name)
        if value not in (part.default, None, {}):
            text = str(value) if isinstance(value, (str, Path)) else json.dumps(value)
            found.append(f"{flag(part.name)}={text}")
    return found


def launcher(options: CrossvalOptions) -> list[str]:
    """The start of a command line that runs a module."""
    if not options.accelerate_config:
        return [sys.executable, "-m"]
    start = [sys.executable, "-m", "accelerate.commands.launch"]
    return [*start, "--config-file", str(options.accelerate_config), "-m"]


def start(line: Sequence[str]) -> int:
    """Run a job to its end, hand on to it what asks this process to stop, and return its exit code."""
    process = subprocess.Popen(line, env=os.environ | started_by_this())
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        for number in STOP_SIGNALS:
            signal.signal(number, lambda number, frame: process.send_signal(number))
        return process.wait()
    except KeyboardInterrupt:  # the terminal has told the job as well
        process.wait()
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
