"""A slice in the views that training sees of it."""

import numpy as np
import pytest

from data_tools.store import open_store
from spark_dist import views
from spark_dist.cli import main
from spark_dist.data.batches import SliceDataset
from spark_dist.data.slices import slice_table

JOB = ["--task", "organ", "--crop", "32", "--crop-shift", "[0,0]"]


@pytest.mark.parametrize(
    ("given", "count"),
    [
        (("--augment", "full", "--views", "12", "--context", "1"), 12),
        (("--augment", "flips"), 8),
        (("--augment", "full", "--views", "-1", "--crop-at", "anywhere", "--show", "3"), 3),
    ],
)
def test_what_is_drawn_is_what_training_sees(tiny_store, tmp_path, monkeypatch, given, count):
    drawn, options = {}, []
    monkeypatch.setattr(views, "outlined", lambda axis, image, mask, title: drawn.update({title: (image, mask)}))
    monkeypatch.setattr(views, "check_output", lambda *_: None)
    run = views.run
    monkeypatch.setattr(views, "run", lambda given: (options.append(given), run(given)))
    line = ["views", "--dataset", str(tiny_store), *JOB, *given, "--case", "case_00002", "--slice", "3"]
    assert main([*line, "--picture", str(tmp_path / "v.png")]) == 0
    assert (tmp_path / "v.png").stat().st_size > 1000
    assert list(drawn) == ["case_00002, slice 3, as stored", *(f"view {n}" for n in range(count))]
    table = slice_table(open_store(tiny_store), "default", "train", "organ", "all")
    row = next(n for n in range(len(table)) if table.name(n) == "case_00002 slice 3")
    seen = options[0].slice_views
    dataset = SliceDataset(table, options[0].slice_spec, views=seen)
    for number in range(count):
        raw = dataset.__getitems__([row * seen.count + number])
        image, mask = drawn[f"view {number}"]
        assert np.array_equal(mask > 0, raw.label[0].numpy() > 0)
        low, high = raw.window[0].tolist()
        expected = (raw.image[0, dataset.spec.context].numpy() - low) / (high - low)
        np.testing.assert_allclose(image, np.clip(expected, 0, 1), atol=1e-6)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--case", "case_00009"), "case_00009"),
        (("--slice", "99"), "--slice 99: training with --slices all sees no such slice of case_00000"),
        (("--slice", "0", "--slices", "labelled"), "--slice 0: training with --slices labelled sees no such slice"),
        (("--picture", "views.docx"), "'docx' is no format of pictures"),
    ],
)
def test_what_is_not_there_is_one_line(tiny_store, tmp_path, monkeypatch, capsys, given, message):
    monkeypatch.chdir(tmp_path)
    assert main(["views", "--dataset", str(tiny_store), *JOB, *given]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())
