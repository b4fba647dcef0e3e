import math
import subprocess
import sys
from itertools import combinations

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from data_tools import preview, stats
from spark_dist.evaluation.comparison import Row
from spark_dist.evaluation.figures import (
    MISSED,
    PALETTE,
    TARGET,
    WRONG,
    PredictedSlice,
    comparison_figure,
    look,
    over_all_seeds,
    prediction_figure,
)
from spark_dist.evaluation.panel import REGIONS, around


def shares(path, first=0.0, last=1.0):
    """Of the columns between two fractions of the width: how much has the hue of each colour."""
    pixels = imread(path)[:-60, :, :3]
    pixels = pixels[:, int(first * pixels.shape[1]) : int(last * pixels.shape[1])]
    pixels = pixels - pixels.mean(axis=2, keepdims=True)
    hues = {}
    for name, colour in (("target", TARGET), ("missed", MISSED), ("wrong", WRONG)):
        hue = np.subtract(to_rgb(colour), np.mean(to_rgb(colour)))
        along = pixels @ hue / np.linalg.norm(hue)
        hues[name] = ((along > 0.1) & (along > 0.98 * np.linalg.norm(pixels, axis=2))).mean()
    return hues


def row(ground_truth, *predictions):
    named = {f"network {k}": (prediction, 0.5) for k, prediction in enumerate(predictions)}
    return PredictedSlice("case_00000, slice 3", np.full(ground_truth.shape, 0.25), ground_truth, named)


def square(rows, columns):
    region = np.zeros((64, 64), bool)
    region[slice(*rows), slice(*columns)] = True
    return region


@pytest.mark.parametrize(
    ("prediction", "seen"),
    [
        (square((20, 30), (20, 30)), {"target"}),
        (square((20, 30), (25, 30)), {"target", "missed"}),
        (square((20, 30), (20, 40)), {"target", "wrong"}),
        (square((0, 0), (0, 0)), {"missed"}),
        (square((40, 50), (40, 50)), {"missed", "wrong"}),
    ],
)
def test_colours_say_what_is_right_missed_and_wrong(tmp_path, prediction, seen):
    path = tmp_path / "new" / "picture.png"
    prediction_figure([row(square((20, 30), (20, 30)), prediction)], path)
    assert {name for name, share in shares(path, 0.7, 1.0).items() if share > 1e-3} == seen
    assert {name for name, share in shares(path, 0.4, 0.6).items() if share > 1e-3} == {"target"}
    assert not any(shares(path, 0.0, 0.3).values())


SEEN = {
    "as they are": np.eye(3),
    "protanopia": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "deuteranopia": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "tritanopia": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
}
"""How people see linear RGB (Machado et al., IEEE TVCG 2009)."""
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def lab(colour, seen):
    """CIELAB of an sRGB colour as people see it."""
    colour = np.asarray(colour)
    linear = np.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)
    ratios = TO_XYZ @ np.clip(np.asarray(seen) @ linear, 0, 1) / (0.9505, 1, 1.089)
    x, y, z = np.where(ratios > 0.008856, np.cbrt(ratios), 7.787 * ratios + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("seen", SEEN)
@pytest.mark.parametrize(
    ("colours", "share"),
    [((*REGIONS[:6], MISSED, WRONG), 0.55), (preview.COLOURS[:6], 1), (stats.COLOURS[:6], 1), (PALETTE, 1)],
    ids=["predictions", "preview", "stats", "comparison"],
)
def test_colour_blind_people_tell_colours_apart(colours, share, seen):
    """By ten or more in CIELAB, where two is what is just noticeable; over grey where images shine through."""
    places = [lab(share * np.array(to_rgb(colour)) + (1 - share) * 0.5, SEEN[seen]) for colour in colours]
    assert min(np.linalg.norm(a - b) for a, b in combinations(places, 2)) > 10


def test_there_is_a_row_for_each_slice_and_a_column_for_each_network(tmp_path):
    ground_truth = square((20, 30), (20, 30))
    sizes = {}
    for slices, networks in ((1, 1), (3, 1), (1, 3)):
        prediction_figure([row(ground_truth, *[ground_truth] * networks)] * slices, tmp_path / "picture.png")
        sizes[slices, networks] = imread(tmp_path / "picture.png").shape
    assert sizes[3, 1][0] > 2 * sizes[1, 1][0]
    assert sizes[1, 3][1] == pytest.approx(sizes[1, 1][1] * 5 / 3, rel=0.01)


@pytest.mark.parametrize("region", [square((0, 3), (60, 64)), square((0, 64), (0, 64)), square((0, 64), (30, 31))])
def test_the_window_holds_the_region(region):
    assert region[around(region)].sum() == region.sum()


def test_a_slice_without_a_target_is_shown_whole(tmp_path):
    nothing = square((0, 0), (0, 0))
    assert nothing[around(nothing)].shape == nothing.shape
    prediction_figure([row(nothing, nothing)], tmp_path / "picture.png")
    assert not any(shares(tmp_path / "picture.png").values())


def test_pictures_need_no_display_and_leave_pyplot_alone():
    code = "import spark_dist.evaluation.figures, sys; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def compared(network, parameters, mean, seeds="1", **other):
    facts = {"dataset": "kits", "task": "organ", "split": "default", "role": "student", "method": "none", "teacher": ""}
    figures = {
        "cases": 3,
        "mean": mean,
        "low": mean - 0.1,
        "high": mean + 0.1,
        "misses": 0,
        "hd95": 1.0,
        "hd95_misses": 0,
    }
    return Row(**facts | figures | {"network": network, "width": 1.0, "parameters": parameters, "seeds": seeds} | other)


def test_of_several_seeds_the_comparison_shows_the_row_over_all(tmp_path):
    rows = [compared("enet", 350_000, 0.5), compared("unet", 31_000_000, 0.9, role="teacher")]
    rows += [compared("enet", 350_000, 0.7, seeds="2"), compared("enet", 350_000, 0.6, seeds="2 seeds")]
    assert [(row.network, row.seeds) for row in over_all_seeds(rows)] == [("enet", "2 seeds"), ("unet", "1")]
    comparison_figure({"kits": rows}, "dice", tmp_path / "new" / "many.svg")
    text = (tmp_path / "new" / "many.svg").read_text()
    for shown in ("parameters", "test dice", "teacher", "student alone", "enet", "unet"):
        assert f"<!-- {shown} -->" in text


def test_a_comparison_of_misses_and_of_names_that_look_like_formulas(tmp_path):
    missed = compared("enet", 350_000, math.nan, method="kd", teacher="$x$")
    comparison_figure({"$y": [compared("a$b$", 9, 0.5), missed]}, "hd95", tmp_path / "odd.svg")
    text = (tmp_path / "odd.svg").read_text()
    assert "<!-- test hd95 (mm) -->" in text
    assert "<!-- a$b$ -->" in text
    assert "student, kd" not in text


def test_kinds_are_told_apart_by_colour_and_form():
    assert len({look(number) for number in range(20)}) == 20
    assert len({look(number)[0] for number in range(7)}) == len({look(number)[1] for number in range(7)}) == 7
