"""A table of MLflow runs: teacher, student alone, student distilled: spark-dist compare --experiment NAME"""

if __name__ == "__main__":
    from spark_dist.cli import module_main

    module_main("spark_dist.compare")

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from rich.box import HORIZONTALS
from rich.console import Console
from rich.table import Table

from data_tools.progress import console
from data_tools.tables import check_tables, write_tables
from spark_dist.evaluation.comparison import Row, compare
from spark_dist.training.finished_runs import load_runs

from .options import ServerOptions


@dataclass(kw_only=True)
class CompareOptions(ServerOptions):
    """Compare the runs of an experiment on their test cases."""

    experiment: str = ""
    """MLflow experiment (dataset-task); may be left out where there is only one."""
    metric: str = "dice"
    """The metric to compare: dice, hd95, assd, voe, or dice_labelled (the original's protocol)."""
    csv: Path | None = None
    """CSV file for the table."""
    json: Path | None = None
    """JSON file for the table."""


OPTIONS = CompareOptions


def run(options: CompareOptions) -> None:
    """Print the table, and write it if asked to."""
    columns = [field.name for field in fields(Row)]
    check_tables(columns, options.csv, options.json)
    runs, notes = load_runs(options.tracking_uri, options.experiment)
    rows = compare(runs, options.metric)
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault((row.data or (row.dataset, row.split), row.task), []).append(row)
    titles = Counter(title(group[0]) for group in groups.values())
    for group in groups.values():
        # The same names do not make the same data.
        show(as_table(group, options.metric, group[0].data[:8] if titles[title(group[0])] > 1 else ""))
    for note in notes:
        console.print(note)
    write_tables(map(asdict, rows), columns, options.csv, options.json)


def title(row: Row) -> str:
    """The names of a row's data."""
    return f"{row.dataset}, {row.task}, split {row.split}"


def as_table(rows: Sequence[Row], metric: str, fingerprint: str = "") -> Table:
    """Rows of the same data for people, which a `fingerprint` may tell from data of the same names.

    Differences are in points: hundredths for overlap metrics.
    """
    scale = 100 if metric.startswith(("dice", "voe", "rvd")) else 1
    data = title(rows[0]) + (f" (data {fingerprint})" if fingerprint else "")
    table = Table(title=f"{data}: test {metric} of {rows[0].cases} cases, mean and 95% interval", box=HORIZONTALS)
    for name in (
        "",
        "network",
        "seed",
        "parameters",
        metric,
        "HD95 mm",
        "points to alone" if scale == 100 else "to alone",
    ):
        table.add_column(name, justify="right" if name == "parameters" else "left", overflow="fold")
    for before, row in zip([None, *rows], rows, strict=False):
        if before and "seeds" in row.seeds and "seeds" not in before.seeds:
            table.add_section()
        difference = ""
        if row.difference is not None:
            parts = [scale * part for part in (row.difference, row.difference_low, row.difference_high)]
            difference = finite("{:+.2f} [{:+.2f}, {:+.2f}]", *parts) + missed(row.difference_misses)
            difference += "*" if row.against == "all seeds" else ""
        table.add_row(
            row.title,
            row.network if row.width == 1 else f"{row.network} ×{row.width:g}",
            row.seeds,
            f"{row.parameters:,}",
            finite("{:.4f} [{:.3f}, {:.3f}]", row.mean, row.low, row.high) + missed(row.misses),
            finite("{:.1f}", row.hd95) + missed(row.hd95_misses),
            difference,
        )
    table.caption = "\n".join(remarks(rows))
    return table


def remarks(rows: Sequence[Row]) -> list[str]:
    """Notes that a table needs on its differences and intervals."""
    lines = []
    if any(row.against == "all seeds" for row in rows):
        lines.append("* no student alone of the same seed: to the mean of those there are")
    several = [row.seeds for row in rows if row.seeds.endswith(" seeds")]
    if len(several) < len(rows):
        lines.append("one seed: the interval is over cases alone and says nothing of another seed")
    if "2 seeds" in several:
        lines.append(
            "2 seeds: the interval misses the true value more often than one time in twenty; take three or more"
        )
    return lines


def finite(pattern: str, *values: float) -> str:
    """Values in a pattern, or a dash where every case is missed."""
    return "–" if math.isnan(values[0]) else pattern.format(*values)


def missed(misses: int) -> str:
    """Says that a mean is without some cases."""
    return f" ({misses} missed)" if misses else ""


def show(table: Table) -> None:
    """Print a table whole: in a narrow terminal its cells fold, in a file or pipe it is as wide as it must be."""
    wide = Console(width=1000, markup=False).measure(table).maximum
    (console if console.is_terminal else Console(width=wide, highlight=False, markup=False)).print(table)
