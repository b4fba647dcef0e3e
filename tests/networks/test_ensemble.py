"""The mean of several networks' probabilities, and of a slice's flips."""

import pytest
import torch

from data_tools.errors import UserError
from spark_dist.networks import NetworkOutput, build_network
from spark_dist.networks.ensemble import Ensemble, mean_logits


def networks(*names):
    torch.manual_seed(0)
    return [build_network(name, width=0.25).eval() for name in names]


@torch.no_grad()
def test_probabilities_are_the_mean_of_the_members():
    enet, unet = networks("enet", "unet")
    x = torch.randn(2, 1, 32, 48)
    both = Ensemble([enet, unet])
    expected = (enet(x).logits.softmax(1) + unet(x).logits.softmax(1)) / 2
    output = both(x)
    assert isinstance(output, NetworkOutput)
    assert torch.allclose(output.logits.softmax(1), expected, atol=1e-6)
    assert torch.equal(output.low, enet(x).low)
    assert both.taps == enet.taps
    assert all(both.stride % network.stride == 0 for network in (enet, unet))


@torch.no_grad()
def test_one_network_without_flips_is_itself_to_the_bit():
    (enet,) = networks("enet")
    x = torch.randn(2, 1, 32, 32)
    assert torch.equal(Ensemble([enet])(x).logits, enet(x).logits)


@torch.no_grad()
def test_flips_are_turned_back_before_they_are_averaged():
    (enet,) = networks("enet")
    x = torch.randn(2, 1, 32, 48)
    flipped = Ensemble([enet], flips=True)
    views = [enet(x.flip(axes)).logits.flip(axes).softmax(1) for axes in ((), (-2,), (-1,), (-2, -1))]
    found = flipped(x).logits.softmax(1)
    assert torch.allclose(found, torch.stack(views).mean(0), atol=1e-6)
    assert torch.allclose(flipped(x.flip(-1)).logits.flip(-1).softmax(1), found, atol=1e-6)
    assert not torch.allclose(found, views[0], atol=1e-3)


def test_sure_members_average_without_a_logarithm_of_zero():
    sure = torch.tensor([[[[200.0]], [[-200.0]]]])
    assert torch.allclose(mean_logits([sure, -sure]).softmax(1), torch.full((1, 2, 1, 1), 0.5))


def test_networks_bound_to_different_sizes_are_refused():
    first, second = networks("universeg", "universeg")
    for network, side in ((first, 32), (second, 48)):
        network.set_support(torch.rand(2, 1, side, side), torch.zeros(2, 1, side, side))
    with pytest.raises(UserError, match="bound to slices of"):
        Ensemble([first, second])
