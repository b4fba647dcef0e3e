"""The way of a journal's events to an MLflow server."""

import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_tools.errors import UserError
from data_tools.files import write_text

from .journal import Event, description, read_journal, read_state
from .mlflow_client import brief, create_run, deliver, known_run, make_client, refused
from .runs_page import show_results

log = logging.getLogger(__name__)

BATCH = 500
"""Metrics in a request (MLflow takes 1000)."""

KINDS = ("metrics", "artifact", "image", "dataset", "model", "params", "tags")
"""Entries by which an event is named when a server refuses it."""
sending = threading.Lock()
"""Runs of one process send one after another, so that the first imports MLflow and makes the tables and experiment."""


class Sender:
    """Sends a journal's events to an MLflow server, from where the last one stopped."""

    def __init__(self, folder: Path, uri: str):
        self.folder, self.uri = folder, uri
        self.client = None
        self.sent = 0
        """How many events this one has sent."""
        self.warned: set[str] = set()
        self.state = read_state(folder, uri)

    def left(self) -> int:
        """Number of events that are not sent."""
        return sum(1 for _ in read_journal(self.folder, self.state["sent"]))

    def send(self) -> bool:
        """Send what is new in the journal. Raises whatever the client raises.

        Returns False if there is something left, because the server does not know the run's parent yet.
        """
        if self.client and (self.folder / "tracking.jsonl").stat().st_size == self.state["sent"]:
            return True
        with sending:
            try:
                return self._send()
            except Exception:
                self.client = None  # so that the next attempt looks whether the server still knows the run
                raise

    def _send(self) -> bool:
        if self.client is None:
            client = make_client(self.uri)
            if not self._find_run(client):
                return False
            show_results(client, self.state["experiment_id"])
            self.client = client
        for batch in batches(read_journal(self.folder, self.state["sent"])):
            self._deliver([event for _, event in batch])
            self._save(sent=batch[-1][0])
            self.sent += len(batch)
        return True

    def _find_run(self, client) -> bool:
        """Make the run, and begin at the journal's start, unless the server knows it; False without its parent."""
        about = description(self.folder)
        if about is None:
            raise UserError(
                f"{self.folder / 'tracking.jsonl'}: the line that describes the run is damaged; start the job again, "
                "which writes another, or remove the file"
            )
        if run := known_run(client, self.folder, self.state["run_id"]):
            self._save(experiment_id=run.info.experiment_id)
            return True
        parent = None
        if about["parent"]:
            above = self.folder / about["parent"]
            parent = read_state(above, self.uri)["run_id"]
            if not known_run(client, above, parent):
                return False
        run = create_run(client, self.uri, about, parent)
        self._save(run_id=run.info.run_id, experiment_id=run.info.experiment_id, sent=0)
        return True

    def _deliver(self, events: list[Event]) -> None:
        """Send events; what the server refuses for good is left out, so that what is behind it need not wait."""
        if not all(events):
            self._warn(f"{self.folder / 'tracking.jsonl'} has damaged lines, which are left out")
        try:
            deliver(self.client, self.state["run_id"], self.folder, events)
        except Exception as error:
            # If the run itself is gone, it is not the entry's fault.
            if not refused(error) or not known_run(self.client, self.folder, self.state["run_id"]):
                raise
            if len(events) > 1:
                for event in events:
                    self._deliver([event])
            else:
                what = f"{self.uri} refuses {named(events[0])} of {self.folder}, which stays in the journal"
                self._warn(what, f" ({brief(error)})")

    def _warn(self, what: str, why: str = "") -> None:
        """A warning, once."""
        if what not in self.warned:
            log.warning("tracking: %s%s", what, why)
            self.warned.add(what)

    def _save(self, **changes: Any) -> None:
        self.state |= changes
        write_text(self.folder / "tracking.json", json.dumps(self.state))


def batches(events: Iterator[tuple[int, Event]]) -> Iterator[list[tuple[int, Event]]]:
    """Neighbouring metrics together, as many as one request may hold; everything else alone."""
    batch: list[tuple[int, Event]] = []
    size = 0
    for position, event in events:
        count = len(event.get("metrics", ()))
        if batch and (not count or size + count > BATCH):
            yield batch
            batch, size = [], 0
        batch.append((position, event))
        size += count
        if not count:
            yield batch
            batch = []
    if batch:
        yield batch


def named(event: Event) -> str:
    """An event in a few words, for people."""
    kind = next((key for key in KINDS if key in event), "end")
    value = event.get(kind, "of the run")
    return f"{kind} {', '.join(value) if isinstance(value, dict) else value}"[:100]
