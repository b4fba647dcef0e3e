"""Tables as files: CSV and JSON, whole or not at all, and never in the place of a file of another kind."""

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import UserError
from .files import write_text


def check_tables(columns: Sequence[str], csv_file: Path | None, json_file: Path | None) -> None:
    """Raise `UserError` if there is a file that is no table of these columns, and would be written over."""
    for file, option, read in ((csv_file, "--csv", csv_columns), (json_file, "--json", json_columns)):
        if file and (file.exists() or file.is_symlink()) and read(file) != list(columns):
            raise UserError(f"{file}: exists and is no such table; move it away, or name another {option}")


def csv_columns(file: Path) -> list[str] | None:
    """The head of a CSV file; None if it has none."""
    try:
        with open(file, newline="") as lines:
            return next(csv.reader(lines), None)
    except (OSError, ValueError, csv.Error):
        return None


def json_columns(file: Path) -> list[str] | None:
    """The keys of the first row of a JSON file; None if it is no list of rows."""
    try:
        rows = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError):
        return None
    return list(rows[0]) if isinstance(rows, list) and rows and isinstance(rows[0], dict) else None


def write_tables(
    rows: Iterable[Mapping[str, Any]], columns: Sequence[str], csv_file: Path | None, json_file: Path | None
) -> None:
    """Write rows of these columns. What is not a finite number is left empty (CSV) or null (JSON).

    Raises `UserError` as `check_tables` does, which is called before the rows are computed.
    """
    check_tables(columns, csv_file, json_file)
    plain = [
        {c: None if isinstance(row[c], float) and not math.isfinite(row[c]) else row[c] for c in columns}
        for row in rows
    ]
    if json_file:
        write_text(json_file, json.dumps(plain, indent=1, allow_nan=False))
    if csv_file:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, columns)
        writer.writeheader()
        writer.writerows(plain)
        write_text(csv_file, text.getvalue())
