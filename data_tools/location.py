"""Location of a store, and how its arrays are read there."""

import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from zarr.storage import FsspecStore

from .errors import UserError

if TYPE_CHECKING:  # It takes long to import, and most commands do without.
    import tensorstore

DRIVERS = {"s3": "s3", "gs": "gcs"}
"""TensorStore's name for each kind of URL."""


def located(place: str | Path) -> Path:
    """A folder, or the place of an object store's URL (s3://BUCKET/…, gs://BUCKET/…), which is used like a `Path`.

    A URL that became a `Path` on its way here, and so lost a slash, is known again. Raises `UserError` if the package
    for such places is missing. Keys and the server are found as Amazon's and Google's own tools do, from
    AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL and so on.
    """
    match = re.match(r"(s3|gs):/+(.+)", str(place))
    if not match:
        return Path(place)
    try:
        from upath import UPath

        # Listings are not kept: what is written through Zarr would not be seen in them.
        path = UPath(f"{match[1]}://{match[2]}", use_listings_cache=False)
        assert path.fs
    except ImportError as error:
        raise UserError(f"{match[1]}://{match[2]}: {error.name} is missing; pip install 'spark-dist[cloud]'") from None
    return path


def is_local(path: Path) -> bool:
    """Whether a place is a folder of this machine's."""
    return isinstance(path, Path)


def resolved(path: Path) -> Path:
    """A folder's place from the root, without `..` and links: the only kind of path that TensorStore takes, and the
    one that names a folder the same way wherever a program is started. That of an object store is one already."""
    return path.resolve() if is_local(path) else path


def exists(path: Path) -> bool:
    """Whether there is something at a place. Raises `UserError` if an object store can't be reached."""
    if is_local(path):
        return path.exists()
    try:
        return path.exists()
    # Keys that are missing or wrong, no network: every package has exceptions of its own.
    except Exception as error:
        raise UserError(f"{path}: can't be reached ({first_line(error)}); check address, keys and network") from None


def zarr_place(path: Path) -> Path | FsspecStore:
    """A place, for zarr-python."""
    return path if is_local(path) else FsspecStore.from_url(str(path))


def kvstore(path: Path) -> dict[str, Any]:
    """A place, for TensorStore."""
    if is_local(path):
        return {"driver": "file", "path": str(resolved(path))}
    bucket, _, key = path.path.partition("/")
    place = {"driver": DRIVERS[path.protocol], "bucket": bucket, "path": f"{key}/"}
    if path.protocol == "s3":
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        place |= {"endpoint": endpoint} if (endpoint := os.environ.get("AWS_ENDPOINT_URL")) else {}
        place |= {"aws_region": region} if region else {}
    return place


def remove(path: Path) -> None:
    """Remove a folder with all that is in it, if it is there. Of a link, only the link: the rest is another's."""
    if is_local(path):
        if path.is_symlink():
            path.unlink()
        elif path.exists():
            shutil.rmtree(path)
    elif path.exists():
        path.fs.rm(path.path, recursive=True)


def open_array(path: Path, context: "tensorstore.Context | None" = None) -> "tensorstore.TensorStore":
    """An existing Zarr v3 array, unread. A chunk that is not there is an error, not zeros."""
    import tensorstore as ts

    spec = {"driver": "zarr3", "kvstore": kvstore(path), "fill_missing_data_reads": False}
    try:
        return ts.open(spec, open=True, read=True, context=context).result()
    except ValueError as error:
        raise UserError(f"{path}: can't be opened ({first_line(error)}); prepare this case again") from None


def finished(read: "tensorstore.Future", what: str) -> np.ndarray:
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
