"""A trained network as an ONNX file: spark-dist export CHECKPOINT OUT.onnx --dataset STORE"""

if __name__ == "__main__":
    from spark_dist.cli import module_main

    module_main("spark_dist.export")

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from data_tools.errors import UserError
from data_tools.progress import console
from data_tools.store import open_store
from spark_dist.data.batches import SliceDataset, to_device
from spark_dist.data.slices import slice_table
from spark_dist.data.views import SliceSpec
from spark_dist.networks.checkpoint import load_network
from spark_dist.networks.onnx import LARGEST_DIFFERENCE, OnnxNetwork, difference, export_onnx

from .options import Options

CHECKED = 8
"""Slices that are computed by both."""


@dataclass(kw_only=True)
class ExportOptions(Options):
    """Write a trained network as an ONNX file, which predict and evaluate take as they take a checkpoint, and compare
    its logits with PyTorch's on val slices."""

    checkpoint: str = field(metadata={"positional": "trained network (best.safetensors)"})
    out: str = field(metadata={"positional": "file to write, .onnx; it must not be there yet"})
    dataset: Path
    """Slice store made by spark-data prepare."""
    split: str = "default"
    """Name of the split in the store."""

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
    slices, out = val_slices(options, card.spec), Path(options.out)
    plane = export_onnx(out, network, card)
    found = difference(network, OnnxNetwork(out), slices)
    if found >= LARGEST_DIFFERENCE:
        out.unlink()
        raise UserError(f"{out}: logits differ by {found:.1g} from PyTorch's; use the .safetensors")
    sizes = f"{plane[0]}×{plane[1]}" if plane else f"any size in multiples of {network.stride}"
    console.print(f"{out}: {card.network}, slices of {sizes}; logits differ by {found:.1g} on {len(slices)} val slices")


def val_slices(options: ExportOptions, spec: SliceSpec) -> torch.Tensor:
    """Some val slices as the network sees them, (N, C, H, W)."""
    table = slice_table(open_store(options.dataset), options.split, "val", spec.task)
    dataset = SliceDataset(table, spec)
    rows = np.unique(np.linspace(0, len(table) - 1, CHECKED).astype(int)) * dataset.views.count
    return to_device(dataset.__getitems__(rows), dataset, torch.device("cpu")).image
