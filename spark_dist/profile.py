"""The cost of networks: spark-dist profile [NETWORK …] --crop 384"""

if __name__ == "__main__":
    from spark_dist.cli import module_main

    module_main("spark_dist.profile")

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
from rich.table import Table

from data_tools.errors import UserError
from data_tools.progress import console
from data_tools.tables import check_tables, write_tables
from spark_dist.networks import NETWORKS
from spark_dist.networks.cost import Cost, check_fits, measure

from .options import Count, Options, Pixels, Width


@dataclass(kw_only=True)
class ProfileOptions(Options):
    """Parameters, GFLOPs, activation memory and latency of networks."""

    networks: list[str] = field(metadata={"nargs": "*", "positional": "networks by name (default: all)"})
    crop: Pixels = 384
    """Side of a square slice, in pixels."""
    width: Width = 1.0
    """Factor on the number of filters."""
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
    costs = [measure(name, options.width, options.crop, device, options.repeats) for name in names]
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    table = Table(title=f"one {options.crop}×{options.crop} slice, {where}")
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
