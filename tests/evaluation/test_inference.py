"""Evaluation covers whole slices, whatever the crop of training."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn

from data_tools.store import open_store
from spark_dist.data.slices import VoxelReader
from spark_dist.data.views import Crop, SliceSpec
from spark_dist.evaluation.cases import LABELLED_THRESHOLD, both_protocols, evaluate_cases
from spark_dist.evaluation.inference import covering, largest_components, probabilities
from spark_dist.networks import NetworkOutput, build_network

WINDOW = (0.0, 100.0)


class Bright(nn.Module):
    """Finds what is bright: its target's probability is about 1 above the window's middle."""

    stride = 8

    def __init__(self, bound_to=None):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(10.0))
        self.sizes = []
        if bound_to:
            self.bound_to = bound_to

    def forward(self, x):
        self.sizes.append(tuple(x.shape[-2:]))
        logits = torch.cat([-x, x], dim=1) * self.weight
        return NetworkOutput(logits, logits, logits)


def volume(plane=(60, 52)):
    """Two slices with a target in a corner, outside any small crop around the centre."""
    image = np.zeros((2, *plane), np.int16)
    image[0, :6, -7:] = 100
    return image, image > 50


@pytest.mark.parametrize("crop", [Crop((16, 16)), Crop((16, 16), (-14, -4)), Crop((64, 64)), Crop((64, 16), (1, 3))])
def test_a_target_outside_the_crop_is_found(crop):
    image, ground_truth = volume()
    network = Bright().train()
    spec = SliceSpec("organ", crop)
    found = probabilities(network, image, WINDOW, spec)
    assert found.shape == (1, *image.shape)
    assert np.array_equal(found[0] >= 0.5, ground_truth)
    assert network.training
    if crop.size == (16, 16):
        assert probabilities(network, image, WINDOW, spec, whole=False)[0].max() < 0.5


def test_the_protocol_of_labelled_slices_keeps_the_crop():
    image, ground_truth = volume()
    network, spec = Bright(), SliceSpec("organ", Crop((16, 16)))
    target = probabilities(network, image, WINDOW, spec)[0]
    whole, labelled = both_protocols(network, image, ground_truth.any(axis=(1, 2)), WINDOW, spec)
    assert np.array_equal(whole, target >= spec.threshold)
    assert not labelled.any()
    large = SliceSpec("organ", Crop((64, 56)))
    _, labelled = both_protocols(network, image, ground_truth.any(axis=(1, 2)), WINDOW, large)
    assert np.array_equal(labelled, target >= LABELLED_THRESHOLD)


@pytest.mark.parametrize(
    ("crop", "plane", "expected"),
    [
        (Crop((64, 64)), (60, 52), Crop((64, 64))),
        (Crop((64, 64), (2, -3)), (60, 52), Crop((64, 64), (2, -3))),
        (Crop((64, 64), (5, 0)), (60, 52), Crop((64, 64))),
        (Crop((384, 384), (-14, -4)), (512, 512), Crop((512, 512))),
        (Crop((384, 384), (-14, -4)), (511, 630), Crop((512, 632))),
        (Crop((32, 64)), (60, 52), Crop((64, 64))),
    ],
)
def test_what_covers_a_plane(crop, plane, expected):
    assert covering(crop, plane, 8) == expected
    inside, _ = expected.overlap(plane)
    assert [s.stop - s.start for s in inside] == list(plane)


def test_a_network_that_is_bound_to_a_size_sees_windows_of_it():
    image, ground_truth = volume()
    network = Bright(bound_to=(32, 32))
    found = probabilities(network, image, WINDOW, SliceSpec("organ", Crop((32, 32))))
    assert set(network.sizes) == {(32, 32)}
    assert np.array_equal(found[0] >= 0.5, ground_truth)


def test_universeg_predicts_planes_larger_than_its_support_set():
    torch.manual_seed(0)
    network = build_network("universeg", width=0.25)
    network.set_support(torch.rand(2, 1, 32, 32), (torch.rand(2, 1, 32, 32) > 0.5).float())
    assert network.bound_to == (32, 32)
    image = np.random.default_rng(0).integers(0, 100, (1, 40, 48)).astype(np.int16)
    found = probabilities(network, image, WINDOW, SliceSpec("organ", Crop((32, 32))))
    assert found.shape == (1, 1, 40, 48)
    assert np.isfinite(found).all()


def test_a_plane_that_the_crop_covers_is_predicted_as_the_crop():
    """Training saw the fill around a small slice, and evaluation shows it too."""
    torch.manual_seed(0)
    network = build_network("enet", width=0.25).eval()
    image = np.random.default_rng(0).integers(0, 100, (3, 30, 26)).astype(np.int16)
    spec = SliceSpec("organ", Crop((32, 32)))
    whole, cropped = (probabilities(network, image, WINDOW, spec, whole=whole) for whole in (True, False))
    assert np.array_equal(whole, cropped)


def test_the_largest_component_alone_is_measured(tiny_store):
    store = open_store(tiny_store)
    name = store.split("default", "test")[0]
    image, label = (VoxelReader(store).case(name, kind) for kind in ("image", "label"))
    truth, dice = label > 0, {}
    for largest in (False, True):
        found = (image >= 50).astype(np.uint8)
        found = (largest_components(found) if largest else found) > 0
        dice[largest] = 2 * (found & truth).sum() / (found.sum() + truth.sum())
        spec = SliceSpec("organ", Crop((48, 48)))
        cases = evaluate_cases(Accelerator(cpu=True), Bright(), store, [name], spec, None, largest_component=largest)
        assert cases[name]["dice"] == pytest.approx(dice[largest])
    assert dice[True] > dice[False] + 0.01
