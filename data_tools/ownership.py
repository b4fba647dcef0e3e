"""Whose a folder or a file is: nothing is removed or written over that does not bear this program's own mark.

A name or a shape is no mark: anybody's folder can be called `cache`, or have a `segments` in it. The marks are

    store    zarr.json, whose attributes have the format of a slice store (`creation.create_store` writes them)
    cache    description.json, whose facts hash to the folder's own name (see `fingerprint`)
    job      job.json
    case     zarr.json, whose attributes have the case's name, its folder's, and the identity of its store
    prediction  zarr.json, whose attributes have the format of a prepared prediction
    file     the words `MADE_BY` near its start: a comment, a field of its header
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .errors import UserError
from .files import write_text
from .location import is_local, remove


class Mark(NamedTuple):
    """Where a kind of folder bears its mark."""

    file: str
    format: str
    """The file's entry under `format`."""


MARKS = {
    "store": Mark("zarr.json", "spark-dist slice store"),
    "cache": Mark("description.json", "spark-dist teacher cache"),
    "job": Mark("job.json", "spark-dist job"),
    "case": Mark("zarr.json", ""),
    "prediction": Mark("zarr.json", "spark-dist prediction"),
}
MADE_BY = "made by spark-dist"
"""The words near the start of a file that may be written over."""
NEAR = 4096
"""Bytes from a file's start in which `MADE_BY` counts."""


def fingerprint(facts: Mapping[str, Any]) -> str:
    """A hash of facts, 16 hexadecimal digits: the name of the cache that they describe."""
    return hashlib.sha256(json.dumps(dict(facts), sort_keys=True, default=str).encode()).hexdigest()[:16]


def mark(folder: Path, kind: str, **facts: Any) -> None:
    """Mark a folder as a `cache` or a `job` of ours, whole or not at all, and make it if it is not there.

    `facts` are what JSON can hold; those of a cache hash to its folder's name. Facts from before are replaced.
    """
    if kind == "cache" and fingerprint(facts) != folder.name:
        raise ValueError(f"{folder}: not the name of a cache with these facts, {fingerprint(facts)}")
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"format": MARKS[kind].format, **facts}, indent=1, default=str)
    write_text(folder / MARKS[kind].file, text)


def owned(folder: Path, kind: str) -> dict[str, Any] | None:
    """The facts of a folder that bears our mark of this kind; None if it does not."""
    try:
        facts = json.loads((folder / MARKS[kind].file).read_text())
    except (OSError, ValueError, RecursionError):
        return None
    if kind in ("store", "case", "prediction") and isinstance(facts, dict):
        facts = facts.get("attributes")
    if not isinstance(facts, dict):
        return None
    if kind == "case":
        return facts if facts.get("case") == folder.name and isinstance(facts.get("store"), str) else None
    if kind == "cache":
        # Descriptions of caches made before had neither format nor version, and their hash is as good a mark.
        facts = {"format": MARKS[kind].format, "version": 2, **facts}
        if fingerprint({key: value for key, value in facts.items() if key != "format"}) != folder.name:
            return None
    return facts if facts.get("format") == MARKS[kind].format else None


def check_owned(folder: Path, kind: str) -> dict[str, Any]:
    """The facts of a folder of ours. Raises `UserError` for any other."""
    facts = owned(folder, kind)
    if facts is None:
        raise UserError(f"{folder}: is no {kind} of spark-dist, so nothing of it is removed or written over")
    return facts


def remove_owned(folder: Path, kind: str, patterns: Sequence[str] | None = None) -> None:
    """Remove a folder of ours with all that is in it, or only the files in it that match one of `patterns`.

    The mark goes last, so that what a kill interrupts can be removed later. What lies behind a link stays. Raises
    `UserError`, and removes nothing, if the folder does not bear our mark or is a link itself.
    """
    check_owned(folder, kind)
    if not is_local(folder):
        if patterns is not None:
            raise ValueError(f"{folder}: patterns are for folders of this machine")
        remove(folder)
        return
    own = folder.resolve()
    if patterns is None:
        if folder.is_symlink():
            raise UserError(f"{folder}: is a link to {own}; remove the link, or what it leads to, by hand")
        found = list(folder.iterdir())
    else:
        matches = {path for pattern in patterns for path in folder.glob(pattern)}
        found = [path for path in sorted(matches) if path.parent.resolve().is_relative_to(own)]
    for path in sorted(found, key=lambda path: path.name == MARKS[kind].file):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, onerror=_unless_gone)
        else:
            path.unlink(missing_ok=True)
    if patterns is None:
        folder.rmdir()


def _unless_gone(function: Callable, path: str, error: tuple) -> None:
    """Two may remove one folder at a time."""
    if not isinstance(error[1], FileNotFoundError):
        raise error[1]


def check_free(folder: Path, kind: str) -> None:
    """Raise `UserError` unless a folder is of ours already, or empty, or not there."""
    if folder.exists() and owned(folder, kind) is None and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: holds something that is no {kind} of spark-dist; name an empty or new folder")


def made_here(file: Path) -> bool:
    """Whether a file says that this program made it."""
    try:
        with open(file, "rb") as opened:
            found = opened.read(NEAR)
            if found.startswith(b"%PDF"):  # which has such fields at its end
                opened.seek(max(opened.seek(0, os.SEEK_END) - NEAR, 0))
                found = opened.read(NEAR)
            return MADE_BY.encode() in found
    except OSError:
        return False


def check_output(file: Path, option: str = "--out") -> None:
    """Raise `UserError` if there is a file that this program did not make, and would write over.

    `option` is the command's that names the file.
    """
    if (file.exists() or file.is_symlink()) and not made_here(file):
        raise UserError(f"{file}: exists and was not made by spark-dist; move it away, or name another {option}")
