"""Metadata of a store's groups, with a checksum, so that no byte of them can change unseen."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import zarr

from .errors import UserError
from .files import write_text
from .location import is_local

BEGUN = {"store", "case"}
"""The attributes of a case that is being written (see `identity`)."""


def seal(folder: Path, attributes: Mapping[str, Any]) -> None:
    """Give the group at `folder` other attributes, whole or not at all."""
    facts = json.loads(json.dumps(dict(attributes)))
    write_group(folder, facts | {"checksum": _checksum(group_document(facts), folder)})


def group_document(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata of a Zarr v3 group."""
    return {"attributes": dict(attributes), "zarr_format": 3, "node_type": "group"}


def write_group(folder: Path, attributes: Mapping[str, Any]) -> None:
    """The metadata of the group at `folder` as they are, without a checksum; whole or not at all."""
    text = json.dumps(group_document(attributes), indent=2)
    if is_local(folder):
        write_text(folder / "zarr.json", text)
    else:
        (folder / "zarr.json").write_text(text)


def write_sealed(group: zarr.Group, folder: Path, attributes: Mapping[str, Any]) -> None:
    """The attributes of a group at `folder`, with the checksum over all metadata."""
    facts = json.loads(json.dumps(dict(attributes)))
    document = read_json(folder / "zarr.json") | {"attributes": facts}
    group.update_attributes({**facts, "checksum": _checksum(document, folder)})


def _checksum(document: Mapping[str, Any], folder: Path) -> str:
    """A hash of a group's metadata without its own checksum, and that of the arrays in it."""
    facts = {key: value for key, value in document["attributes"].items() if key != "checksum"}
    files = [folder / key / "zarr.json" for key in ("image", "label")]
    members = [read_json(file) for file in files if file.exists()]
    # A case or a split may have such a name, and is no part of the group around it.
    arrays = [member for member in members if not isinstance(member, dict) or member.get("node_type") != "group"]
    whole = json.dumps([{**document, "attributes": facts}, *arrays], sort_keys=True)
    return hashlib.sha256(whole.encode()).hexdigest()


def read_sealed(folder: Path) -> dict[str, Any]:
    """The attributes of the group at `folder`; {} if they are not written yet. Raises `UserError` if it is damaged."""
    document = read_json(folder / "zarr.json")
    facts = document.get("attributes") if isinstance(document, dict) else None
    if facts == {} or (isinstance(facts, dict) and facts.keys() == BEGUN):
        return {}
    if not isinstance(facts, dict) or facts.pop("checksum", None) != _checksum(document, folder):
        raise damaged(folder / "zarr.json", "not what was written")
    return facts


def is_sealed(folder: Path) -> bool:
    """Whether the group at `folder` has its attributes, and they are sound."""
    try:
        return bool(read_sealed(folder))
    except UserError:
        return False


def read_json(file: Path) -> Any:
    """The content of a JSON file. Raises `UserError` if it can't be read."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise damaged(file, f"can't be read ({error})") from None


def damaged(file: Path, reason: str) -> UserError:
    """An error for a file of a store that is not as it was written."""
    return UserError(f"{file}: {reason}; find all damage with spark-data verify, or prepare this case again")
