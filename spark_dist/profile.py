"""What networks cost: spark-dist profile [NETWORK …] --crop 384"""

if __name__ == "__main__":
    from spark_dist.cli import module_main

    module_main("spark_dist.profile")

import csv
import json
import statistics
import time
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from data_tools.errors import UserError
from data_tools.progress import console
from spark_dist.networks import NETWORKS, build_network

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


@dataclass(frozen=True)
class Cost:
    """What one slice costs in evaluation, in float32."""

    network: str
    parameters: int
    gflops: float
    """A multiply-add counts 2."""
    activations_mib: float
    """The largest sum of what layers have computed and still need."""
    latency_ms: float
    """Median over forward passes of one slice."""


def run(options: ProfileOptions) -> None:
    """Print the table, and write it if asked to."""
    names = options.networks or sorted(NETWORKS)
    device = torch.device(options.device or devices()[0])
    costs = [cost(name, options.width, options.crop, device, options.repeats) for name in names]
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    table = Table(title=f"one {options.crop}×{options.crop} slice, {where}")
    for name in ("network", "parameters", "GFLOPs", "activations MiB", "latency ms"):
        table.add_column(name, justify="left" if name == "network" else "right", no_wrap=True)
    for c in costs:
        cells = (f"{c.parameters:,}", f"{c.gflops:.3f}", f"{c.activations_mib:.1f}", f"{c.latency_ms:.1f}")
        table.add_row(c.network, *cells)
    console.print(table)
    if options.json:
        options.json.write_text(json.dumps([asdict(c) for c in costs], indent=1))
    if options.csv:
        with open(options.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, list(asdict(costs[0])))
            writer.writeheader()
            writer.writerows(asdict(c) for c in costs)


def devices() -> list[str]:
    """Where networks can be measured, the fastest first."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [*(["cuda"] if gpus else []), "cpu", *(f"cuda:{n}" for n in range(gpus))]


@torch.no_grad()
def cost(name: str, width: float, crop: int, device: torch.device, repeats: int) -> Cost:
    """Measure one network. Raises `UserError` for a network that there is not, or a crop that does not fit it."""
    network = build_network(name, width=width).to(device).eval()
    if crop % network.stride:
        raise UserError(f"--crop {crop} must be a multiple of {network.stride} for {name}")
    image = torch.randn(1, 1, crop, crop, device=device)
    if hasattr(network, "set_support"):
        network.set_support(image.expand(8, -1, -1, -1), (image > 0).float().expand(8, -1, -1, -1))
    with FlopCounterMode(display=False) as flops:
        network(image)
    with LiveMemory() as memory:
        network(image)
    return Cost(
        network=name,
        parameters=sum(p.numel() for p in network.parameters()),
        gflops=flops.get_total_flops() / 1e9,
        activations_mib=memory.peak / 2**20,
        latency_ms=1000 * statistics.median(timed(lambda: network(image), device) for _ in range(repeats)),
    )


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that something takes, the device's part included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


class LiveMemory(TorchDispatchMode):
    """The largest number of bytes of tensors that operations made and nobody has let go of."""

    def __init__(self):
        super().__init__()
        self.live: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        before = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage.data_ptr()
                if key not in before and key not in self.live:
                    self.live[key] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._released, key)
        return result

    def _released(self, key: int) -> None:
        self.now -= self.live.pop(key, 0)
