import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from spark_dist.networks import NETWORKS, build_network

# parameters, GFLOPs at 384×384 (a multiply-add counts 2), channels and stride of low and high
EXPECTED = {
    "unet": (34_525_954, 293.742, (128, 2), (1024, 16)),
    # Measured on an original that left out the bottleneck 3.5: 2.048, and 0.080 for it.
    "enet": (353_761, 2.128, (16, 2), (128, 8)),
}


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_a_network_is_what_it_was_published_as(name):
    parameters, gflops, low, high = EXPECTED[name]
    with torch.device("meta"):
        network = build_network(name).eval()
        slices = torch.zeros(1, 1, 384, 384)
        with FlopCounterMode(display=False) as counter:
            output = network(slices)
    assert sum(p.numel() for p in network.parameters() if p.requires_grad) == parameters
    assert counter.get_total_flops() / 1e9 == pytest.approx(gflops, rel=0.02)
    assert network.taps == (low, high)
    assert output.logits.shape == (1, 2, 384, 384)
    assert output.low.shape == (1, low[0], 384 // low[1], 384 // low[1])
    assert output.high.shape == (1, high[0], 384 // high[1], 384 // high[1])


@pytest.mark.parametrize("width", [0.1, 0.25])
@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_every_parameter_gets_a_gradient_and_taps_are_as_declared(name, width):
    torch.manual_seed(0)
    network = build_network(name, width=width)
    side = 4 * network.stride
    output = network(torch.randn(2, 1, side, side))
    for feature, tap in zip((output.low, output.high), network.taps, strict=True):
        assert feature.shape == (2, tap.channels, side // tap.stride, side // tap.stride)
    output.logits.square().mean().backward()
    assert [key for key, p in network.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_bf16_autocast(name):
    network = build_network(name, width=0.1)
    side = 4 * network.stride
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = network(torch.randn(1, 1, side, side))
    assert output.logits.isfinite().all()
