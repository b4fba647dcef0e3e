"""The share of the target that crops never see."""

import numpy as np
import pytest

from data_tools.store import open_store
from spark_dist.data.augmentation import Views
from spark_dist.data.coverage import coverage_line, unseen_target
from spark_dist.data.slices import VoxelReader, slice_table
from spark_dist.data.views import Crop


@pytest.mark.parametrize(
    "crop", [Crop((64, 64)), Crop((16, 16), (-2, -2)), Crop((8, 12), (9, 0)), Crop((4, 4), (18, 20))]
)
def test_it_is_what_lies_outside_the_crop(tiny_store, crop):
    table = slice_table(open_store(tiny_store), "default", "train", "organ")
    reader, counts = VoxelReader(table.store), {}
    for name in table.cases:
        label = reader.case(name, "label") > 0
        kept = np.zeros_like(label)
        rows, columns = crop.overlap(label.shape[1:])[0]
        kept[:, rows, columns] = label[:, rows, columns]
        counts[name] = label.sum(), kept.sum()
    views = Views(crop, "flips")
    found = unseen_target(table, "organ", views)
    total = np.sum(list(counts.values()), axis=0)
    assert found.share == pytest.approx(1 - total[1] / total[0])
    assert found.of_case == pytest.approx(max(1 - seen / there for there, seen in counts.values()))
    assert coverage_line(found, views).startswith("warning: ") == (found.share > 0.01)
    assert f"never see {found.share:.1%}" in coverage_line(found, views)


def test_crops_from_anywhere_reach_all(tiny_store):
    table = slice_table(open_store(tiny_store), "default", "train", "organ")
    views = Views(Crop((4, 4), (18, 20)), anywhere=True)
    assert unseen_target(table, "organ", views).share == 0
    assert "within their reach" in coverage_line(unseen_target(table, "organ", views), views)
