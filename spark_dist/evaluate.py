"""Per-case metrics of a network on whole volumes."""

if __name__ == "__main__":
    from spark_dist.cli import module_main

    module_main("spark_dist.evaluate")

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from rich.table import Table

from data_tools.ownership import check_output
from data_tools.progress import console
from data_tools.store import open_store
from spark_dist.data.slices import part_of_split
from spark_dist.evaluation.cases import evaluate_cases, format_summaries, measured_regions, summaries
from spark_dist.evaluation.metrics import TOLERANCE, write_cases
from spark_dist.networks.checkpoint import load_network
from spark_dist.networks.ensemble import Ensemble
from spark_dist.training.distributed import make_accelerator, shut_down

from .options import NonNegative, Options, Probability


@dataclass(kw_only=True)
class EvaluateOptions(Options):
    """Evaluate a checkpoint on one part of a split."""

    checkpoint: str = field(metadata={"positional": "trained network (best.safetensors)"})
    dataset: Path
    """Slice store made by spark-data prepare."""
    task: str | None = None
    """What is measured: regions that consist of the network's classes, or all of these; the default is what the network
    was trained for."""
    split: str = "default"
    """Name of the split in the store."""
    part: Literal["train", "val", "test"] = "test"
    """Part of the split."""
    threshold: Probability | None = None
    """Probability from which a voxel is the target; the default is the training's."""
    tta: Literal["none", "flips"] = "none"
    """Test-time augmentation: none, or the mean over the four flips of each slice, which takes four times as long."""
    largest_component: bool = False
    """Keep only the largest component of each class, in the protocol over whole volumes."""
    surface_tolerance: NonNegative = TOLERANCE
    """Distance in mm up to which surfaces agree for the surface Dice."""
    out: Path | None = None
    """JSON file for the metrics of every case."""


OPTIONS = EvaluateOptions


def run(options: EvaluateOptions) -> None:
    """Print a table of the cases' metrics, and write them if asked to."""
    if options.out:
        check_output(options.out)
    network, card = load_network(Path(options.checkpoint))
    spec = replace(card.spec, threshold=options.threshold or card.spec.threshold)
    store = open_store(options.dataset)
    regions = measured_regions(store, spec, options.task)
    names = part_of_split(store, options.split, options.part)
    accelerator = make_accelerator()
    network, tolerance = Ensemble([network], options.tta == "flips").to(accelerator.device), options.surface_tolerance
    cases = evaluate_cases(
        accelerator, network, store, names, spec, tolerance, regions, largest_component=options.largest_component
    )
    if accelerator.is_main_process:
        title = f"{options.checkpoint}: {', '.join(regions)}, {options.part}, threshold {spec.threshold:g}"
        title += f", surface Dice at {tolerance:g} mm"
        title += ", flips averaged" * (options.tta == "flips") + ", largest component" * options.largest_component
        console.print(cases_table(cases, title))
        console.print(format_summaries(summaries(cases)))
        if options.out:
            facts = {"task": ",".join(regions), "split": options.part, "threshold": spec.threshold, "tta": options.tta}
            facts["largest_component"] = options.largest_component
            write_cases(options.out, cases, **facts, surface_tolerance=tolerance)
    shut_down(accelerator)


def cases_table(cases: Mapping[str, Mapping[str, float]], title: str) -> Table:
    """A row for each case, and of several regions for each of them, and the means with their intervals."""
    keys = list(dict.fromkeys(key.partition(".")[0] for key in next(iter(cases.values()))))
    regions = list(dict.fromkeys(key.partition(".")[2] for key in next(iter(cases.values()))))
    several = len(regions) > 1
    table = Table("case", *["region"] * several, *keys, title=title)
    summary = summaries(cases)

    def add(name: str, text: Callable[[str], str]) -> None:
        for region in regions:
            values = (text(f"{key}.{region}" if region else key) for key in keys)
            table.add_row(name, *[region or "mean"] * several, *values)

    for name, metrics in cases.items():
        add(name, lambda key, metrics=metrics: f"{metrics[key]:.4f}")
    table.add_section()
    add("mean", lambda key: f"{summary[key]['mean']:.4f}")
    add("95% interval", lambda key: f"{summary[key]['low']:.3f}–{summary[key]['high']:.3f}")
    add("missed", lambda key: str(summary[key]["misses"]))
    return table
