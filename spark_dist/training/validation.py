"""A network's worth: on val, while it trains, and on test, once."""

from collections.abc import Callable
from pathlib import Path

from torch import nn

from spark_dist.evaluation.cases import evaluate_cases, format_summaries, summaries
from spark_dist.evaluation.figures import draw_predictions
from spark_dist.evaluation.metrics import write_cases
from spark_dist.networks.checkpoint import load_network

from .job import Job
from .tracking import Tracker

Validate = Callable[[nn.Module], dict[str, float]]
"""From a network to its metrics on the val cases; the epoch with the best `val/dice` is kept."""


def validation(job: Job) -> Validate:
    """A function from a network to its mean metrics over the val cases."""
    cases = job.store.split(job.options.split, "val")

    def validate(network: nn.Module) -> dict[str, float]:
        spec = job.options.slice_spec
        metrics = evaluate_cases(job.accelerator, network, job.store, cases, spec, distances=False)
        return {f"val/{key}": s["mean"] for key, s in summaries(metrics).items() if key.startswith("dice")}

    return validate


def evaluate_on_test(
    job: Job, role: str, checkpoint: Path, folder: Path, tracker: Tracker, teacher: Path | None = None
) -> None:
    """Metrics of a checkpoint on the test cases, and a picture (beside the teacher's), into `folder` and the run."""
    spec, device = job.options.slice_spec, job.accelerator.device
    network = load_network(checkpoint)[0].to(device)
    cases = job.store.split(job.options.split, "test")
    metrics = evaluate_cases(job.accelerator, network, job.store, cases, spec)
    summary = summaries(metrics)
    job.say(f"{role}: test {format_summaries(summary)}")
    tracker.metrics({f"test/{key}": s["mean"] for key, s in summary.items()}, step=0)
    if job.accelerator.is_main_process:
        networks = {"teacher": load_network(teacher)[0].to(device)} if teacher else {}
        networks[role] = network
        folder.mkdir(parents=True, exist_ok=True)
        picture = folder / "predictions.png"
        draw_predictions(job.store, cases, spec, networks, picture)
        tracker.artifact(picture)
        write_cases(folder / "test_cases.json", metrics, task=spec.task, split="test", threshold=spec.threshold)
        tracker.artifact(folder / "test_cases.json")
    job.accelerator.wait_for_everyone()
