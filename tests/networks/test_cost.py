"""What networks cost."""

import pytest
import torch
from torch import nn

from spark_dist.networks import build_network
from spark_dist.networks.cost import LiveMemory, Model, example, gflops, gflops_of, measure


def test_operations_are_two_for_each_multiply_add():
    layer = nn.Conv2d(3, 8, 5, padding=2, bias=False)
    assert gflops(layer, torch.randn(1, 3, 16, 24)) == pytest.approx(2 * 16 * 24 * 8 * 3 * 25 / 1e9)


@pytest.mark.parametrize("name", ["enet", "universeg"])
def test_operations_are_counted_without_weights(name):
    network = build_network(name, width=0.5).eval()
    assert gflops_of(Model(name, 0.5), (128, 64)) == pytest.approx(gflops(network, example(network, (128, 64))))
    assert gflops_of(Model(name, 0.5), (128, 128)) > gflops_of(Model(name, 0.5), (128, 64))


@pytest.mark.parametrize("name", ["unet", "universeg"])
def test_classes_and_neighbours_cost_operations_of_their_own(name):
    network = build_network(name, 3, 4, width=0.25).eval()
    expected = gflops(network, example(network, (64, 64), 3))
    assert gflops_of(Model(name, 0.25, 3, 4), (64, 64)) == pytest.approx(expected)
    assert gflops_of(Model(name, 0.25, 3), (64, 64)) < expected
    assert gflops_of(Model(name, 0.25, 1, 4), (64, 64)) < expected


def test_a_measurement_says_what_a_slice_costs():
    model = Model("enet", 0.5)
    (cost,) = measure({"enet": (model.build(), model)}, 64, torch.device("cpu"), repeats=2)
    assert cost.parameters == sum(p.numel() for p in build_network("enet", width=0.5).parameters())
    assert cost.gflops == pytest.approx(gflops_of(Model("enet", 0.5), (64, 64)))
    assert cost.latency_ms > 0


def test_memory_is_what_is_still_needed():
    x = torch.zeros(1 << 18)  # 1 MiB
    with LiveMemory() as memory, torch.no_grad():
        for _ in range(5):
            x = x + 1
    assert 2 * 2**20 <= memory.peak <= 3 * 2**20
