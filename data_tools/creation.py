"""How an empty store is made: aside, and then renamed, so that there is never half of one.

What a kill leaves aside is removed by the next who makes a store of that name.
"""

import glob
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .errors import UserError
from .identity import new_identity, strangers
from .labels import in_order
from .location import exists, is_local, located
from .ownership import owned, remove_owned
from .sealed import read_sealed, seal
from .store import FORMAT, VERSION, root_attributes
from .workers import is_abandoned, signature


def create_store(path: Path, attributes: Mapping[str, Any]) -> None:
    """Make an empty store, or check that the one at `path` was made with the same attributes.

    Raises `UserError` if something else is at `path`, or a store with other labels, window or layout.
    """
    path = located(path)
    path = path.resolve() if is_local(path) else path
    remove_left(path)
    if check_store(path, attributes):
        return
    wanted = _root_facts(attributes)
    wanted["identity"] = new_identity(path, wanted)
    if not is_local(path):
        _write_root(path, wanted)
        return
    # Made beside and renamed: a run that is killed here leaves no half store, and of two at a time one is first.
    new = aside(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        _write_root(new, wanted)
        new.rename(path)
    except OSError:
        if not (path / "zarr.json").exists():
            raise
        create_store(path, attributes)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def check_store(path: Path, attributes: Mapping[str, Any]) -> bool:
    """Whether there is a store at `path`; nothing is written.

    Raises `UserError` if something else is there, or a store with other labels, window or layout.
    """
    path = located(path)
    wanted = _root_facts(attributes)
    if exists(path / "zarr.json"):
        found = root_attributes(path)
        # Labels in order, which is that of their stored values.
        before = found | {"labels": in_order(found.get("labels", {}))}
        if differing := [k for k in (*wanted, "regions") if json.dumps(before.get(k)) != json.dumps(wanted.get(k))]:
            key = differing[0]
            raise UserError(
                f"{path}: this store was made with {key}={found.get(key)!r}, not {wanted.get(key)!r}; "
                "prepare into another folder, or give the same options"
            )
        read_sealed(path)
        return True
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        if exists(path / "zarr.json"):  # another process's store came there between the two looks
            return check_store(path, attributes)
        raise UserError(f"{path}: exists and is no slice store; name an empty or new folder")
    return False


def _root_facts(attributes: Mapping[str, Any]) -> dict[str, Any]:
    facts = {"labels": {}} | json.loads(json.dumps(dict(attributes)))
    return {"format": FORMAT, "version": VERSION, **facts, "labels": in_order(facts["labels"])}


def _write_root(path: Path, attributes: Mapping[str, Any]) -> None:
    groups = (path, path / "cases", path / "splits")
    # In a bucket the root comes last and makes the store visible; what is made aside is marked as ours from the start.
    for group in groups if is_local(path) else reversed(groups):
        seal(group, attributes)


def aside(path: Path) -> Path:
    """A new folder for this process to make, and then to rename to `path`."""
    return path.with_name(f".{path.name}.{signature(os.getpid())}-{uuid.uuid4().hex[:8]}.new")


def remove_left(path: Path) -> None:
    """Remove folders that processes made to become the store at `path`, and were killed."""
    for folder in left_behind(path) if is_local(path) else ():
        if owned(folder, "store"):
            remove_owned(folder, "store")
        elif not any(strangers(folder)):
            shutil.rmtree(folder, ignore_errors=True)


def left_behind(path: Path) -> Iterator[Path]:
    """The folders made `aside` to become `path` that no living process is at any more."""
    return filter(is_abandoned, path.parent.glob(f".{glob.escape(path.name)}.*.new"))
