"""Cases for people: tables and sizes."""

from collections.abc import Iterable
from pathlib import Path

from rich import box
from rich.table import Table

from .store import Case


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
