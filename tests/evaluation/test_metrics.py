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
    case_metrics,
    dice,
    overlap_counts,
    read_cases,
    rvd,
    surface_distances,
    voe,
    write_cases,
)

volumes = arrays(bool, (3, 4, 5))


def test_counts_are_those_of_each_slice():
    prediction, truth = np.zeros((2, 2, 3, 3), bool)
    prediction[0, 0], truth[0, :2], truth[1, 0, 0] = True, True, True
    assert overlap_counts(prediction, truth).tolist() == [[3, 3, 6], [0, 0, 1]]
    assert overlap_counts(prediction, truth).dtype == np.int64


@pytest.mark.parametrize(
    ("counts", "expected"),
    [((0, 0, 0), (1, 0, 0)), ((0, 0, 5), (0, 1, -1)), ((0, 5, 0), (0, 1, math.inf)), ((5, 5, 5), (1, 0, 0))],
)
def test_overlap_where_there_is_nothing_to_find(counts, expected):
    assert (dice(counts), voe(counts), rvd(counts)) == expected


@given(volumes, volumes)
def test_overlap_is_that_of_sets(prediction, truth):
    a, b = (set(map(tuple, np.argwhere(v))) for v in (prediction, truth))
    counts = overlap_counts(prediction, truth).sum(axis=0)
    assert dice(counts) == pytest.approx(2 * len(a & b) / (len(a) + len(b)) if a or b else 1)
    assert voe(counts) == pytest.approx(1 - len(a & b) / len(a | b) if a or b else 0)
    assert rvd(counts) == pytest.approx((len(a) - len(b)) / len(b) if b else math.inf if a else 0)


def surface(volume):
    inside = set(map(tuple, np.argwhere(volume)))
    steps = [step for step in itertools.product((-1, 0, 1), repeat=3) if sum(map(abs, step)) == 1]
    return [v for v in inside if any(tuple(np.add(v, step)) not in inside for step in steps)]


@settings(max_examples=40, deadline=None)
@given(volumes, volumes, st.tuples(*[st.floats(0.5, 5)] * 3))
def test_surface_distances_are_those_of_brute_force(prediction, truth, spacing):
    found = surface_distances(prediction, truth, spacing)
    if not prediction.any() or not truth.any():
        expected = 0 if prediction.any() == truth.any() else math.inf
        assert set(found.values()) == {expected}
        return
    a, b = (np.array(surface(v)) * spacing for v in (prediction, truth))
    between = np.linalg.norm(a[:, None] - b[None], axis=-1)
    there, back = between.min(axis=1), between.min(axis=0)
    assert found["hd"] == pytest.approx(max(there.max(), back.max()), rel=1e-5)
    assert found["hd95"] == pytest.approx(max(np.percentile(there, 95), np.percentile(back, 95)), rel=1e-5)
    assert found["assd"] == pytest.approx(np.concatenate([there, back]).mean(), rel=1e-5)


@settings(max_examples=20, deadline=None)
@given(volumes, volumes, st.tuples(*[st.floats(0.5, 5)] * 3))
def test_surface_distances_are_symmetric(prediction, truth, spacing):
    there, back = surface_distances(prediction, truth, spacing), surface_distances(truth, prediction, spacing)
    assert there == pytest.approx(back)
    assert set(surface_distances(truth, truth, spacing).values()) == {0}


def test_the_box_around_the_targets_changes_no_distance():
    truth, prediction = np.zeros((2, 20, 30, 40), bool)
    truth[5:9, 6:12, 7:15] = True
    prediction[5:9, 6:12, 10:18] = True
    assert surface_distances(prediction, truth, (5, 0.7, 0.8))["hd"] == pytest.approx(3 * 0.8)
    prediction[19, 29, 39] = True
    far = np.hypot.reduce([5 * (19 - 8), 0.7 * (29 - 11), 0.8 * (39 - 14)])
    assert surface_distances(prediction, truth, (5, 0.7, 0.8))["hd"] == pytest.approx(far)


def test_distances_print_nothing(recwarn):
    truth = np.ones((2, 3, 3), bool)
    surface_distances(truth, truth, (1, 1, 1))
    assert not [str(w.message) for w in recwarn if "monai" in str(w.message)]


@pytest.mark.parametrize(("found", "value"), [(False, 0), (True, math.inf)])
def test_a_case_without_the_target(found, value):
    truth = np.zeros((3, 4, 4), bool)
    prediction = np.full_like(truth, found)
    figures = case_metrics(prediction, truth, (1, 1, 1))
    assert {figures[key] for key in ("hd", "hd95", "assd", "rvd")} == {value}
    assert figures["dice"] == (not found)
    assert figures["dice_labelled"] == 1  # no slice shows the target, so none is counted


def test_the_two_protocols_differ_in_slices_without_the_target():
    truth = np.zeros((3, 4, 4), bool)
    truth[1, :2] = True
    prediction = truth.copy()
    prediction[2] = True
    figures = case_metrics(prediction, truth, (1, 1, 1), distances=False)
    assert figures["dice_labelled"] == 1
    assert figures["dice"] == pytest.approx(2 * 8 / (24 + 8))


def test_the_original_protocol_may_have_a_prediction_of_its_own():
    truth = np.ones((1, 4, 4), bool)
    figures = case_metrics(np.zeros_like(truth), truth, (1, 1, 1), distances=False, labelled=truth)
    assert (figures["dice"], figures["dice_labelled"]) == (0, 1)
    assert "hd" not in figures


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
