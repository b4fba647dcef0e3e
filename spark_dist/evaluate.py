"""Per-case figures of a network on whole volumes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from rich.table import Table
from torch import nn

from data_tools.store import TASKS, Case, Store, open_store

from .checkpoint import load_network
from .cli import module_main
from .data import Crop, VoxelReader, windowed
from .distributed import make_accelerator, shut_down
from .metrics import case_metrics, summarise, write_cases
from .progress import console


@dataclass(kw_only=True)
class EvaluateOptions:
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
    threshold: float | None = None
    """Probability from which a voxel is the target; the default is the training's."""
    out: Path | None = None
    """JSON file for the figures of every case."""


OPTIONS = EvaluateOptions

LABELLED_THRESHOLD = 0.4
"""Probability from which a voxel is the target in the original system's protocol, `labelled-slices`."""


@torch.no_grad()
def probabilities(
    network: nn.Module, image: np.ndarray, case: Case, crop: Crop, device: torch.device, batch_size: int = 16
) -> np.ndarray:
    """The target's probability in every voxel of slices of a case, (Z, H, W) float32; 0 outside the crop.

    `image` (Z, H, W) in the store's intensities. The network is put into eval mode and left as it was.
    """
    inside, placed = crop.overlap(case.shape[1:])
    result = np.zeros((len(image), *case.shape[1:]), np.float32)
    window = torch.tensor(case.window, dtype=torch.float32, device=device)
    was_training = network.training
    network.eval()
    for start in range(0, len(image), batch_size):
        part = image[start : start + batch_size]
        crops = np.full((len(part), *crop.size), np.floor(case.window[0]), image.dtype)
        crops[:, *placed] = part[:, *inside]
        batch = windowed(torch.from_numpy(crops).to(device), window.expand(len(part), 2))
        target = network(batch).logits.float().softmax(dim=1)[:, 1].cpu().numpy()
        result[start : start + len(part), *inside] = target[:, *placed]
    network.train(was_training)
    return result


def evaluate_cases(
    accelerator: Accelerator,
    network: nn.Module,
    store: Store,
    cases: Sequence[str],
    task: str,
    crop: Crop,
    threshold: float = 0.5,
    distances: bool = True,
) -> dict[str, dict[str, Any]]:
    """Every case's figures, by case name, the same on every process.

    Cases are shared among the processes and each is predicted whole by one of them, so that the figures do not depend
    on how many there are. Both protocols: `volume` at `threshold` and `labelled-slices` at `LABELLED_THRESHOLD`.
    """
    reader = VoxelReader(store)
    own = {}
    for name in shares(store, cases, accelerator.num_processes)[accelerator.process_index]:
        case = store.cases[name]
        target = probabilities(network, reader.case(name, "image"), case, crop, accelerator.device)
        truth = reader.case(name, "label") >= min(TASKS[task])
        own[name] = case_metrics(
            target >= threshold, truth, case.spacing, distances, labelled=target >= LABELLED_THRESHOLD
        )
    return dict(sorted(item for part in gather_object([own]) for item in part.items()))


def shares(store: Store, cases: Sequence[str], world: int) -> list[list[str]]:
    """Cases for each process, so that their slices are about even."""
    result: list[list[str]] = [[] for _ in range(world)]
    load = [0] * world
    for name in sorted(cases, key=lambda name: (-store.cases[name].shape[0], name)):
        least = load.index(min(load))
        result[least].append(name)
        load[least] += store.cases[name].shape[0]
    return result


def summaries(cases: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, Any]]:
    """Each figure's mean, 95% interval and misses over cases (see `metrics.summarise`)."""
    return {key: summarise([figures[key] for figures in cases.values()]) for key in next(iter(cases.values()))}


def format_summaries(summary: Mapping[str, Mapping[str, Any]]) -> str:
    """The figures that one looks at first, in a line."""
    dice, hd95 = summary["dice"], summary["hd95"]
    text = f"Dice {dice['mean']:.4f} [{dice['low']:.4f}, {dice['high']:.4f}] over {dice['cases']} cases"
    text += f", HD95 {hd95['mean']:.1f} mm"
    return text + (f" without {hd95['misses']} missed cases" if hd95["misses"] else "")


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


if __name__ == "__main__":
    module_main("spark_dist.evaluate")
