"""A network's worth: on val, while it trains, and on test, once."""

import json
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from torch.compiler import set_stance

from data_tools.errors import UserError
from data_tools.files import write_text
from spark_dist.evaluation.cases import evaluate_cases, evaluate_predictions, format_summaries, summaries
from spark_dist.evaluation.figures import draw_predictions
from spark_dist.evaluation.metrics import read_cases, write_cases
from spark_dist.evaluation.panel import draw_panel, shown_slices
from spark_dist.networks.checkpoint import ModelCard
from spark_dist.teacher.saved import SavedNetworks

from .distributed import by_main
from .job import Job
from .logged_model import describe
from .tracking import Tracker

TEST_CASES = "test_cases.json"
"""The test cases' metrics, whose being there says that a stage is tested."""
TABLE = "cases.json"
"""The test cases' metrics as a table of MLflow."""

Validate = Callable[[nn.Module], dict[str, float]]
"""From a network to its metrics on the val cases; the epoch with the best `val/dice` is kept."""


def validation(job: Job) -> Validate:
    """A function from a network to its mean metrics over the val cases."""
    cases = job.store.split(job.options.split, "val")

    # Compiled, a network would be compiled anew for planes of every other size, which takes longer than the evaluation.
    @set_stance("force_eager")
    def validate(network: nn.Module) -> dict[str, float]:
        metrics = evaluate_cases(job.accelerator, network, job.store, cases, job.spec, tolerance=None)
        return {f"val/{key}": s["mean"] for key, s in summaries(metrics).items() if key.startswith("dice")}

    return validate


def panel(job: Job) -> Callable[[nn.Module], np.ndarray]:
    """A function from a network to a picture of its predictions on a few val slices, which are read when it is first
    called."""
    cases = job.store.split(job.options.split, "val")
    slices = cache(lambda: shown_slices(job.store, cases, job.spec))
    return set_stance("force_eager")(lambda network: draw_panel(network, slices(), job.spec))


def evaluate_on_test(
    job: Job, role: str, saved: SavedNetworks, folder: Path, tracker: Tracker, teacher: SavedNetworks | None = None
) -> None:
    """Metrics of a saved network on the test cases, and a picture (beside the teacher's), into `folder` and the run.

    What is in the folder already, from before a kill, is only logged again.
    """
    spec, device = job.spec, job.accelerator.device
    network, card = saved.load()
    network = network.to(device)
    cases = job.store.split(job.options.split, "test")
    metrics = by_main(job.accelerator, lambda: metrics_before(folder / TEST_CASES))
    fresh = metrics is None
    if fresh:
        metrics = evaluate_cases(job.accelerator, network, job.store, cases, spec)
    picture = folder / "predictions.png"
    if job.accelerator.is_main_process and (fresh or not picture.exists()):
        folder.mkdir(parents=True, exist_ok=True)
        networks = {"teacher": teacher.load()[0].to(device)} if teacher else {}
        draw_predictions(job.store, cases, spec, networks | {role: network}, picture)
    log_test(job, role, metrics, card, tracker)
    tracker.tags({"mlflow.note.content": f"Test {format_summaries(summaries(metrics))}.\n\n{describe(card)}"})


def evaluate_foreign_on_test(job: Job, card: ModelCard, tracker: Tracker) -> None:
    """Metrics of a foreign teacher's predictions of the test cases, into the teacher's folder and run."""
    name, cases = job.options.teacher_predictions, job.store.split(job.options.split, "test")
    before = by_main(job.accelerator, lambda: metrics_before(job.folder / "teacher" / TEST_CASES))
    metrics = before or evaluate_predictions(job.accelerator, job.store, name, cases, job.spec)
    log_test(job, "teacher", metrics, card, tracker)


def log_test(
    job: Job, role: str, metrics: Mapping[str, Mapping[str, float]], card: ModelCard, tracker: Tracker
) -> None:
    """Write the metrics of the test cases into a stage's folder, and log them and its picture."""
    summary, folder = summaries(metrics), job.folder / role
    job.say(f"{role}: test {format_summaries(summary)}")
    tracker.metrics({f"test/{key}": s["mean"] for key, s in summary.items()}, step=0)
    log_results(job, role, tracker, results_of(summary, card))
    if job.accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        file, picture = folder / TEST_CASES, folder / "predictions.png"
        if metrics_before(file) != metrics:
            write_cases(file, metrics, task=job.spec.task, split="test", threshold=job.spec.threshold)
        if picture.exists():
            tracker.artifact(picture)
        tracker.artifact(file)
        write_text(folder / TABLE, json.dumps(as_table(metrics)))
        log_table(tracker, folder)
    job.accelerator.wait_for_everyone()


def log_results(job: Job, role: str, tracker: Tracker, values: Mapping[str, float]) -> None:
    """Log numbers that a network is chosen by, in its own run and in the job's."""
    tracker.metrics(values, step=0)
    # Those of a student under the same names too, so that it stands beside one alone, which has no run above it.
    named = {f"{role}/{key}": value for key, value in values.items()}
    job.tracker.metrics(named | (dict(values) if role == "student" else {}), step=0)


def log_table(tracker: Tracker, folder: Path) -> None:
    """Log the table of a stage's test cases, if it is there, as MLflow's own `log_table` does, which would append to
    one that has been sent before."""
    if (folder / TABLE).exists():
        tracker.artifact(folder / TABLE)
        tracker.tags({"mlflow.loggedArtifacts": json.dumps([{"path": TABLE, "type": "table"}])})


def results_of(summary: Mapping[str, Mapping[str, Any]], card: ModelCard) -> dict[str, float]:
    """Numbers that a run is looked at for: test Dice with its 95% interval, missed cases, the best epoch on val."""
    dice = summary["dice"]
    found = {f"test_dice{end}": dice[key] for end, key in (("", "mean"), ("_low", "low"), ("_high", "high"))}
    found |= {"test_misses": summary["hd95"]["misses"], "test_hd95_mm": summary["hd95"]["mean"]}
    if card.val_dice is not None:
        found |= {"best_val_dice": card.val_dice, "best_epoch": card.epoch}
    return found


def as_table(cases: Mapping[str, Mapping[str, float]]) -> dict[str, list]:
    """A row for each case, as MLflow's pages show tables side by side. What is not finite is null."""
    names = list(next(iter(cases.values())))
    rows = [
        [case, *(values[name] if math.isfinite(values[name]) else None for name in names)]
        for case, values in sorted(cases.items())
    ]
    return {"columns": ["case", *names], "data": rows}


def metrics_before(file: Path) -> dict[str, dict[str, float]] | None:
    """The metrics that a stage has written already, if they can be read."""
    with suppress(UserError):
        return read_cases(file)
    return None
