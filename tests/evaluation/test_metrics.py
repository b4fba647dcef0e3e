import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from data_tools.errors import UserError
from spark_dist.evaluation.intervals import paired_difference, summarise
from spark_dist.evaluation.metrics import (
    between_surfaces,
    case_metrics,
    dice,
    false_positive_ml,
    overlap_counts,
    read_cases,
    rvd,
    surface_dice,
    surface_distances,
    voe,
    write_cases,
)

volumes = arrays(bool, (3, 4, 5))


def distances(prediction, ground_truth, spacing):
    return surface_distances(*between_surfaces(prediction, ground_truth, spacing))


def test_counts_are_those_of_each_slice():
    prediction, ground_truth = np.zeros((2, 2, 3, 3), bool)
    prediction[0, 0], ground_truth[0, :2], ground_truth[1, 0, 0] = True, True, True
    assert overlap_counts(prediction, ground_truth).tolist() == [[3, 3, 6], [0, 0, 1]]
    assert overlap_counts(prediction, ground_truth).dtype == np.int64


@pytest.mark.parametrize(
    ("counts", "expected"),
    [((0, 0, 0), (1, 0, 0)), ((0, 0, 5), (0, 1, -1)), ((0, 5, 0), (0, 1, math.inf)), ((5, 5, 5), (1, 0, 0))],
)
def test_overlap_where_there_is_nothing_to_find(counts, expected):
    assert (dice(counts), voe(counts), rvd(counts)) == expected


@given(volumes, volumes)
def test_overlap_is_that_of_sets(prediction, ground_truth):
    a, b = (set(map(tuple, np.argwhere(v))) for v in (prediction, ground_truth))
    counts = overlap_counts(prediction, ground_truth).sum(axis=0)
    assert dice(counts) == pytest.approx(2 * len(a & b) / (len(a) + len(b)) if a or b else 1)
    assert voe(counts) == pytest.approx(1 - len(a & b) / len(a | b) if a or b else 0)
    assert rvd(counts) == pytest.approx((len(a) - len(b)) / len(b) if b else math.inf if a else 0)


def surface(volume):
    inside = set(map(tuple, np.argwhere(volume)))
    steps = [step for step in itertools.product((-1, 0, 1), repeat=3) if sum(map(abs, step)) == 1]
    return [v for v in inside if any(tuple(np.add(v, step)) not in inside for step in steps)]


@settings(max_examples=40, deadline=None)
@given(volumes, volumes, st.tuples(*[st.floats(0.5, 5)] * 3))
def test_surface_distances_are_those_of_brute_force(prediction, ground_truth, spacing):
    found = distances(prediction, ground_truth, spacing)
    if not prediction.any() or not ground_truth.any():
        expected = 0 if prediction.any() == ground_truth.any() else math.inf
        assert set(found.values()) == {expected}
        return
    a, b = (np.array(surface(v)) * spacing for v in (prediction, ground_truth))
    between = np.linalg.norm(a[:, None] - b[None], axis=-1)
    there, back = between.min(axis=1), between.min(axis=0)
    assert found["hd"] == pytest.approx(max(there.max(), back.max()), rel=1e-5)
    assert found["hd95"] == pytest.approx(max(np.percentile(there, 95), np.percentile(back, 95)), rel=1e-5)
    assert found["assd"] == pytest.approx(np.concatenate([there, back]).mean(), rel=1e-5)


@settings(max_examples=20, deadline=None)
@given(volumes, volumes, st.tuples(*[st.floats(0.5, 5)] * 3))
def test_surface_distances_are_symmetric(prediction, ground_truth, spacing):
    there, back = distances(prediction, ground_truth, spacing), distances(ground_truth, prediction, spacing)
    assert there == pytest.approx(back)
    assert set(distances(ground_truth, ground_truth, spacing).values()) == {0}


def random_masks(count=200):
    """Pairs of small masks, of noise and of overlapping boxes, empty ones among them, with anisotropic spacings."""
    random = np.random.default_rng(0)
    for k in range(count):
        shape, spacing = random.integers(2, 9, 3), random.uniform(0.5, 5, 3)
        if k % 2:
            prediction, ground_truth = random.random((2, *shape)) < random.choice(
                [0.0, 0.1, 0.5], (2, 1, 1, 1), p=[0.1, 0.5, 0.4]
            )
        else:
            prediction, ground_truth = np.zeros((2, *shape), bool)
            for mask in (prediction, ground_truth):
                start = random.integers(0, shape)
                mask[tuple(slice(a, a + n) for a, n in zip(start, random.integers(1, 6, 3), strict=True))] = True
        yield prediction, ground_truth, spacing, random.uniform(0.5, 6)


