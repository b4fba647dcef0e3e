"""Where a store lies, and how its arrays are read there."""

from pathlib import Path

import numpy as np
import tensorstore as ts

from .errors import UserError


def open_array(path: Path, context: ts.Context | None = None) -> ts.TensorStore:
    """An existing Zarr v3 array, unread. A chunk that is not there is an error, not zeros."""
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": str(Path(path).absolute())},
        "fill_missing_data_reads": False,
    }
    try:
        return ts.open(spec, open=True, read=True, context=context).result()
    except ValueError as error:
        raise UserError(f"{path}: can't be opened ({first_line(error)}); prepare this case again") from None


def finished(read: ts.Future, what: str) -> np.ndarray:
    """The result of a read. Raises `UserError` naming `what` if a chunk is damaged or missing."""
    try:
        return read.result()
    except (ValueError, OSError) as error:
        raise damaged(what, error) from None


def damaged(what: str, error: Exception) -> UserError:
    """An error for voxels that are not as they were written."""
    return UserError(f"{what} is damaged ({first_line(error)}); prepare the case again")


def first_line(error: Exception) -> str:
    """The start of an error's message, fit for one line."""
    return str(error).splitlines()[0][:160]
