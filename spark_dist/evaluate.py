"""Per-case figures of a network on whole volumes."""

if __name__ == "__main__":
    from spark_dist.cli import module_main

    module_main("spark_dist.evaluate")

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rich.table import Table

from data_tools.progress import console
from data_tools.store import open_store
from spark_dist.data.views import Crop
from spark_dist.evaluation.cases import evaluate_cases, format_summaries, summaries
from spark_dist.evaluation.metrics import write_cases
from spark_dist.networks.checkpoint import load_network
from spark_dist.training.distributed import make_accelerator, shut_down

from .options import Options, Probability


@dataclass(kw_only=True)
class EvaluateOptions(Options):
    """Evaluate a checkpoint on one part of a split."""

    checkpoint: str = field(metadata={"positional": "trained network (best.safetensors)"})
    dataset: Path
    """Slice store made by spark-data prepare."""
    task: Literal["organ", "tumour"] | None = None
    """What is segmented; the default is what the network was trained for."""
    split: str = "default"
    """Name of the split in the store."""
    part: Literal["train", "val", "test"] = "test"
    """Part of the split."""
    threshold: Probability | None = None
    """Probability from which a voxel is the target; the default is the training's."""
    out: Path | None = None
    """JSON file for the figures of every case."""


OPTIONS = EvaluateOptions


def run(options: EvaluateOptions) -> None:
    """Print a table of the cases' figures, and write them if asked to."""
    network, description = load_network(Path(options.checkpoint))
    task = options.task or description["task"]
    threshold = options.threshold or description["threshold"]
    store = open_store(options.dataset)
    names = store.split(options.split, options.part)
    crop = Crop(tuple(description["crop"]), tuple(description["crop_shift"]))
    accelerator = make_accelerator()
    cases = evaluate_cases(accelerator, network.to(accelerator.device), store, names, task, crop, threshold)
    if accelerator.is_main_process:
        console.print(cases_table(cases, f"{options.checkpoint}: {task}, {options.part}, threshold {threshold:g}"))
        console.print(format_summaries(summaries(cases)))
        if options.out:
            write_cases(options.out, cases, task=task, split=options.part, threshold=threshold)
    shut_down(accelerator)


def cases_table(cases: Mapping[str, Mapping[str, float]], title: str) -> Table:
    """A row for each case, and the means with their intervals."""
    keys = list(next(iter(cases.values())))
    table = Table("case", *keys, title=title)
    for name, figures in cases.items():
        table.add_row(name, *(f"{figures[key]:.4f}" for key in keys))
    table.add_section()
    summary = summaries(cases)
    table.add_row("mean", *(f"{summary[key]['mean']:.4f}" for key in keys))
    table.add_row("95% interval", *(f"{summary[key]['low']:.3f}–{summary[key]['high']:.3f}" for key in keys))
    table.add_row("missed", *(str(summary[key]["misses"]) for key in keys))
    return table
