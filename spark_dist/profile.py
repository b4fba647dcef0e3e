"""The cost of networks: spark-dist profile [NETWORK or CHECKPOINT …] --crop 384 [--task organ,tumour] [--context 1]"""

if __name__ == "__main__":
    from spark_dist.cli import module_main

    module_main("spark_dist.profile")

import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
from rich.table import Table
from torch import nn

from data_tools.errors import UserError
from data_tools.labels import names_in
from data_tools.progress import console
from data_tools.tables import check_tables, write_tables
from spark_dist.data.views import Crop, SliceSpec
from spark_dist.networks import NETWORKS, build_network
from spark_dist.networks.checkpoint import is_checkpoint, load_network
from spark_dist.networks.cost import Cost, Model, measure
from spark_dist.networks.onnx import OnnxNetwork

from .options import Context, Count, Options, Pixels, Width


@dataclass(kw_only=True)
class ProfileOptions(Options):
    """Parameters, GFLOPs, activation memory and latency of networks, of which some may be trained ones in files."""

    networks: list[str] = field(
        metadata={
            "nargs": "*",
            "positional": "networks by name (default: all), and trained ones (.safetensors, .onnx), whose width, "
            "classes and neighbours are their own",
        }
    )
    crop: Pixels = 384
    """Side of a square slice, in pixels."""
    width: Width = 1.0
    """Factor on the number of filters."""
    task: str = "organ"
    """The regions that are told apart, as in training (organ,tumour): the network has a class for each, and the
    background."""
    context: Context = 0
    """Neighbouring slices on either side that the network is given, as in training."""
    repeats: Count = 10
    """Forward passes that the median latency is of."""
    device: str = ""
    """cpu or cuda (default: cuda where there is one)."""
    csv: Path | None = None
    """CSV file for the table."""
    json: Path | None = None
    """JSON file for the table."""

    def __post_init__(self):
        super().__post_init__()
        if names_in(self.task) == ["all"]:
            raise UserError("--task all: name the regions (organ,tumour), as no data set says here which they are")
        if self.device and self.device not in (found := devices()):
            raise UserError(f"--device {self.device}: there is none of that name here, only {', '.join(found)}")


OPTIONS = ProfileOptions


def run(options: ProfileOptions) -> None:
    """Print the table, and write it if asked to."""
    names, columns = options.networks or sorted(NETWORKS), [column.name for column in fields(Cost)]
    check_tables(columns, options.csv, options.json)
    device = torch.device(options.device or devices()[0])
    spec = SliceSpec(options.task, Crop((options.crop, options.crop)), context=options.context)
    for name in names:
        if not is_checkpoint(name):
            with torch.device("meta"):  # A wrong name or crop is told before large networks are built.
                check_fits(name, build_network(name, width=options.width), options.crop)
    networks = {
        name: trained(name, options.crop, device) if is_checkpoint(name) else fresh(name, options.width, spec)
        for name in names
    }
    costs = measure(networks, options.crop, device, options.repeats)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    what = f"one {options.crop}×{options.crop} slice"
    what += f" and {2 * options.context} neighbours" if options.context else ""
    table = Table(title=f"{what}, {spec.classes} classes, {where}")
    for name in ("network", "parameters", "GFLOPs", "activations MiB", "latency ms", "to the first"):
        table.add_column(name, justify="left" if name == "network" else "right", no_wrap=True)
    for c in costs:
        memory = "–" if math.isnan(c.activations_mib) else f"{c.activations_mib:.1f}"
        cells = (
            f"{c.parameters:,}",
            f"{c.gflops:.3f}",
            memory,
            f"{c.latency_ms:.1f}",
            f"{c.latency_ms / costs[0].latency_ms:.2f}",
        )
        table.add_row(c.network, *cells)
    console.print(table)
    write_tables(map(asdict, costs), columns, options.csv, options.json)


def fresh(name: str, width: float, spec: SliceSpec) -> tuple[nn.Module, Model]:
    """A network by its name, with fresh weights."""
    model = Model(name, width, spec.channels, spec.classes)
    return model.build(), model


def trained(path: str, crop: int, device: torch.device) -> tuple[nn.Module, Model]:
    """A network in a file. Raises `UserError` for a crop or device that it does not take."""
    network, card = load_network(Path(path))
    check_fits(path, network, crop)
    if isinstance(network, OnnxNetwork) and device.type != "cpu":
        raise UserError(f"{path}: is computed on the CPU; pass --device cpu, so that all networks are")
    return network, Model(card.network, card.width, card.in_channels, card.classes)


def check_fits(name: str, network: nn.Module, crop: int) -> None:
    """Raises `UserError` for a crop that a network does not take."""
    if crop % network.stride:
        raise UserError(f"--crop {crop} must be a multiple of {network.stride} for {name}")
    bound = getattr(network, "bound_to", None)
    if bound and all(bound) and bound != (crop, crop):
        raise UserError(f"--crop {crop}: {name} takes slices of {bound[0]}×{bound[1]} alone")


def devices() -> list[str]:
    """Devices on which networks can be measured, the fastest first."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [*(["cuda"] if gpus else []), "cpu", *(f"cuda:{n}" for n in range(gpus))]
