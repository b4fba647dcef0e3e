"""The recipe lines that `spark-data stats` suggests."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.cli import main
from data_tools.store import open_store
from data_tools.suggest import box_of_labels, suggested_batch, suggested_crop
from spark_dist.config import TrainOptions
from spark_dist.data.slices import VoxelReader
from spark_dist.data.views import Crop
from spark_dist.parsing import parse


def test_the_printed_lines_are_a_recipe_that_holds_the_target(tiny_store, tmp_path, capsys):
    assert main(["stats", str(tiny_store), "--out", str(tmp_path / "s.png"), "--memory", "2"]) == 0
    lines = capsys.readouterr().out.split("suggested for a recipe:\n")[1]
    (tmp_path / "recipe.yaml").write_text(lines)
    options = parse(
        TrainOptions, ["--config", str(tmp_path / "recipe.yaml"), "--task", "organ", "--network", "enet"], "t"
    )
    crop, store = options.slice_spec.crop, open_store(tiny_store)
    assert crop.size == (32, 32)
    assert all(abs(shift) < 8 for shift in crop.shift)
    assert options.batch_size == 2  # a twentieth of the slices
    assert options.dataset == tiny_store
    for name in store.cases:
        label = VoxelReader(store).case(name, "label") > 0
        rows, columns = crop.overlap(label.shape[1:])[0]
        assert label[:, rows, columns].sum() == label.sum()
        box = box_of_labels(store, store.cases[name])
        assert np.array_equal(box, [np.flatnonzero(label.any(axis=axes))[[0, -1]] for axes in ((0, 2), (0, 1))])
    low, high = (float(n) for n in lines.split("--window=")[1].split()[0].split(","))
    assert -100 < low < high < 300
    assert "--plane-spacing 0.8,0.7" in lines


@given(places=st.lists(st.tuples(*[st.integers(20, 300)] * 2, *[st.floats(0, 1)] * 4), min_size=1, max_size=120))
@settings(max_examples=40, deadline=None)
def test_a_crop_holds_the_boxes_of_99_percent(places):
    boxes = []
    for rows, columns, *ends in places:
        box = np.sort(np.array(ends).reshape(2, 2), axis=1) * (np.array([[rows], [columns]]) - 1)
        boxes.append((SimpleNamespace(shape=(1, rows, columns)), box.astype(int)))
    size, shift = suggested_crop(boxes)
    held = 0
    for case, box in boxes:
        inside, _ = Crop(size, shift).overlap(case.shape[1:])
        held += all(part.start <= first and last < part.stop for part, (first, last) in zip(inside, box, strict=True))
    assert held >= 0.99 * len(boxes)
    assert all(side % 32 == 0 for side in size)


def test_batches_fit_the_memory():
    assert [suggested_batch((384, 384), memory, 10**6) for memory in (0.5, 8, 24, 80)] == [1, 4, 16, 32]
    assert suggested_batch((64, 64), 8, 10**6) > 100
    assert suggested_batch((64, 64), 8, 100) == 4


@pytest.mark.parametrize("given", ["0", "-1", "much", "nan"])
def test_memory_is_a_number(tiny_store, capsys, given):
    with pytest.raises(SystemExit):
        main(["stats", str(tiny_store), f"--memory={given}"])
    assert "is no amount of memory in GiB" in capsys.readouterr().err
