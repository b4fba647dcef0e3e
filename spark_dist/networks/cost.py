"""The cost of networks: parameters, operations, memory and time."""

import statistics
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from data_tools.errors import UserError

from . import build_network


@dataclass(frozen=True)
class Cost:
    """The cost of one slice in evaluation, in float32."""

    network: str
    parameters: int
    gflops: float
    """A multiply-add counts 2."""
    activations_mib: float
    """The largest sum of what layers have computed and still need."""
    latency_ms: float
    """Median over forward passes of one slice."""


def check_fits(name: str, width: float, crop: int) -> None:
    """Raises `UserError` for a network that there is not, or a crop that does not fit it."""
    with torch.device("meta"):
        network = build_network(name, width=width)
    if crop % network.stride:
        raise UserError(f"--crop {crop} must be a multiple of {network.stride} for {name}")


@dataclass(frozen=True)
class Model:
    """A network with all that its cost depends on, besides the slice."""

    network: str
    width: float = 1.0
    in_channels: int = 1
    """A slice and its neighbours (`SliceSpec.channels`)."""
    classes: int = 2
    """The background, and one for each region of the task."""

    def build(self) -> nn.Module:
        """The network with fresh weights."""
        return build_network(self.network, self.in_channels, self.classes, self.width)


@torch.no_grad()
def measure(model: Model, crop: int, device: torch.device, repeats: int) -> Cost:
    """Measure one network on a slice of `crop`×`crop` pixels."""
    check_fits(model.network, model.width, crop)
    network = model.build().to(device).eval()
    image = example(network, (crop, crop), model.in_channels)
    with LiveMemory() as memory:
        network(image)
    return Cost(
        network=model.network,
        parameters=sum(p.numel() for p in network.parameters()),
        gflops=gflops(network, image),
        activations_mib=memory.peak / 2**20,
        latency_ms=1000 * statistics.median(timed(lambda: network(image), device) for _ in range(repeats)),
    )


@cache
def gflops_of(model: Model, size: tuple[int, int]) -> float:
    """GFLOPs of a network on one slice (H, W) in evaluation, computed without its weights."""
    with torch.device("meta"):
        network = model.build().eval()
        return gflops(network, example(network, size, model.in_channels))


@torch.no_grad()
def gflops(network: nn.Module, image: Tensor) -> float:
    """GFLOPs of a forward pass; a multiply-add counts 2."""
    with FlopCounterMode(display=False) as flops:
        network(image)
    return flops.get_total_flops() / 1e9


def example(network: nn.Module, size: tuple[int, int], channels: int = 1) -> Tensor:
    """A slice (1, channels, H, W) of noise where the network is, which gets 8 examples if it is shown any."""
    image = torch.randn(1, channels, *size, device=next(network.parameters()).device)
    if hasattr(network, "set_support"):
        network.set_support(image.expand(8, -1, -1, -1), (image[:, :1] > 0).float().expand(8, -1, -1, -1))
    return image


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
