"""How often 95% intervals over seeds and cases cover the true difference: python -m benchmarks.intervals

An experiment is the difference of two arms for every seed and case: an effect of the seed, one of the case, and what is
the case's own with that seed, all in points of Dice. The true difference is 0. Writes results/intervals.md.
"""

import argparse
from pathlib import Path

import numpy as np

from spark_dist.evaluation.intervals import seeds_interval

CASES = 60
SEEDS = (3, 5, 8)
COMMON = [{"seed": 0.5, "case": 3.0, "own": 2.0}, {"seed": 1.0, "case": 3.0, "own": 2.0}]
"""Standard deviations that were met: seeds differ by half a point or one, cases by three."""
EXTREME = [
    {"seed": 0.0, "case": 3.0, "own": 3.0},
    {"seed": 2.0, "case": 3.0, "own": 1.0},
    {"seed": 1.0, "case": 3.0, "own": 2.0, "skewed": True},
]

Interval = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Mean, low and high of each experiment."""


def draw(
    random: np.random.Generator,
    experiments: int,
    seeds: int,
    seed: float,
    case: float,
    own: float,
    skewed: bool = False,
) -> np.ndarray:
    """Experiments (N, S, C) whose effects have these standard deviations; `skewed`: the cases' are exponential.

    Of the seven parameters, four are the model's, which a setting gives by name.
    """
    shape = (experiments, 1, CASES)
    cases = random.exponential(1, shape) - 1 if skewed else random.normal(0, 1, shape)
    own_effects = random.normal(0, own, (experiments, seeds, CASES))
    return random.normal(0, seed, (experiments, seeds, 1)) + case * cases + own_effects


def covered(interval: Interval) -> float:
    """The share of experiments whose interval holds the true difference, 0."""
    _, low, high = interval
    return float(((low <= 0) & (high >= 0)).mean())


def over_cases(values: np.ndarray) -> Interval:
    """The interval over cases alone: each case's mean over seeds comes first."""
    by_case = values.mean(axis=1)
    half = 1.96 * by_case.std(axis=1, ddof=1) / CASES**0.5
    return by_case.mean(axis=1), by_case.mean(axis=1) - half, by_case.mean(axis=1) + half


def bootstrap_over_seeds(values: np.ndarray, resamples: int = 1000) -> Interval:
    """The percentile bootstrap that resamples seeds, then cases."""
    random = np.random.default_rng(0)
    seeds, cases = (random.multinomial(count, [1 / count] * count, resamples) / count for count in values.shape[1:])
    means = np.einsum("rs,nsc,rc->nr", seeds, values, cases, optimize=True)
    low, high = np.percentile(means, [2.5, 97.5], axis=1)
    return values.mean(axis=(1, 2)), low, high


METHODS = {
    "seeds_interval": seeds_interval,
    "seeds, then cases, by bootstrap": bootstrap_over_seeds,
    "cases alone": over_cases,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experiments", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[2, *SEEDS])
    arguments = parser.parse_args()
    lines = [
        f"Share of {arguments.experiments} simulated experiments of {CASES} cases whose 95% interval covers the true",
        "difference, and the interval's median half width in points:",
        "",
        f"| SD of seeds, cases, own | seeds | {' | '.join(METHODS)} |",
        "|---" * (2 + len(METHODS)) + "|",
    ]
    for setting in COMMON + EXTREME:
        for seeds in arguments.seeds:
            values = draw(np.random.default_rng(seeds), arguments.experiments, seeds, **setting)
            cells = []
            for method in METHODS.values():
                interval = method(values)
                cells.append(f"{100 * covered(interval):.1f}%, ±{np.median(interval[2] - interval[1]) / 2:.2f}")
            name = ", ".join(key if value is True else f"{value:g}" for key, value in setting.items())
            lines.append(f"| {name} | {seeds} | {' | '.join(cells)} |")
    text = "\n".join(lines) + "\n"
    (Path(__file__).parent / "results" / "intervals.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