def by_brute_force(prediction, ground_truth, spacing, tolerance):
    """A case's metrics from sets of voxels and all distances between them."""
    p, t = (set(map(tuple, np.argwhere(v))) for v in (prediction, ground_truth))
    shown = {z for z, _, _ in t}
    found = {"false_positive_ml": sum(z not in shown for z, _, _ in p) * spacing[0] * spacing[1] * spacing[2] / 1000}
    for name, a in (("", p), ("_labelled", {v for v in p if v[0] in shown})):
        found["dice" + name] = 2 * len(a & t) / (len(a) + len(t)) if a or t else 1.0
        found["voe" + name] = 1 - len(a & t) / len(a | t) if a or t else 0.0
        found["rvd" + name] = (len(a) - len(t)) / len(t) if t else math.inf if a else 0.0
    if not p or not t:
        value = math.inf if p or t else 0.0
        return found | {"hd": value, "hd95": value, "assd": value, "surface_dice": float(not p and not t)}
    a, b = (np.array(surface(v)) * spacing for v in (prediction, ground_truth))
    between = np.sqrt(((a[:, None] - b[None]) ** 2).sum(axis=-1))
    there, back = between.min(axis=1), between.min(axis=0)
    both = np.concatenate([there, back])
    found |= {"hd": both.max(), "hd95": max(np.percentile(there, 95), np.percentile(back, 95)), "assd": both.mean()}
    return found | {"surface_dice": (both <= tolerance).mean()}


def by_monai(prediction, ground_truth, spacing, tolerance):
    """The metrics that MONAI has as well, of masks that are not empty."""
    import monai.metrics
    import torch

    p, t = (torch.from_numpy(v)[None, None].float() for v in (prediction, ground_truth))
    both, how = {"y_pred": p, "y": t, "include_background": True}, {"spacing": list(spacing)}
    found = {
        "dice": monai.metrics.compute_dice(**both),
        "voe": 1 - monai.metrics.compute_iou(**both),
        "hd": monai.metrics.compute_hausdorff_distance(**both, **how),
        "hd95": monai.metrics.compute_hausdorff_distance(**both, **how, percentile=95),
        "assd": monai.metrics.compute_average_surface_distance(**both, **how, symmetric=True),
        "surface_dice": monai.metrics.compute_surface_dice(**both, **how, class_thresholds=[tolerance]),
    }
    return {name: value.item() for name, value in found.items()}


def test_all_figures_are_those_of_brute_force_and_of_monai_on_200_masks():
    compared = 0
    for prediction, ground_truth, spacing, tolerance in random_masks():
        found = case_metrics(prediction, ground_truth, spacing, tolerance=tolerance)
        expected = by_brute_force(prediction, ground_truth, spacing, tolerance)
        assert found == pytest.approx(expected, rel=1e-5)
        if prediction.any() and ground_truth.any():
            expected = by_monai(prediction, ground_truth, spacing, tolerance)
            assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-5)
            compared += 1
    assert 150 < compared < 200


def test_the_surface_dice_counts_what_lies_within_the_tolerance():
    ground_truth, prediction = np.zeros((2, 1, 1, 10), bool)
    ground_truth[..., :4] = prediction[..., :6] = True
    # The voxels at 4 and 5 lie one and two steps of 2 mm from the ground_truth; all others lie on both.
    for tolerance, expected in ((0.0, 8 / 10), (1.9, 8 / 10), (2.0, 9 / 10), (4.0, 1.0)):
        found = case_metrics(prediction, ground_truth, (5, 1, 2), tolerance=tolerance)
        assert found["surface_dice"] == pytest.approx(expected)
    assert surface_dice(np.array([]), np.array([]), 1.0) == 1
    assert case_metrics(ground_truth, np.zeros_like(ground_truth), (1, 1, 1))["surface_dice"] == 0


def test_false_positives_are_counted_in_millilitres_where_there_is_no_target():
    ground_truth, prediction = np.zeros((2, 4, 5, 5), bool)
    ground_truth[1, :2], prediction[:3] = True, True
    assert case_metrics(prediction, ground_truth, (5, 2, 2))["false_positive_ml"] == pytest.approx(2 * 25 * 20 / 1000)
    nowhere = np.zeros_like(ground_truth)
    assert case_metrics(prediction, nowhere, (5, 2, 2))["false_positive_ml"] == pytest.approx(3 * 25 * 20 / 1000)
    assert false_positive_ml(overlap_counts(nowhere, ground_truth), (5, 2, 2)) == 0


def test_the_box_around_the_targets_changes_no_distance():
    ground_truth, prediction = np.zeros((2, 20, 30, 40), bool)
    ground_truth[5:9, 6:12, 7:15] = True
    prediction[5:9, 6:12, 10:18] = True
    assert distances(prediction, ground_truth, (5, 0.7, 0.8))["hd"] == pytest.approx(3 * 0.8)
    prediction[19, 29, 39] = True
    far = np.hypot.reduce([5 * (19 - 8), 0.7 * (29 - 11), 0.8 * (39 - 14)])
    assert distances(prediction, ground_truth, (5, 0.7, 0.8))["hd"] == pytest.approx(far)


