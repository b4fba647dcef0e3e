"""The cost of networks: parameters, operations, memory and time."""

import math
import statistics
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from . import build_network
from .onnx import OnnxNetwork


@dataclass(frozen=True)
class Cost:
    """The cost of one slice in evaluation, in float32."""

    network: str
    parameters: int
    gflops: float
    """A multiply-add counts 2."""
    activations_mib: float
    """The largest sum of what layers have computed and still need; NaN where it is not PyTorch that computes."""
    latency_ms: float
    """Median over forward passes of one slice."""


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
def measure(
    networks: Mapping[str, tuple[nn.Module, Model]], crop: int, device: torch.device, repeats: int
) -> list[Cost]:
    """Measure networks by name on a slice of `crop`×`crop` pixels. Their forward passes take turns, so that what else
    the machine does falls on all alike; a first turn does not count."""
    work, seconds, costs = {}, {name: [] for name in networks}, []
    for name, (network, model) in networks.items():
        network.to(device).eval()
        image = example(network, (crop, crop), model.in_channels)
        work[name] = partial(network, image)
    for turn in range(1 + repeats):
        for name, forward in work.items():
            seconds[name] += [timed(forward, device)] * (turn > 0)
    for name, (network, model) in networks.items():
        with LiveMemory() as memory:
            work[name]()
        costs.append(
            Cost(
                network=name,
                parameters=parameters_of(model),
                gflops=gflops_of(model, (crop, crop)),
                activations_mib=math.nan if isinstance(network, OnnxNetwork) else memory.peak / 2**20,
                latency_ms=1000 * statistics.median(seconds[name]),
            )
        )
    return costs


def parameters_of(model: Model) -> int:
    """The number of a network's parameters."""
    with torch.device("meta"):
        return sum(p.numel() for p in model.build().parameters())


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
    """A slice (1, channels, H, W) of noise where the network is, which gets 8 examples if it wants any and has none."""
    image = torch.randn(1, channels, *size, device=next(network.parameters()).device)
    if hasattr(network, "set_support") and not len(network.support_images):
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
