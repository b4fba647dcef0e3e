"""What people see: one console, the tables of cases, and the progress bar."""

import sys
from collections.abc import Iterable
from pathlib import Path

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from .store import Case

# Written to a file, a table is as wide as it needs to be.
console = Console(highlight=False, markup=False, soft_wrap=True, width=None if sys.stdout.isatty() else 160)


class RateColumn(ProgressColumn):
    """Cases per minute."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{60 * speed:.0f} cases/min")


def progress(total: int, what: str) -> Progress:
    """A bar of `total` cases with rate and time left; advance its task 0."""
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), RateColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console, transient=True)
    bar.add_task(what, total=total)
    return bar


def cases_table(title: str, columns: Iterable[str] = ()) -> Table:
    """The head of a table of cases, with more `columns` on the right."""
    table = Table(title=title, box=box.SIMPLE_HEAD)
    for column in ("case", "slices", "size", "spacing mm", "source axes", "voxels", "organ", "tumour", *columns):
        table.add_column(column, no_wrap=column == "case")
    table.caption = "spacing of slices, rows, columns; organ and tumour: slices with it"
    return table


def case_row(case: Case) -> list[str]:
    """A case in such a table."""
    return [
        case.name,
        str(case.shape[0]),
        f"{case.shape[1]}×{case.shape[2]}",
        " ".join(f"{value:.3g}" for value in case.spacing),
        case.source["image"]["orientation"],
        case.dtype,
        *(str(len(case.task_slices(task))) for task in ("organ", "tumour")),
    ]


def bytes_text(count: float) -> str:
    """A number of bytes, for people."""
    return f"{count / 2**20:.1f} MiB" if count < 2**30 else f"{count / 2**30:.1f} GiB"


def folder_size(folder: Path) -> str:
    """The bytes of a folder's files, for people."""
    return bytes_text(sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()))


def window_text(window: dict) -> str:
    """A store's window, for people."""
    unit = " percentile of each case" if window["kind"] == "percentile" else ""
    return f"window {window['low']:g}…{window['high']:g}{unit}"
