"""Means over cases and paired differences, with their 95% intervals: over the cases of one run by the bootstrap, over
those of several seeds by `seeds_interval`."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import stdtrit

from data_tools.errors import UserError

RESAMPLES = 10_000


def summarise(values: Sequence[float]) -> dict[str, Any]:
    """Mean over cases with its 95% bootstrap interval, and how many cases are infinite.

    `mean`, `low` and `high` are over the finite values (NaN if there is none), so they never go without `misses`;
    `median` counts a miss as larger than everything.
    """
    values = np.asarray(values, dtype=np.float64)
    finite = values[np.isfinite(values)]
    mean, low, high = bootstrap(finite) if finite.size else (math.nan,) * 3
    return {
        "mean": mean,
        "low": low,
        "high": high,
        "median": float(np.median(values)),
        "misses": int(values.size - finite.size),
        "cases": int(values.size),
    }


def paired_difference(a: Mapping[str, float], b: Mapping[str, float]) -> dict[str, Any]:
    """Mean of a − b over the cases of both with its 95% bootstrap interval.

    A case that is infinite in either has no difference: it counts among `cases` and `misses`, as in `summarise`.
    Raises `UserError` if there is no case of both.
    """
    cases = sorted(a.keys() & b.keys())
    if not cases:
        raise UserError("the two runs have no test case in common")
    summary = summarise([a[case] - b[case] for case in cases])
    return {key: summary[key] for key in ("mean", "low", "high", "misses", "cases")}


def over_seeds(runs: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Mean over runs of several seeds and the cases of all of them, with its 95% interval; a single run's `summarise`.

    Returns `mean`, `low`, `high`, `misses` and `cases`. A case that is infinite in any run counts as a miss.
    """
    return summarise(list(runs[0].values())) if len(runs) == 1 else between_arms(runs)


def difference_over_seeds(
    a: Sequence[Mapping[str, float]], b: Sequence[Mapping[str, float]], paired: bool
) -> dict[str, Any]:
    """Mean of a − b over runs of several seeds and the cases of all of them, with its 95% interval (see `over_seeds`).

    `paired` says that each run of `a` stands beside the one of its seed in `b`. A single run is compared with the mean
    over `b`, its interval being over cases. Raises `UserError` if there is no case of all.
    """
    if len(a) == 1:
        return paired_difference(a[0], mean_by_case(b))
    if not paired:
        return between_arms(a, b)
    return between_arms([{case: x[case] - y[case] for case in x.keys() & y.keys()} for x, y in zip(a, b, strict=True)])


def between_arms(*arms: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Mean of one arm, or of the first less the second, over the seeds of each and the cases of all."""
    cases = sorted(set.intersection(*(set(values) for runs in arms for values in runs)))
    if not cases:
        raise UserError("the runs have no test case in common")
    values = [np.array([[values[case] for case in cases] for values in runs], dtype=np.float64) for runs in arms]
    finite = np.isfinite(np.concatenate(values)).all(axis=0)
    mean, low, high = map(float, seeds_interval(*(v[:, finite] for v in values))) if finite.any() else (math.nan,) * 3
    return {"mean": mean, "low": low, "high": high, "misses": int((~finite).sum()), "cases": len(cases)}


def mean_by_case(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Each case's mean over runs, for the cases of all of them."""
    cases = set.intersection(*(set(values) for values in runs))
    return {case: float(np.mean([values[case] for values in runs])) for case in sorted(cases)}


def seeds_interval(a: np.ndarray, b: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean of `a`, or of a − b, and its 95% interval over seeds and cases.

    `a` (…, S, C) and `b` (…, S′, C) hold a value for each seed and case; their seeds are other draws, their cases the
    same. The variance of the mean is that of the seeds' means over S (and S′) and that of the cases' means over C, and
    the interval is Student's t with Welch and Satterthwaite's degrees of freedom (Satterthwaite, Biometrics 1946). A
    bootstrap of seeds and then cases is much too narrow with three seeds; benchmarks/intervals.py shows what either
    covers. What is a case's own with one seed counts in both variances, so the interval errs to the wide side.
    """
    arms = [a] if b is None else [a, b]
    by_case = a.mean(axis=-2) if b is None else a.mean(axis=-2) - b.mean(axis=-2)
    mean = by_case.mean(axis=-1)
    variance, spent = np.zeros_like(mean), np.zeros_like(mean)
    for values in (by_case, *(arm.mean(axis=-1) for arm in arms)):
        count = values.shape[-1]
        if count > 1:  # Of a single one, no variance is known.
            part = values.var(axis=-1, ddof=1) / count
            variance, spent = variance + part, spent + part**2 / (count - 1)
    freedom = np.maximum(variance**2 / np.maximum(spent, 1e-300), 1)
    half = stdtrit(freedom, 0.975) * np.sqrt(variance)
    return mean, mean - half, mean + half


def bootstrap(values: np.ndarray) -> tuple[float, float, float]:
    """Mean and its 95% percentile interval over `RESAMPLES` resamples, the same for the same values."""
    random = np.random.default_rng(0)
    means = values[random.integers(0, values.size, (RESAMPLES, values.size))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(values.mean()), float(low), float(high)
