"""A trained network as an ONNX file: spark-dist export CHECKPOINT OUT.onnx --dataset STORE"""

if __name__ == "__main__":
    from spark_dist.cli import module_main

    module_main("spark_dist.export")

from dataclasses import dataclass, field
from pathlib import Path
from shutil import copyfile
from tempfile import TemporaryDirectory

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from data_tools.errors import UserError
from data_tools.files import write_atomically
from data_tools.progress import console
from data_tools.store import Store, open_store
from spark_dist.data.batches import SliceDataset, to_device
from spark_dist.data.slices import part_of_split, slice_table
from spark_dist.evaluation.cases import evaluate_cases, summaries
from spark_dist.networks.checkpoint import ModelCard, load_network
from spark_dist.networks.int8 import quantise
from spark_dist.networks.onnx import LARGEST_DIFFERENCE, OnnxNetwork, difference, export_onnx
from spark_dist.training.distributed import make_accelerator, shut_down

from .options import Count, Options

CHECKED = 8
"""Slices that are computed by both."""


@dataclass(kw_only=True)
class ExportOptions(Options):
    """Write a trained network as an ONNX file, which predict, evaluate and profile take as they take a checkpoint, and
    compare its logits with PyTorch's on val slices; or, quantised to int8, its Dice with the float network's."""

    checkpoint: str = field(metadata={"positional": "trained network (best.safetensors)"})
    out: str = field(metadata={"positional": "file to write, .onnx; it must not be there yet"})
    dataset: Path
    """Slice store made by spark-data prepare."""
    split: str = "default"
    """Name of the split in the store."""
    int8: bool = False
    """Quantise weights and activations to 8 bits: half the size or less, faster where the processor is made for it; its
    Dice on the val cases is printed beside the float network's."""
    calibration_slices: Count = 128
    """Training slices that show int8 the range of each activation."""

    def __post_init__(self):
        super().__post_init__()
        if not self.out.lower().endswith(".onnx"):
            raise UserError(f"out {self.out}: must end in .onnx")
        if Path(self.out).exists():
            raise UserError(f"{self.out}: exists; remove it, or name another file")
        if self.checkpoint.lower().endswith(".onnx"):
            raise UserError(f"{self.checkpoint}: is exported already; give the .safetensors")


OPTIONS = ExportOptions


def run(options: ExportOptions) -> None:
    """Export, and compare. Raises `UserError`, and leaves no file, if the logits differ."""
    network, card = load_network(Path(options.checkpoint))
    store, out = open_store(options.dataset), Path(options.out)
    checked = some_slices(store, options.split, "val", card, CHECKED)
    calibration = some_slices(store, options.split, "train", card, options.calibration_slices) if options.int8 else ()
    accelerator = make_accelerator()
    with TemporaryDirectory() as folder:
        made = floating = Path(folder) / "float.onnx"
        plane = export_onnx(floating, network, card)
        found = difference(network, OnnxNetwork(floating), checked)
        if found >= LARGEST_DIFFERENCE:
            raise UserError(
                f"{options.checkpoint}: as ONNX its logits differ by {found:.1g} from PyTorch's; use the .safetensors"
            )
        sizes = f"{plane[0]}×{plane[1]}" if plane else f"any size in multiples of {network.stride}"
        line = f"{out}: {card.network}, slices of {sizes}; logits differ by {found:.1g} on {len(checked)} val slices"
        if options.int8:
            made = Path(folder) / "int8.onnx"
            quantise(floating, made, calibration)
            before, after = (
                val_dice(accelerator, OnnxNetwork(path), store, options.split, card) for path in (floating, made)
            )
            line += (
                f" in float\nint8, calibrated on {len(calibration)} training slices: val Dice {after:.4f}, in float "
                f"{before:.4f} ({100 * (after - before):+.2f} points); "
                f"{made.stat().st_size / 1e6:.2f} MB, in float {floating.stat().st_size / 1e6:.2f} MB"
            )
        write_atomically(out, lambda aside: copyfile(made, aside))
    console.print(line)
    shut_down(accelerator)


def some_slices(store: Store, split: str, part: str, card: ModelCard, count: int) -> torch.Tensor:
    """Up to `count` slices of a part of a split, evenly among all, as the network sees them, (N, C, H, W)."""
    table = slice_table(store, split, part, card.spec.task, "all")
    dataset = SliceDataset(table, card.spec)
    rows = np.linspace(0, len(table) - 1, min(count, len(table))).astype(int) * dataset.views.count
    return to_device(dataset.__getitems__(rows), dataset, torch.device("cpu")).image


def val_dice(accelerator: Accelerator, network: nn.Module, store: Store, split: str, card: ModelCard) -> float:
    """The mean Dice over the whole volumes of the val cases, as evaluate measures it."""
    cases = part_of_split(store, split, "val")
    found = evaluate_cases(accelerator, network, store, cases, card.spec, tolerance=None)
    return summaries(found)["dice"]["mean"]
