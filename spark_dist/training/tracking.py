"""MLflow runs that can't hold up or end a job.

What a run logs is first appended to a journal in its folder, and a thread sends the journal to the tracking server. A
server that is slow, down or away costs a warning; what could not be sent stays in the journal for `sync`.

Whatever is sent twice, after a crash or a lost answer, counts once: the run is found by its journal's tag, and a
metric is the same one by its key, step and time, which are the journal's. So a server that does not know the run any
more, because its database was removed, is sent all of it again.
"""

import logging
import math
import os
import threading
import time
import traceback
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.errors import UserError

from .journal import append, description, mend_journal, read_journal, read_state
from .mlflow_client import absolute_uri, trouble
from .pictures import write_picture
from .runs_page import how_to_look
from .sender import Sender, sending
from .system_metrics import SystemMetrics

log = logging.getLogger(__name__)

POLL, LONGEST_PAUSE = 1, 30
"""Seconds between looks at the journal, and between attempts to reach a server that has been away for long."""
PATIENCE, PATIENCE_WITH_MODEL = 10, 180
"""Seconds that the end of a run waits for the server, and where a model is to be laid out and sent."""
SYSTEM_SECONDS = 10
"""Seconds between readings of the system metrics."""
SENDS = "sends to MLflow"
"""Name of the threads that do."""
IMAGES = "mlflow.loggedImages"
"""The tag of runs by which MLflow's pages know that there are series of pictures."""


