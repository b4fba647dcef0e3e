"""Intervals over seeds and cases together."""

import math

import numpy as np
import pytest
from scipy import stats

from benchmarks.intervals import COMMON, SEEDS, bootstrap_over_seeds, covered, draw, over_cases
from data_tools.errors import UserError
from spark_dist.evaluation.intervals import difference_over_seeds, over_seeds, seeds_interval, summarise


def runs(values):
    return [dict(zip("abcdefgh", row, strict=False)) for row in values]


@pytest.mark.parametrize("setting", COMMON, ids=str)
@pytest.mark.parametrize("seeds", SEEDS)
def test_the_interval_covers_the_true_difference_in_95_of_100_experiments(setting, seeds):
    experiments = draw(np.random.default_rng(seeds), 4000, seeds, **setting)
    assert 0.93 <= covered(seeds_interval(experiments)) <= 0.97


def test_intervals_over_cases_and_a_bootstrap_of_three_seeds_cover_less():
    experiments = draw(np.random.default_rng(0), 500, 3, **COMMON[1])
    assert covered(over_cases(experiments)) < 0.85
    assert covered(bootstrap_over_seeds(experiments, resamples=400)) < 0.92


def test_arms_whose_seeds_are_no_pairs_are_covered_as_well():
    random = np.random.default_rng(5)
    cases = random.normal(0, 3, (4000, 1, 60))
    a, b = (cases + draw(random, 4000, s, seed=1.0, case=1.0, own=1.0) for s in (3, 5))
    assert 0.93 <= covered(seeds_interval(a, b)) <= 0.97


def test_without_a_spread_between_seeds_it_is_the_t_interval_of_the_cases():
    values = np.random.default_rng(0).normal(0, 1, 8)
    mean, low, high = seeds_interval(np.stack([values] * 3))
    expected = stats.t.interval(0.95, 7, values.mean(), stats.sem(values))
    assert (low, mean, high) == pytest.approx((expected[0], values.mean(), expected[1]))


def test_without_a_spread_between_cases_it_is_the_t_interval_of_the_seeds():
    values = np.array([0.1, 0.3, 0.2])
    _, low, high = seeds_interval(np.repeat(values[:, None], 8, axis=1))
    assert (low, high) == pytest.approx(stats.t.interval(0.95, 2, values.mean(), stats.sem(values)))
    a, b = np.repeat(values[:, None], 8, axis=1), np.repeat([[0.0], [0.5], [0.1], [0.2]], 8, axis=1)
    welch = stats.ttest_ind(a[:, 0], b[:, 0], equal_var=False).confidence_interval()
    assert seeds_interval(a, b)[1:] == pytest.approx(tuple(welch))


def test_what_does_not_vary_has_no_width():
    assert seeds_interval(np.full((3, 4), 0.5)) == (0.5, 0.5, 0.5)
    assert seeds_interval(np.full((3, 1), 0.5)) == (0.5, 0.5, 0.5)


def test_a_case_that_one_seed_misses_is_counted_and_not_dropped():
    found = over_seeds(runs([[1, 2, math.inf], [3, 2, 1]]))
    assert (found["mean"], found["misses"], found["cases"]) == (2, 1, 3)
    found = difference_over_seeds(runs([[1, 2, math.inf], [3, 2, 1]]), runs([[0, math.inf, 1], [1, 1, 1]]), paired=True)
    assert (found["mean"], found["misses"], found["cases"]) == (1.5, 2, 3)
    assert math.isnan(over_seeds(runs([[math.inf], [1]]))["mean"])


def test_a_single_run_keeps_the_interval_over_its_cases():
    (run,) = runs([[0.1, 0.5, 0.7]])
    assert over_seeds([run]) == summarise(list(run.values()))
    found = difference_over_seeds([run], runs([[0, 0.2, 0.2], [0, 0.2, 0.4]]), paired=False)
    assert found["mean"] == pytest.approx((0.1 + 0.3 + 0.4) / 3)


def test_runs_without_a_common_case_have_no_difference():
    a, b = [{"x": 1.0}, {"x": 2.0}], [{"y": 1.0}, {"y": 1.0}]
    for paired in (True, False):
        with pytest.raises(UserError, match="no test case in common"):
            difference_over_seeds(a, b, paired)
