"""A table of MLflow runs: teacher, student alone, student distilled: spark-dist compare --experiment NAME"""

if __name__ == "__main__":
    from spark_dist.cli import module_main

    module_main("spark_dist.compare")

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from rich.console import Console
from rich.table import Table

from data_tools.files import write_text
from data_tools.ownership import check_output
from data_tools.progress import console
from data_tools.tables import check_tables, write_tables
from spark_dist.evaluation.comparison import Row, compare
from spark_dist.evaluation.figures import check_format, comparison_figure
from spark_dist.evaluation.tables import as_latex, as_markdown, as_table, heading, names
from spark_dist.training.finished_runs import load_runs

from .options import ServerOptions


@dataclass(kw_only=True)
class CompareOptions(ServerOptions):
    """Compare the runs of an experiment on their test cases."""

    experiment: str = ""
    """MLflow experiment (dataset-task); may be left out where there is only one."""
    metric: str = "dice"
    """The metric to compare: dice, surface_dice, hd95, assd, voe, or dice_labelled (the original's protocol)."""
    csv: Path | None = None
    """CSV file for the table."""
    json: Path | None = None
    """JSON file for the table."""
    markdown: Path | None = None
    """Markdown file for the table."""
    latex: Path | None = None
    """LaTeX file for the table, which needs the package booktabs."""
    figure: Path | None = None
    """Picture of the metric against the number of parameters; its name's end says the format: .png, .pdf, .svg …"""

    def __post_init__(self):
        super().__post_init__()
        if self.figure:
            check_format(self.figure, "--figure", ", or --metric for what to compare")


OPTIONS = CompareOptions


def run(options: CompareOptions) -> None:
    """Print the table, and write it and the figure if asked to."""
    columns = [field.name for field in fields(Row)]
    check_tables(columns, options.csv, options.json)
    for option in ("markdown", "latex", "figure"):
        if file := getattr(options, option):
            check_output(file, f"--{option}")
    runs, notes = load_runs(options.tracking_uri, options.experiment)
    rows = compare(runs, options.metric)
    panels = by_heading(rows, options.metric)
    for title, group in panels.items():
        show(as_table(group, options.metric, title))
    for note in notes:
        console.print(note)
    write_tables(map(asdict, rows), columns, options.csv, options.json)
    if options.markdown:
        write_text(options.markdown, as_markdown(panels, options.metric))
    if options.latex:
        write_text(options.latex, as_latex(panels, options.metric))
    if options.figure:
        comparison_figure(panels, options.metric, options.figure)


def by_heading(rows: Sequence[Row], metric: str) -> dict[str, list[Row]]:
    """The rows of each data and task, which are a table of their own, by its heading.

    The same names do not make the same data: where they are of several, the heading says which.
    """
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault((row.data or (row.dataset, row.split), row.task), []).append(row)
    titles = Counter(names(group[0]) for group in groups.values())
    return {
        heading(group, metric, group[0].data[:8] if titles[names(group[0])] > 1 else ""): group
        for group in groups.values()
    }


def show(table: Table) -> None:
    """Print a table whole: in a narrow terminal its cells fold, in a file or pipe it is as wide as it must be."""
    wide = Console(width=1000, markup=False).measure(table).maximum
    (console if console.is_terminal else Console(width=wide, highlight=False, markup=False)).print(table)
