"""Cases for people: tables and sizes."""

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.table import Table

from .store import Case


def cases_table(title: str, regions: Sequence[str], columns: Sequence[str] = ()) -> Table:
    """The head of a table of cases, with a column for each region and more `columns` on the right."""
    table = Table(title=title, box=box.SIMPLE_HEAD)
    for column in ("case", "slices", "size", "spacing mm", "source axes", "voxels", *regions, *columns):
        table.add_column(column, no_wrap=column == "case")
    table.caption = "spacing of slices, rows, columns"
    if regions:
        table.caption += f"; {' and '.join(filter(None, (', '.join(regions[:-1]), regions[-1])))}: slices with it"
    return table


def add_case(table: Table, name: str, case: Case | None, *more: str) -> None:
    """A case in such a table, with what its further columns say; only its name if there is nothing to know of it."""
    row = case_row(case) if case else [name]
    table.add_row(*row, *[""] * (len(table.columns) - len(row) - len(more)), *more)


def case_row(case: Case) -> list[str]:
    """The facts of a case in such a table."""
    return [
        case.name,
        str(case.shape[0]),
        f"{case.shape[1]}×{case.shape[2]}",
        " ".join(f"{value:.3g}" for value in case.spacing),
        case.source["image"]["orientation"],
        case.dtype,
        *(str(len(case.slices_with(region))) for region in case.regions),
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
