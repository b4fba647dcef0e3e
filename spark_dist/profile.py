"""The cost of networks: spark-dist profile [NETWORK …] --crop 384 [--task organ,tumour] [--context 1]"""

if __name__ == "__main__":
    from spark_dist.cli import module_main

    module_main("spark_dist.profile")

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
from rich.table import Table

from data_tools.errors import UserError
from data_tools.labels import names_in
from data_tools.progress import console
from data_tools.tables import check_tables, write_tables
from spark_dist.data.views import Crop, SliceSpec
from spark_dist.networks import NETWORKS
from spark_dist.networks.cost import Cost, Model, check_fits, measure

from .options import Context, Count, Options, Pixels, Width


@dataclass(kw_only=True)
class ProfileOptions(Options):
    """Parameters, GFLOPs, activation memory and latency of networks."""

    networks: list[str] = field(metadata={"nargs": "*", "positional": "networks by name (default: all)"})
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
    for name in names:
        check_fits(name, options.width, options.crop)
    spec = SliceSpec(options.task, Crop((options.crop, options.crop)), context=options.context)
    models = [Model(name, options.width, spec.channels, spec.classes) for name in names]
    costs = [measure(model, options.crop, device, options.repeats) for model in models]
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    what = f"one {options.crop}×{options.crop} slice"
    what += f" and {2 * options.context} neighbours" if options.context else ""
    table = Table(title=f"{what}, {spec.classes} classes, {where}")
    for name in ("network", "parameters", "GFLOPs", "activations MiB", "latency ms"):
        table.add_column(name, justify="left" if name == "network" else "right", no_wrap=True)
    for c in costs:
        cells = (f"{c.parameters:,}", f"{c.gflops:.3f}", f"{c.activations_mib:.1f}", f"{c.latency_ms:.1f}")
        table.add_row(c.network, *cells)
    console.print(table)
    write_tables(map(asdict, costs), columns, options.csv, options.json)


def devices() -> list[str]:
    """Devices on which networks can be measured, the fastest first."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [*(["cuda"] if gpus else []), "cpu", *(f"cuda:{n}" for n in range(gpus))]
