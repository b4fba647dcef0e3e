"""Means over cases and paired differences, with their 95% intervals."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

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


def bootstrap(values: np.ndarray) -> tuple[float, float, float]:
    """Mean and its 95% percentile interval over `RESAMPLES` resamples, the same for the same values."""
    random = np.random.default_rng(0)
    means = values[random.integers(0, values.size, (RESAMPLES, values.size))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(values.mean()), float(low), float(high)
