"""Identity of stores and their cases, so that one that was copied, renamed or removed by hand is found.

A store has an identity among its attributes. Each case's attributes repeat it, as `store`, beside the case's own
name, as `case`: from the moment in which its folder is made, so that it is the store's even while it is incomplete. The
empty file STORE/known/<case> says that the case was complete, so that its folder does not vanish unseen.

Stores that were made before have none of this, until `adopt` gives it to them.
"""

import re
import uuid
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from .errors import Conflict, UserError
from .files import is_unfinished
from .location import is_local, remove
from .ownership import fingerprint, owned
from .sealed import is_sealed, read_sealed, seal, write_group

PARTS_OF_A_CASE = ("zarr.json", "image", "label")


def new_identity(path: Path, facts: Mapping[str, Any]) -> str:
    """A random identity for a store. In a bucket, where two can make one store at a time, it follows from the place."""
    return uuid.uuid4().hex if is_local(path) else fingerprint({"place": str(path), **facts})


def attributes_of(path: Path) -> dict[str, Any]:
    """The attributes of the store at `path`, from the first sound copy of them; {} if there is none."""
    for folder in (path, path / "cases", path / "splits"):
        try:
            return read_sealed(folder)
        except UserError:
            continue
    return {}


def identity_of(path: Path) -> str | None:
    """The identity of the store at `path`; None if it has none."""
    return attributes_of(path).get("identity")


def mark_of(identity: str | None, name: str) -> dict[str, str]:
    """Attributes that mark a case as its store's from the start."""
    return {"store": identity, "case": name} if identity else {}


def check_belongs(folder: Path, facts: Mapping[str, Any], identity: str | None) -> None:
    """Raise `Conflict` if the attributes of the case at `folder` are those of another store's, or another case's.

    Attributes of an earlier version say neither, and pass.
    """
    if facts.get("case", folder.name) != folder.name:
        raise Conflict(
            f"{folder}: holds case {facts['case']}, so that the folder was renamed or copied; give it back its name, "
            "or remove it"
        )
    if identity and facts.get("store", identity) != identity:
        raise Conflict(
            f"{folder}: is a case of another store, copied here; remove it, and prepare the case from its files"
        )


def known_cases(path: Path) -> list[str]:
    """The names of cases that were complete."""
    return sorted(file.name for file in (path / "known").glob("*"))


def is_known(path: Path, name: str) -> bool:
    """Whether a case was complete."""
    return (path / "known" / name).exists()


def set_known(path: Path, name: str) -> None:
    """Say that a case is complete, in a store with an identity."""
    if not is_known(path, name):
        if is_local(path):
            (path / "known").mkdir(exist_ok=True)
        (path / "known" / name).write_bytes(b"")


def gone(path: Path, name: str) -> str:
    """An error's text for a case whose folder was removed, with what to do."""
    return (
        f"{path / 'cases' / name}: the case's folder is gone; put it back, or prepare the case again, or remove "
        f"{path / 'known' / name} too if it shall be gone for good"
    )


def owns(path: Path, name: str) -> bool:
    """Whether the folder of a case is the store's to remove: by the mark in it, or, where that is damaged, as the store
    knows the case. An empty folder is anybody's."""
    folder, identity = path / "cases" / name, identity_of(path)
    if not folder.exists() or (folder.is_dir() and not any(strangers(folder))):
        return True
    try:
        facts = read_sealed(folder) or owned(folder, "case")
    except UserError:
        facts = owned(folder, "case")
    if facts:
        return facts.get("store", identity) == identity and facts.get("case", name) == name
    return identity is None or is_known(path, name)


def strangers(folder: Path, ours: Collection[str] = ()) -> Iterator[str]:
    """Names in a folder beside those that are `ours`, parts of files that a kill leaves, and systems' own files."""
    for path in folder.iterdir() if folder.is_dir() else ():
        part = is_unfinished(path.name) or re.search(r"\.[0-9a-f]{32}\.partial$", path.name)  # Zarr's own
        if path.name not in ours and not part and not path.name.startswith((".DS_Store", ".nfs")):
            yield path.name


def begin(folder: Path, identity: str | None) -> None:
    """Mark the folder of a case as the store's, and as incomplete."""
    write_group(folder, mark_of(identity, folder.name))


def remove_folder(path: Path, name: str) -> None:
    """Remove the folder of a case, whoever made it, and that it is known; of a link, only the link.

    It is marked as the store's, and incomplete, until nothing else is left of it: so that what a kill interrupts here
    can be removed later. Raises `UserError` if there is something in it that is no part of a case.
    """
    folder = path / "cases" / name
    link = is_local(folder) and folder.is_symlink()
    if not link and (other := next(strangers(folder, PARTS_OF_A_CASE), None)):
        raise UserError(f"{folder}: holds {other}, which is no part of a case; move it away")
    (path / "known" / name).unlink(missing_ok=True)
    if link:
        folder.unlink()
    if not folder.exists():
        return
    begin(folder, identity_of(path))
    for kind in ("image", "label"):
        remove(folder / kind)
    (folder / "zarr.json").unlink()
    remove(folder)


def adopt(path: Path) -> None:
    """Give a store that was made by an earlier version an identity, and the mark of it to all its cases: there is
    nothing to tell whose else they could be.

    One process at a time may do so. What a kill interrupts goes on with the same identity.
    """
    facts = read_sealed(path)
    if "identity" in facts:
        return
    copies = [path / "cases", path / "splits"]
    found = [read_sealed(folder).get("identity") for folder in copies if is_sealed(folder)]
    facts |= {"identity": next(filter(None, found), None) or new_identity(path, facts)}
    for folder in copies:
        seal(folder, facts)
    for folder in sorted(path.glob("cases/*")):
        if not folder.is_dir() or any(strangers(folder, PARTS_OF_A_CASE)):
            continue
        try:
            complete = bool(read_sealed(folder))
        except UserError:
            set_known(path, folder.name)  # damaged
            continue
        if complete:
            stamp(path, folder.name, facts["identity"])
        else:
            begin(folder, facts["identity"])
    seal(path, facts)


def stamp(path: Path, name: str, identity: str | None) -> None:
    """Mark a complete case as the store's, if an earlier version wrote it, and as known."""
    if identity is None:
        return
    folder = path / "cases" / name
    facts = read_sealed(folder)
    if "store" not in facts:
        seal(folder, mark_of(identity, name) | facts)
    set_known(path, name)
