"""Folders that are made aside and renamed, so that there is never half of one; and what a kill leaves of them."""

import glob
import hashlib
import os
import re
import shutil
import time
import uuid
from pathlib import Path

from .identity import strangers
from .location import is_local
from .ownership import owned, remove_owned
from .workers import machine, started

FORGOTTEN = 3600
"""Seconds after which the folder of another machine's process is taken for one that a kill left: it is made within a
second."""


def aside(path: Path) -> Path:
    """A new folder for this process to make, and then to rename to `path`."""
    return path.with_name(f".{path.name}.{_maker(os.getpid())}-{uuid.uuid4().hex[:8]}.new")


def remove_left(path: Path) -> None:
    """Remove folders that processes made to become the store at `path`, and were killed."""
    for folder in path.parent.glob(f".{glob.escape(path.name)}.*.new") if is_local(path) else ():
        if _is_made(folder):
            continue
        if owned(folder, "store"):
            remove_owned(folder, "store")
        elif not any(strangers(folder)):
            shutil.rmtree(folder, ignore_errors=True)


def _maker(pid: int) -> str:
    return f"{hashlib.sha256(machine().encode()).hexdigest()[:8]}-{pid}-{started(pid)}"


def _is_made(folder: Path) -> bool:
    """Whether a process may still be at it."""
    found = re.search(r"\.((\w+)-(\d+)-\w+)-\w+\.new$", folder.name)
    if found and _maker(0).startswith(found[2]):
        return found[1] == _maker(int(found[3]))
    try:
        return time.time() - folder.stat().st_mtime < FORGOTTEN
    except FileNotFoundError:
        return True