def test_distances_print_nothing(recwarn):
    ground_truth = np.ones((2, 3, 3), bool)
    distances(ground_truth, ground_truth, (1, 1, 1))
    assert not [str(w.message) for w in recwarn if "monai" in str(w.message)]


@pytest.mark.parametrize(("found", "value"), [(False, 0), (True, math.inf)])
def test_a_case_without_the_target(found, value):
    ground_truth = np.zeros((3, 4, 4), bool)
    prediction = np.full_like(ground_truth, found)
    metrics = case_metrics(prediction, ground_truth, (1, 1, 1))
    assert {metrics[key] for key in ("hd", "hd95", "assd", "rvd")} == {value}
    assert metrics["dice"] == (not found)
    assert metrics["dice_labelled"] == 1  # no slice shows the target, so none is counted


def test_the_two_protocols_differ_in_slices_without_the_target():
    ground_truth = np.zeros((3, 4, 4), bool)
    ground_truth[1, :2] = True
    prediction = ground_truth.copy()
    prediction[2] = True
    metrics = case_metrics(prediction, ground_truth, (1, 1, 1), tolerance=None)
    assert metrics["dice_labelled"] == 1
    assert metrics["dice"] == pytest.approx(2 * 8 / (24 + 8))


def test_the_original_protocol_may_have_a_prediction_of_its_own():
    ground_truth = np.ones((1, 4, 4), bool)
    metrics = case_metrics(np.zeros_like(ground_truth), ground_truth, (1, 1, 1), tolerance=None, labelled=ground_truth)
    assert (metrics["dice"], metrics["dice_labelled"]) == (0, 1)
    assert "hd" not in metrics


def test_a_miss_is_counted_and_not_dropped():
    summary = summarise([1.0, 3.0, math.inf])
    assert (summary["mean"], summary["misses"], summary["cases"], summary["median"]) == (2, 1, 3, 3)
    assert math.isnan(summarise([math.inf])["mean"])


def test_the_interval_is_that_of_95_percent():
    values = np.random.default_rng(1).normal(3, 2, 400)
    summary = summarise(values)
    half = 1.96 * values.std() / 20
    assert summary["low"] == pytest.approx(values.mean() - half, abs=0.05 * half)
    assert summary["high"] == pytest.approx(values.mean() + half, abs=0.05 * half)
    assert summary == summarise(values)


@pytest.mark.parametrize("values", [[0.7], [0.1] * 7])
def test_the_interval_of_one_value_is_that_value(values):
    summary = summarise(values)
    assert summary["low"] == summary["high"] == summary["mean"] == pytest.approx(values[0])


def test_pairing_is_by_case():
    a, b = {"x": 0.9, "y": 0.5, "z": 0.1}, {"y": 0.4, "x": 0.8, "w": 0.0}
    found = paired_difference(a, b)
    assert found["cases"] == 2
    assert found["mean"] == found["low"] == found["high"] == pytest.approx(0.1)


def test_a_difference_to_a_miss_is_counted_and_not_dropped():
    a, b = {"x": 3.0, "y": math.inf, "z": 1.0, "w": math.inf}, {"x": 2.0, "y": 1.0, "z": math.inf, "w": math.inf}
    assert paired_difference(a, b) == {"mean": 1, "low": 1, "high": 1, "misses": 3, "cases": 4}


def test_runs_without_a_common_case_are_not_compared():
    with pytest.raises(UserError, match="no test case in common"):
        paired_difference({"x": 1.0}, {"y": 1.0})


def test_a_paired_interval_is_narrower_than_the_cases_spread():
    random = np.random.default_rng(2)
    b = dict(zip("abcdefghijklmnop", random.uniform(0, 1, 16), strict=True))
    a = {case: value + random.normal(0.02, 0.005) for case, value in b.items()}
    found = paired_difference(a, b)
    assert 0.01 < found["low"] < found["mean"] < found["high"] < 0.03


def test_cases_survive_the_file(tmp_path):
    cases = {"a": {"dice": 0.1 + 0.2, "hd": math.inf}, "b": {"dice": 0.0, "hd": -math.inf}}
    write_cases(tmp_path / "cases.json", cases, task="organ")
    assert read_cases(tmp_path / "cases.json") == cases
    assert '"inf"' in (tmp_path / "cases.json").read_text()


def test_a_damaged_file_is_an_error_that_names_it(tmp_path):
    file = tmp_path / "cases.json"
    for text in ('{"cases": {"a"', "{}", '{"cases": {"a": {"dice": "good"}}}', "[]"):
        file.write_text(text)
        with pytest.raises(UserError, match=r"cases\.json"):
            read_cases(file)
    with pytest.raises(UserError, match=r"nowhere\.json"):
        read_cases(tmp_path / "nowhere.json")