class Tracker:
    """One MLflow run; its journal lies in `folder`."""

    def __init__(self, folder: Path, tracking_uri: str, below: bool):
        """`below`: whether it is a stage of a job that has a run itself."""
        self.folder, self.below = folder, below
        self.sender = Sender(folder, tracking_uri)
        self.logged = {
            (key, event["step"])
            for _, event in read_journal(folder)
            for key in (*event.get("metrics", ()), *([event["image"]] if "image" in event else []))
        }
        self.thread = threading.Thread(target=self._work, daemon=True, name=SENDS)
        self.ended = threading.Event()
        self.patience = PATIENCE

    @property
    def run_id(self) -> str | None:
        """The MLflow run's id, once the server has given one."""
        return self.sender.state["run_id"]

    @property
    def page(self) -> str:
        """Page of the run's experiment, and how to open it, once the server has it."""
        return how_to_look(self.sender.uri, self.sender.state)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Log values at a step. What a resumed run logs a second time is left out."""
        new = {key: float(value) for key, value in values.items() if (key, step) not in self.logged}
        self.logged |= {(key, step) for key in new}
        if new:
            append(self.folder, {"metrics": new, "step": step})

    def artifact(self, path: Path, folder: str = "") -> None:
        """Log a file. It is read when it is sent; one in the run's folder may move with the folder."""
        append(self.folder, {"artifact": self._place(path), "folder": folder})

    def image(self, key: str, picture: np.ndarray, step: int) -> None:
        """Log a picture (H, W, 3) uint8 RGB of a series at a step. What a resumed run logs again is left out."""
        if (key, step) in self.logged:
            return
        self.logged.add((key, step))
        files = [self._place(path) for path in write_picture(self.folder / "images", key, picture, step)]
        append(self.folder, {"image": key, "step": step, "files": files, "tags": {IMAGES: "True"}})

    def dataset(self, facts: Mapping[str, str]) -> None:
        """Log the dataset: its `name`, `digest`, `source` (a path or URL), `profile` (JSON) and `context`."""
        append(self.folder, {"dataset": dict(facts)})

    def model(self, path: Path, example: Path, register: str) -> None:
        """Log a saved network as a model with an example of its input (.npy), and register it by a name. Both files
        are read when they are sent."""
        self.patience = PATIENCE_WITH_MODEL
        append(self.folder, {"model": self._place(path), "example": self._place(example), "register": register})

    def _place(self, path: Path) -> str:
        """A file as the journal names it: from the run's folder, if it lies there."""
        path, here = Path(path).absolute(), self.folder.absolute()
        return str(path.relative_to(here) if path.is_relative_to(here) else path)

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags."""
        append(self.folder, {"tags": dict(values)})

    def finish(self, status: str, failure: str = "") -> None:
        """End the run as FINISHED, FAILED (and why) or KILLED, and wait a little until the server has all of it."""
        append(self.folder, {"status": status} | ({"tags": {"failure": failure}} if failure else {}))
        self._wait()

    def _wait(self) -> None:
        """Wait a little until the server has all of a run that has ended."""
        self.ended.set()
        self.thread.join(self.patience)
        if left := self.sender.left():
            later = f"spark-dist track-sync {self.folder} --tracking-uri {self.sender.uri}"
            log.warning(
                "tracking: %s has not taken %d entries; they are kept in %s%s",
                self.sender.uri,
                left,
                self.folder,
                "" if self.below else f", and {later} sends them",
            )

    def _work(self) -> None:
        """Send what comes, until the run has ended and all is sent or it is clear that the server is away."""
        pause, warned, sampled, machine = POLL, False, -math.inf, None
        while True:
            ending, hopeless = self.ended.is_set(), False
            try:
                # Once per job: the stages are processes of the same.
                if not ending and not self.below and time.monotonic() - sampled > SYSTEM_SECONDS:
                    sampled = time.monotonic()
                    with sending:
                        machine = machine or SystemMetrics()
                    append(self.folder, {"metrics": machine.read(), "step": None})
                sent = self.sender.send()
            except Exception as error:
                sent, hopeless = False, isinstance(error, UserError)
                if not warned:
                    why = str(error) if hopeless else f"{self.sender.uri} {trouble(error)}"
                    log.warning("tracking: %s; training goes on", why)
                    warned = True
            pause = POLL if sent else min(2 * pause, LONGEST_PAUSE)
            if ending and (sent or hopeless or pause > PATIENCE / 2):
                return
            if ending:
                time.sleep(pause)
            else:
                self.ended.wait(pause)


class _Nothing:
    """The stand-in for a tracker on processes that log nothing."""

    run_id, page = None, ""

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        pass

    def artifact(self, path: Path, folder: str = "") -> None:
        pass

    def image(self, key: str, picture: np.ndarray, step: int) -> None:
        pass

    def dataset(self, facts: Mapping[str, str]) -> None:
        pass

    def model(self, path: Path, example: Path, register: str) -> None:
        pass

    def tags(self, values: Mapping[str, str]) -> None:
        pass

    def finish(self, status: str, failure: str = "") -> None:
        pass


def null_tracker() -> _Nothing:
    """A tracker for processes other than the main one."""
    return _Nothing()


def open_run(
    tracking_uri: str,
    experiment: str,
    name: str,
    folder: Path,
    tags: Mapping[str, str],
    params: Mapping[str, Any],
    parent: Tracker | str | None = None,
) -> Tracker:
    """A run whose journal lies in `folder`; if there is one already, the same MLflow run goes on, with new `tags`.

    It stands below `parent`, if there is one: a run of the same job, or the name of a run that many jobs share.

    Its parameters are those of MLflow's runs. Returns at once: the run is created on the server in the background.
    """
    folder.mkdir(parents=True, exist_ok=True)
    mend_journal(folder)
    if description(folder):
        append(folder, {"resumed": True, "tags": dict(tags)})
    else:
        above = os.path.relpath(parent.folder.resolve(), folder.resolve()) if isinstance(parent, Tracker) else None
        shared = parent if isinstance(parent, str) else ""
        about = {"id": uuid.uuid4().hex, "experiment": experiment, "name": name, "parent": above, "shared": shared}
        append(folder, {**about, "tags": dict(tags), "params": dict(params)})
    tracker = Tracker(folder, absolute_uri(tracking_uri), isinstance(parent, Tracker))
    tracker.thread.start()
    return tracker


def send_rest(folder: Path, tracking_uri: str) -> None:
    """Send what a stage that has ended could not send, as far as the server takes it now."""
    tracker = Tracker(folder, absolute_uri(tracking_uri), below=True)
    tracker.ended.set()
    tracker.thread.start()
    tracker._wait()


def sync(folder: Path, tracking_uri: str) -> int:
    """Send what the runs of a job that has ended could not send: its own, then those of its stages.

    Returns how many events were sent. Raises `UserError` if there is no journal, the server can't be reached, or a
    journal can't be sent, which the others need not wait for.
    """
    folders = journals(folder)
    if not folders:
        raise UserError(f"{folder}: no journal of a run here; name the folder of a job")
    total, errors = 0, []
    for part in folders:
        sender = Sender(part, absolute_uri(tracking_uri))
        try:
            if not sender.send():
                errors.append(f"{part}: its run belongs below another one; sync the folder of the whole job")
        except UserError as error:
            errors.append(str(error))
        except Exception as error:
            left = f"{part} keeps {sender.left()} entries"
            raise UserError(f"{tracking_uri}: {trouble(error)}; {left}") from None
        total += sender.sent
    if errors:
        raise UserError(errors[0])
    return total


def journals(folder: Path) -> list[Path]:
    """The folders of all journals in a folder, a job's before those of its stages."""
    return [path.parent for path in sorted(folder.rglob("tracking.jsonl"), key=lambda path: (len(path.parts), path))]


def page_of(folder: Path, tracking_uri: str) -> str:
    """Page of the experiment of a folder's jobs, and how to open it; of the first, if there are several."""
    uri = absolute_uri(tracking_uri)
    return next(filter(None, (how_to_look(uri, read_state(part, uri)) for part in journals(folder))), "")


def failure_of(error: BaseException) -> str:
    """An error in a line; one of a loader's worker brings the worker's traceback along, and ends with its own line."""
    lines = "".join(traceback.format_exception_only(error)).strip().splitlines()
    return lines[-1].removeprefix(f"{UserError.__module__}.{UserError.__qualname__}: ")
