"""Predictions of checkpoints beside the truth: spark-dist picture --dataset STORE --checkpoints …"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import nn

from data_tools.errors import UserError
from data_tools.store import TASKS, Store, open_store

from .checkpoint import load_network
from .data import Crop, VoxelReader
from .evaluate import probabilities
from .metrics import dice, overlap_counts
from .pictures import prediction_figure
from .progress import console


@dataclass(kw_only=True)
class PictureOptions:
    """Draw predictions of trained networks beside the truth."""

    checkpoints: list[str] = field(
        metadata={"nargs": "+", "positional": "trained networks, PATH or NAME=PATH; the name is the column's title"}
    )
    dataset: Path
    """Slice store made by spark-data prepare."""
    split: str = "default"
    """Name of the split in the store."""
    part: Literal["train", "val", "test"] = "test"
    """Part of the split."""
    rows: int = 4
    """How many cases to show, one slice of each: the one with most of the target."""
    out: Path = Path("predictions.png")
    """PNG file to write."""


OPTIONS = PictureOptions


def run(options: PictureOptions) -> None:
    """Draw the picture of the checkpoints' common task."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    networks, facts = {}, []
    for item in options.checkpoints:
        name, path = item.split("=", 1) if "=" in item else (Path(item).parent.name, item)
        network, description = load_network(Path(path))
        networks[name] = network.to(device)
        facts.append({key: description[key] for key in ("task", "crop", "crop_shift", "threshold")})
    if any(fact != facts[0] for fact in facts):
        raise UserError("the checkpoints differ in task, crop or threshold; draw them in separate pictures")
    crop = Crop(tuple(facts[0]["crop"]), tuple(facts[0]["crop_shift"]))
    store = open_store(options.dataset)
    cases = store.split(options.split, options.part)
    predictions_picture(
        store,
        cases,
        facts[0]["task"],
        crop,
        facts[0]["threshold"],
        networks,
        device,
        options.out,
        options.rows,
    )
    console.print(f"wrote {options.out}")


def predictions_picture(
    store: Store,
    cases: Sequence[str],
    task: str,
    crop: Crop,
    threshold: float,
    networks: Mapping[str, nn.Module],
    device: torch.device,
    path: Path,
    rows: int = 4,
) -> None:
    """Image, truth and each network's prediction in the fullest slice of up to `rows` cases, spread over `cases`."""
    reader = VoxelReader(store)
    drawn = []
    for position in np.unique(np.linspace(0, len(cases) - 1, min(rows, len(cases))).astype(int)):
        case = store.cases[cases[position]]
        z = int(case.label_counts[:, TASKS[task]].sum(axis=1).argmax())
        what = f"{store.path}: {case.name} slice {z}"
        # A copy, as what is read is good until the next slice.
        image = reader.slices(case.name, "image").start(z, what)()[np.newaxis].copy()
        truth = reader.slices(case.name, "label").start(z, what)()[np.newaxis] >= min(TASKS[task])
        predictions = {}
        for name, network in networks.items():
            predicted = probabilities(network, image, case, crop, device) >= threshold
            predictions[name] = (predicted[0], float(dice(overlap_counts(predicted, truth).sum(axis=0))))
        low, high = case.window
        shown = np.clip((image[0].astype(np.float32) - low) / (high - low), 0, 1) * 2 - 1
        drawn.append({"case": case.name, "slice": z, "image": shown, "truth": truth[0], "predictions": predictions})
    prediction_figure(drawn, path)
