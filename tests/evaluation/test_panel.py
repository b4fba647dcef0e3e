"""The slices on which people watch networks."""

import numpy as np
import pytest
import torch
from torch import nn

from spark_dist.data.views import Crop, SliceSpec
from spark_dist.evaluation.panel import CAPTION, LINE, REGIONS, TILE, ShownSlice, draw_panel, rgb, shown_slices
from spark_dist.networks.base import NetworkOutput


class Bright(nn.Module):
    """Predicts class k where a pixel is brighter than the kth of some values."""

    stride = 1

    def __init__(self, *values):
        super().__init__()
        self.values = nn.Parameter(torch.tensor(values))

    def forward(self, x):
        classes = (x >= self.values.view(1, -1, 1, 1)).sum(dim=1)
        logits = nn.functional.one_hot(classes, len(self.values) + 1).permute(0, 3, 1, 2) * 20.0
        return NetworkOutput(logits, None, None)


def panel(image, ground_truth, network, task="organ"):
    spec = SliceSpec(task, Crop((32, 32)))
    return draw_panel(network, [ShownSlice("case, slice 1", image[None], 0, (0, 100), ground_truth)], spec)


def has(picture, colour):
    """How many pixels have this very colour."""
    return int((picture == rgb(colour)).all(axis=-1).sum())


def test_the_prediction_is_a_line_around_what_is_predicted():
    ground_truth = np.zeros((32, 32), np.uint8)
    ground_truth[8:24, 8:24] = 1
    image = np.where(ground_truth, 90, 10).astype(np.int16)
    right = panel(image, ground_truth, Bright(0.5))
    assert right.shape == (CAPTION + TILE, TILE, 3)
    side = TILE * 16 // 32
    assert 4 * side * 1.5 < has(right, LINE) < 4 * side * 3.5  # a line of two pixels along four sides
    nothing = panel(image, ground_truth, Bright(5.0))
    assert has(nothing, LINE) == 0
    middle, corner = nothing[CAPTION + TILE // 2, TILE // 2], nothing[-1, -1]
    assert middle[1] > middle[0] + 20  # greenish: the ground truth
    assert len(set(corner.tolist())) == 1  # grey
    assert has(panel(image, np.zeros_like(ground_truth), Bright(5.0)), LINE) == 0


def test_each_of_several_classes_has_its_colour():
    ground_truth = np.zeros((32, 20), np.uint8)
    ground_truth[4:28, 4:16] = 1
    ground_truth[10:20, 6:12] = 2
    image = (45 * ground_truth.astype(np.int16)) + 5
    picture = panel(image, ground_truth, Bright(-0.2, 0.6), "organ,tumour")
    assert picture.shape == (CAPTION + TILE, TILE, 3)
    assert has(picture, REGIONS[0]) > 100
    assert has(picture, REGIONS[1]) > 100
    assert has(picture, LINE) == 0


@pytest.mark.parametrize("context", [0, 1])
def test_the_slices_are_the_same_for_every_network(tiny_store, context):
    from data_tools.store import open_store

    store, spec = open_store(tiny_store), SliceSpec("organ", Crop((32, 32)), context=context)
    cases = store.split("default", "val")
    first, second = (shown_slices(store, cases, spec) for _ in range(2))
    assert [shown.name for shown in first] == [shown.name for shown in second]
    assert [shown.name.split(",")[0] for shown in first] == list(cases)
    assert all((shown.ground_truth > 0).any() for shown in first)
    assert len(shown_slices(store, cases, spec, 1)) == 1
