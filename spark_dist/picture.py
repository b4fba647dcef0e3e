"""Predictions of checkpoints beside the ground truth: spark-dist picture NAME=CHECKPOINT … --dataset STORE"""

if __name__ == "__main__":
    from spark_dist.cli import module_main

    module_main("spark_dist.picture")

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from data_tools.errors import UserError
from data_tools.ownership import check_output
from data_tools.progress import console
from data_tools.store import open_store
from spark_dist.data.slices import part_of_split
from spark_dist.evaluation.figures import check_format, draw_predictions
from spark_dist.networks.checkpoint import load_network

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
    networks, specs = {}, []
    for item in options.checkpoints:
        name, path = item.split("=", 1) if "=" in item else (Path(item).parent.name, item)
        network, card = load_network(Path(path))
        networks[name] = network.to(device)
        specs.append(card.spec)
    if any(spec != specs[0] for spec in specs):
        raise UserError("the checkpoints differ in task, crop or threshold; draw them in separate pictures")
    store = open_store(options.dataset)
    cases = part_of_split(store, options.split, options.part)
    draw_predictions(store, cases, specs[0], networks, options.out, options.rows)
    console.print(f"wrote {options.out}")
