"""A run's journal: what it logs, an event a line, and how much of that has been sent.

FOLDER/tracking.jsonl    the run's description, then metrics, artifacts, and how it ended
FOLDER/tracking.json     the server, the MLflow run's id there, and how many bytes of the journal it has
"""

import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import NoneType
from typing import Any

Event = dict[str, Any]

TYPES = {
    "time": int,
    "id": str,
    "experiment": str,
    "name": str,
    "parent": (str, NoneType),
    "shared": str,
    "tags": dict,
    "params": dict,
    "metrics": dict,
    "step": (int, NoneType),
    "artifact": str,
    "folder": str,
    "image": str,
    "files": list,
    "dataset": dict,
    "model": str,
    "example": str,
    "register": str,
    "status": str,
}
NEEDS = {
    "id": {"time", "experiment", "name", "parent"},
    "metrics": {"time", "step"},
    "artifact": {"folder"},
    "image": {"step", "files"},
}
NEEDS |= {"model": {"example", "register"}}
"""Entries that an event must have beside another."""


def append(folder: Path, event: Mapping[str, Any]) -> None:
    """Add an event with its time in ms to a journal."""
    with open(folder / "tracking.jsonl", "a") as file:
        file.write(json.dumps({"time": int(time.time() * 1000), **event}, default=str) + "\n")


def read_journal(folder: Path, start: int = 0) -> Iterator[tuple[int, Event]]:
    """The events of a journal from byte `start` on, each with the position behind it; half a line does not count."""
    file = folder / "tracking.jsonl"
    if not file.exists():
        return
    with open(file, "rb") as lines:
        lines.seek(start)
        for line in lines:
            if not line.endswith(b"\n"):
                return
            start += len(line)
            try:
                event = json.loads(line)
            except ValueError:  # a machine that lost power may leave zeros
                event = {}
            yield start, event if is_event(event) else {}


def is_event(value: Any) -> bool:
    """Whether this can be one that a tracker wrote."""
    return (
        isinstance(value, dict)
        and all(isinstance(value[key], kind) for key, kind in TYPES.items() if key in value)
        and all(needed <= value.keys() for key, needed in NEEDS.items() if key in value)
        and all(isinstance(number, (int, float)) for number in value.get("metrics", {}).values())
        and value.get("status", "FINISHED") in ("FINISHED", "FAILED", "KILLED")
        and value.get("id", "0").isalnum()
    )


def description(folder: Path) -> Event | None:
    """The event of a journal that says whose run it is: the first one, unless that is damaged."""
    return next((event for _, event in read_journal(folder) if "id" in event), None)


def finished(folder: Path) -> bool:
    """Whether the run of a journal has ended as it should, and did not go on since."""
    ends = [event.get("status") for _, event in read_journal(folder) if "status" in event or "resumed" in event]
    return ends[-1:] == ["FINISHED"]


def read_state(folder: Path, uri: str) -> dict[str, Any]:
    """State of a journal's sending, as a sender noted it; from its start, if this can't be known."""
    file = folder / "tracking.json"
    start = {"uri": uri, "run_id": None, "experiment_id": None, "sent": 0}
    try:
        found = json.loads(file.read_bytes()) if file.exists() else start
    except ValueError:
        return start
    # Another server knows nothing of this run, and is told all of it.
    if not isinstance(found, dict) or found.get("uri") != uri or not isinstance(found.get("run_id"), str):
        return start
    return start | found if ends_line(folder / "tracking.jsonl", found.get("sent")) else start


def ends_line(file: Path, position: Any) -> bool:
    """Whether a line of this file ends just before this position."""
    if not isinstance(position, int) or not file.exists() or not 0 <= position <= file.stat().st_size:
        return False
    with open(file, "rb") as lines:
        lines.seek(max(position - 1, 0))
        return position == 0 or lines.read(1) == b"\n"


def mend_journal(folder: Path) -> None:
    """Remove the half line that a killed process may have left, so that the next event gets a line of its own."""
    file = folder / "tracking.jsonl"
    if file.exists():
        os.truncate(file, max((position for position, _ in read_journal(folder)), default=0))
