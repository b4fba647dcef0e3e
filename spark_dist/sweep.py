"""The combinations of a grid of options: spark-dist sweep launch/slurm/sweep.yaml"""

if __name__ == "__main__":
    from spark_dist.cli import module_main

    module_main("spark_dist.sweep")

from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from data_tools.errors import UserError, unknown_name

from .options import Natural, Options
from .parsing import recipe_keys


@dataclass(kw_only=True)
class SweepOptions(Options):
    """Show the combinations of a grid's values, or one of them as options of distill."""

    grid: str = field(metadata={"positional": "YAML file: each option with a list of values"})
    task: Natural = 0
    """Print this combination's options, one word a line, counted from 1 (0: list all)."""
    runs: Path = Path("runs")
    """Where the jobs' folders lie."""


OPTIONS = SweepOptions


def run(options: SweepOptions) -> None:
    """Print what is asked for, plainly, as scripts read it."""
    combinations = read_grid(Path(options.grid))
    if not options.task:
        for number, combination in enumerate(combinations, start=1):
            print(number, *(f"{key}={value}" for key, value in combination.items()))
        return
    if not 1 <= options.task <= len(combinations):
        raise UserError(f"{options.grid}: has {len(combinations)} combinations, and no number {options.task}")
    chosen, name = combinations[options.task - 1], Path(options.grid).stem
    for key, value in chosen.items():
        print(f"--{key}={value}")
    print(f"--sweep={name}")
    print(f"--out={options.runs / name / '-'.join(map(str, chosen.values()))}")


def read_grid(path: Path) -> list[dict[str, Any]]:
    """All combinations of a grid's values, the last option's changing fastest.

    Raises `UserError` if the file can't be read or names an option that distill does not have.
    """
    try:
        grid = yaml.safe_load(path.read_text()) or {}
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{path}: can't be read as a grid ({' '.join(str(error).split())})") from None
    if not isinstance(grid, dict) or not all(isinstance(values, list) for values in grid.values()):
        raise UserError(f"{path}: a grid is lines of 'option: [value, value]'")
    for key in grid:
        if key not in recipe_keys():
            raise UserError(f"{path}: {unknown_name('option', key, recipe_keys())}")
    return [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
