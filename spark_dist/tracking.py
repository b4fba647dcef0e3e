"""MLflow runs that can't hold up or end a job.

What a run logs is first appended to a journal in its folder, and a thread sends the journal to the tracking server. A
server that is slow, down or away costs a warning; what could not be sent stays in the journal for `sync`.

    FOLDER/tracking.jsonl    one event a line: the run's description, then metrics, artifacts, and how it ended
    FOLDER/tracking.json     the MLflow run's id, and how many lines of the journal it has
"""

import fcntl
import json
import logging
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch

from data_tools.errors import UserError

from .checkpoint import write_text

log = logging.getLogger(__name__)

PATIENCE = 10
"""Seconds that the end of a run waits for the server."""
SYSTEM_SECONDS = 10
"""Seconds between readings of the system metrics."""

SQLITE = "sqlite:///"

_sending = threading.Lock()
"""Runs of one process share the client, and a new SQLite file must be made by one of them."""


class Tracker:
    """One MLflow run; its journal lies in `folder`."""

    def __init__(self, folder: Path, tracking_uri: str):
        self.folder = folder
        self.tracking_uri = tracking_uri
        self.sender = Sender(folder, tracking_uri)
        self.logged = {
            (key, event["step"])
            for event in read_journal(folder)
            for key in event.get("metrics", ())
            if "step" in event
        }
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.ended = threading.Event()

    @property
    def run_id(self) -> str | None:
        """The MLflow run's id, once the server has given one."""
        return self.sender.state["run_id"]

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Log values at a step. What a resumed run logs a second time is left out."""
        new = {key: float(value) for key, value in values.items() if (key, step) not in self.logged}
        self.logged |= {(key, step) for key in new}
        if new:
            self.event({"metrics": new, "step": step})

    def artifact(self, path: Path, folder: str = "") -> None:
        """Log a file."""
        self.event({"artifact": str(Path(path).absolute()), "folder": folder})

    def event(self, event: Mapping[str, Any]) -> None:
        """Append a line to the journal."""
        append(self.folder, event)

    def finish(self, status: str) -> None:
        """End the run as FINISHED, FAILED or KILLED, and wait a little until the server has all of it."""
        self.event({"status": status})
        self.ended.set()
        self.thread.join(PATIENCE)
        if left := self.sender.left():
            log.warning(
                "tracking: %s has not taken %d entries; they are kept in %s", self.tracking_uri, left, self.folder
            )

    def _work(self) -> None:
        pause, warned, sampled = 0.2, False, 0.0
        while True:
            ending = self.ended.is_set()
            if not ending and time.monotonic() - sampled > SYSTEM_SECONDS:
                sampled = time.monotonic()
                self.event({"metrics": system_metrics(), "step": None})
            try:
                self.sender.send()
                pause = 0.2
            except Exception as error:
                if not warned:
                    reason = " ".join(str(error).split())[:200]
                    log.warning("tracking: %s can't be reached, training goes on (%s)", self.tracking_uri, reason)
                    warned = True
                pause = min(2 * pause, 30)
            if ending and (not self.sender.left() or pause > PATIENCE / 2):
                return
            self.ended.wait(pause) if not ending else time.sleep(pause)


class Sender:
    """Sends a journal's lines to MLflow, each once, from where the last one stopped."""

    def __init__(self, folder: Path, tracking_uri: str):
        self.folder, self.tracking_uri = folder, tracking_uri
        file = folder / "tracking.json"
        self.state = json.loads(file.read_text()) if file.exists() else {"run_id": None, "sent": 0}
        self.client = None

    def left(self) -> int:
        """How many lines are not sent."""
        return len(read_journal(self.folder)) - self.state["sent"]

    def send(self) -> None:
        """Send what is in the journal. Raises whatever the client raises."""
        events = read_journal(self.folder)
        if len(events) == self.state["sent"]:
            return
        with _sending:
            self.client = self.client or make_client(self.tracking_uri)
            if self.state["run_id"] is None:
                self._save(run_id=create_run(self.client, events[0], self.tracking_uri))
            waiting: list[dict[str, Any]] = []
            for position, event in enumerate(events[self.state["sent"] :], start=self.state["sent"]):
                if "metrics" in event:
                    waiting.append(event)
                last = position + 1 == len(events)
                if waiting and (last or "metrics" not in event or len(waiting) == 100):
                    self.client.log_batch(self.state["run_id"], metrics=mlflow_metrics(waiting))
                    waiting = []
                if "artifact" in event and Path(event["artifact"]).exists():
                    self.client.log_artifact(self.state["run_id"], event["artifact"], event["folder"] or None)
                if "status" in event:
                    self.client.set_terminated(self.state["run_id"], event["status"])
                if "resumed" in event:
                    self.client.update_run(self.state["run_id"], status="RUNNING")
                if not waiting:
                    self._save(sent=position + 1)

    def _save(self, **changes: Any) -> None:
        self.state |= changes
        write_text(self.folder / "tracking.json", json.dumps(self.state))


