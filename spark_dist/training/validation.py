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
from spark_dist.evaluation.cases import evaluate_cases, format_summaries, summaries
from spark_dist.evaluation.figures import draw_predictions
from spark_dist.evaluation.metrics import read_cases, write_cases
from spark_dist.evaluation.panel import draw_panel, shown_slices
from spark_dist.networks.checkpoint import ModelCard
from spark_dist.teacher.saved import SavedNetworks

from .distributed import by_main
from .job import Job
from .tracking import Tracker

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
    file, picture = folder / "test_cases.json", folder / "predictions.png"
    before = by_main(job.accelerator, lambda: metrics_before(file))
    metrics = before or evaluate_cases(job.accelerator, network, job.store, cases, spec)
    summary = summaries(metrics)
    job.say(f"{role}: test {format_summaries(summary)}")
    tracker.metrics({f"test/{key}": s["mean"] for key, s in summary.items()}, step=0)
    results = results_of(summary, card)
    tracker.metrics(results, step=0)
    # Under the same names too, so that it stands beside a student alone, which has no run above it.
    above = {f"{role}/{key}": value for key, value in results.items()} | (results if role == "student" else {})
    job.tracker.metrics(above, step=0)
    if job.accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        if not before or not picture.exists():
            networks = {"teacher": teacher.load()[0].to(device)} if teacher else {}
            draw_predictions(job.store, cases, spec, networks | {role: network}, picture)
            write_cases(file, metrics, task=spec.task, split="test", threshold=spec.threshold)
        tracker.artifact(picture)
        tracker.artifact(file)
        write_text(folder / TABLE, json.dumps(as_table(metrics)))
        log_table(tracker, folder)
    job.accelerator.wait_for_everyone()


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
