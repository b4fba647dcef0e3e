import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from spark_dist.metrics import (
    case_metrics,
    dice,
    overlap_counts,
    paired_difference,
    read_cases,
    rvd,
    summarise,
    surface_distances,
    voe,
    write_cases,
)

volumes = arrays(bool, (3, 4, 5))


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


def test_the_two_protocols_differ_in_slices_without_the_target():
    truth = np.zeros((3, 4, 4), bool)
    truth[1, :2] = True
    prediction = truth.copy()
    prediction[2] = True
    figures = case_metrics(prediction, truth, (1, 1, 1), distances=False)
    assert figures["dice_labelled"] == 1
    assert figures["dice"] == pytest.approx(2 * 8 / (24 + 8))


def test_a_miss_is_counted_and_not_dropped():
    summary = summarise([1.0, 3.0, math.inf])
    assert (summary["mean"], summary["misses"], summary["cases"], summary["median"]) == (2, 1, 3, 3)
    assert math.isnan(summarise([math.inf])["mean"])


def test_the_interval_covers_the_mean_about_as_often_as_it_says():
    random = np.random.default_rng(1)
    inside = 0
    for _ in range(200):
        summary = summarise(random.normal(0, 1, 40))
        inside += summary["low"] <= 0 <= summary["high"]
    assert 0.88 <= inside / 200 <= 0.99


def test_pairing_is_by_case():
    a, b = {"x": 0.9, "y": 0.5, "z": 0.1}, {"y": 0.4, "x": 0.8, "w": 0.0}
    found = paired_difference(a, b)
    assert found["cases"] == 2
    assert found["mean"] == found["low"] == found["high"] == pytest.approx(0.1)


def test_cases_survive_the_file(tmp_path):
    cases = {"a": {"dice": 0.1 + 0.2, "hd": math.inf}, "b": {"dice": 0.0, "hd": -math.inf}}
    write_cases(tmp_path / "cases.json", cases, task="organ")
    assert read_cases(tmp_path / "cases.json") == cases