class _Nothing:
    """The stand-in for a tracker on processes that log nothing."""

    run_id = None

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        pass

    def artifact(self, path: Path, folder: str = "") -> None:
        pass

    def finish(self, status: str) -> None:
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
    parent: Tracker | None = None,
) -> Tracker:
    """A run whose journal lies in `folder`; if there is one already, the same MLflow run goes on.

    Returns at once: the run is created on the server in the background.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if read_journal(folder):
        append(folder, {"resumed": True})
    else:
        about = {"experiment": experiment, "name": name, "tags": dict(tags), "params": dict(params)}
        append(folder, {**about, "parent": str(parent.folder.absolute()) if parent else None})
    tracker = Tracker(folder, absolute_uri(tracking_uri))
    tracker.thread.start()
    return tracker


def sync(folder: Path, tracking_uri: str) -> int:
    """Send what a job's runs could not send: its own first, then those of its stages. Returns how many lines."""
    folders = [path.parent for path in sorted(folder.rglob("tracking.jsonl"), key=lambda p: len(p.parts))]
    if not folders:
        raise UserError(f"{folder}: no journal of a run here; name the folder of a job")
    total = 0
    for part in folders:
        sender = Sender(part, absolute_uri(tracking_uri))
        total += sender.left()
        sender.send()
    return total


def absolute_uri(uri: str) -> str:
    """A relative SQLite path made absolute, so that threads and children agree."""
    return f"{SQLITE}{Path(uri.removeprefix(SQLITE)).absolute()}" if uri.startswith(SQLITE) else uri


def append(folder: Path, event: Mapping[str, Any]) -> None:
    """Add an event with its time in ms to a journal."""
    with open(folder / "tracking.jsonl", "a") as file:
        file.write(json.dumps({"time": int(time.time() * 1000), **event}, default=str) + "\n")


def read_journal(folder: Path) -> list[dict[str, Any]]:
    """The whole lines of a journal; a killed process may have left half a line, which does not count."""
    file = folder / "tracking.jsonl"
    if not file.exists():
        return []
    events = []
    for line in file.read_text().splitlines(keepends=True):
        if line.endswith("\n"):
            try:
                events.append(json.loads(line))
            except json.JSONDecodeError:
                events.append({})
    return events


def make_client(tracking_uri: str):
    """An MLflow client that gives up soon on a server that does not answer."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    # Imported here: it takes seconds, and only the thread waits.
    from mlflow import MlflowClient

    for name in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if not tracking_uri.startswith(SQLITE):
        return MlflowClient(tracking_uri)
    # Two jobs that make the tables of a new file at the same time leave it broken for good.
    file = Path(tracking_uri.removeprefix(SQLITE))
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file.with_name(f"{file.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        client = MlflowClient(tracking_uri)
        client.search_experiments(max_results=1)
    return client


def create_run(client, about: Mapping[str, Any], tracking_uri: str) -> str:
    """Create the run that a journal begins with, in its experiment, below its parent."""
    from mlflow.entities import Param
    from mlflow.utils.validation import MAX_PARAM_VAL_LENGTH

    tags = {**about["tags"], "mlflow.runName": about["name"]}
    if about["parent"]:
        parent = json.loads((Path(about["parent"]) / "tracking.json").read_text())["run_id"]
        tags["mlflow.parentRunId"] = parent
    experiment = client.get_experiment_by_name(about["experiment"])
    if experiment is None:
        place = None
        if tracking_uri.startswith(SQLITE):
            place = (Path(tracking_uri.removeprefix(SQLITE)).parent / "mlartifacts").as_uri()
        experiment_id = client.create_experiment(about["experiment"], artifact_location=place)
    else:
        experiment_id = experiment.experiment_id
    run_id = client.create_run(experiment_id, start_time=about["time"], tags=tags).info.run_id
    params = [Param(key, str(value)[:MAX_PARAM_VAL_LENGTH]) for key, value in about["params"].items()]
    client.log_batch(run_id, params=params)
    return run_id


def mlflow_metrics(events: list[dict[str, Any]]) -> list:
    """Journal entries as MLflow metrics. System metrics have no step: theirs is the time in seconds."""
    from mlflow.entities import Metric

    return [
        Metric(key, value, event["time"], event["time"] // 1000 if event["step"] is None else event["step"])
        for event in events
        for key, value in event["metrics"].items()
    ]


def system_metrics() -> dict[str, float]:
    """What the machine is doing: CPU in percent, memory in MiB."""
    values = {
        "system/cpu_percent": psutil.cpu_percent(),
        "system/memory_mib": psutil.Process().memory_info().rss / 2**20,
    }
    if torch.cuda.is_available():
        values["system/gpu_memory_mib"] = torch.cuda.memory_reserved() / 2**20
    return values
