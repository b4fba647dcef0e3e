"""Predictions of checkpoints beside the ground truth: spark-dist picture NAME=CHECKPOINT … --dataset STORE"""

if __name__ == "__main__":
    from spark_dist.cli import module_main

    module_main("spark_dist.picture")

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from data_tools.ownership import check_output
from data_tools.progress import console
from data_tools.store import open_store
from spark_dist.data.slices import part_of_split
from spark_dist.evaluation.figures import check_format, draw_predictions
from spark_dist.networks.checkpoint import load_named

from .options import Count, Options


@dataclass(kw_only=True)
class PictureOptions(Options):
    """Draw predictions of trained networks beside the ground truth."""

    checkpoints: list[str] = field(
        metadata={"nargs": "+", "positional": "trained networks, PATH or NAME=PATH; the name is the column's title"}
    )
    dataset: Path
    """Slice store made by spark-data prepare."""
    split: str = "default"
    """Name of the split in the store."""
    part: Literal["train", "val", "test"] = "test"
    """Part of the split."""
    rows: Count = 4
    """How many cases to show, one slice of each: the one with most of the target."""
    out: Path = Path("predictions.png")
    """File to write; its name's end says in which format: .png, .pdf, .svg …"""

    def __post_init__(self):
        super().__post_init__()
        check_format(self.out, "--out")


OPTIONS = PictureOptions


def run(options: PictureOptions) -> None:
    """Draw the picture of the checkpoints' common task."""
    check_output(options.out)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    networks, spec = load_named(options.checkpoints)
    networks = {name: network.to(device) for name, network in networks.items()}
    store = open_store(options.dataset)
    cases = part_of_split(store, options.split, options.part)
    draw_predictions(store, cases, spec, networks, options.out, options.rows)
    console.print(f"wrote {options.out}")
