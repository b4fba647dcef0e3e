"""MLflow runs that can't hold up or end a job.

What a run logs is first appended to a journal in its folder, and a thread sends the journal to the tracking server. A
server that is slow, down or away costs a warning; what could not be sent stays in the journal for `sync`.

    FOLDER/tracking.jsonl    one event a line: the run's description, then metrics, artifacts, and how it ended
    FOLDER/tracking.json     the server, the MLflow run's id there, and how many bytes of the journal it has

Whatever is sent twice, after a crash or a lost answer, counts once: the run is found by its journal's tag, and a
metric is the same one by its key, step and time, which are the journal's.
"""

import fcntl
import json
import logging
import math
import os
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch

from data_tools.errors import UserError
from data_tools.files import write_text

log = logging.getLogger(__name__)

POLL, LONGEST_PAUSE = 1, 30
"""Seconds between looks at the journal, and between attempts to reach a server that has been away for long."""
PATIENCE = 10
"""Seconds that the end of a run waits for the server."""
SYSTEM_SECONDS = 10
"""Seconds between readings of the system metrics."""
BATCH = 500
"""Metrics in a request (MLflow takes 1000)."""
REFUSALS = (400, 413, 422)
"""HTTP codes of a server that will not take a request however often it is sent."""

SQLITE = "sqlite:///"

Event = dict[str, Any]

_sending = threading.Lock()
"""Runs of one process send one after another, so that the first imports MLflow and makes the tables and experiment."""


class Tracker:
    """One MLflow run; its journal lies in `folder`."""

    def __init__(self, folder: Path, tracking_uri: str):
        self.folder = folder
        self.sender = Sender(folder, tracking_uri)
        self.logged = {(key, event["step"]) for _, event in read_journal(folder) for key in event.get("metrics", ())}
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
            append(self.folder, {"metrics": new, "step": step})

    def artifact(self, path: Path, folder: str = "") -> None:
        """Log a file. It is read when it is sent; one in the run's folder may move with the folder."""
        path, here = Path(path).absolute(), self.folder.absolute()
        place = path.relative_to(here) if path.is_relative_to(here) else path
        append(self.folder, {"artifact": str(place), "folder": folder})

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags."""
        append(self.folder, {"tags": dict(values)})

    def finish(self, status: str) -> None:
        """End the run as FINISHED, FAILED or KILLED, and wait a little until the server has all of it."""
        append(self.folder, {"status": status})
        self.ended.set()
        self.thread.join(PATIENCE)
        if left := self.sender.left():
            log.warning(
                "tracking: %s has not taken %d entries; they are kept in %s", self.sender.uri, left, self.folder
            )

    def _work(self) -> None:
        """Send what comes, until the run has ended and all is sent or it is clear that the server is away."""
        pause, warned, sampled = POLL, False, -math.inf
        while True:
            ending = self.ended.is_set()
            try:
                if not ending and time.monotonic() - sampled > SYSTEM_SECONDS:
                    sampled = time.monotonic()
                    append(self.folder, {"metrics": system_metrics(), "step": None})
                sent = self.sender.send()
            except Exception as error:
                sent = False
                if not warned:
                    log.warning("tracking: %s can't be reached, training goes on (%s)", self.sender.uri, brief(error))
                    warned = True
            pause = POLL if sent else min(2 * pause, LONGEST_PAUSE)
            if ending and (sent or pause > PATIENCE / 2):
                return
            if ending:
                time.sleep(pause)
            else:
                self.ended.wait(pause)


class Sender:
    """Sends a journal's events to an MLflow server, from where the last one stopped."""

    def __init__(self, folder: Path, uri: str):
        self.folder, self.uri = folder, uri
        self.client = None
        self.warned = False
        file = folder / "tracking.json"
        self.state = json.loads(file.read_text()) if file.exists() else {}
        if self.state.get("uri") != uri:
            # Another server knows nothing of this run, and is told all of it.
            self.state = {"uri": uri, "run_id": None, "sent": 0}

    def left(self) -> int:
        """How many events are not sent."""
        return sum(1 for _ in read_journal(self.folder, self.state["sent"]))

    def send(self) -> bool:
        """Send what is new in the journal. Raises whatever the client raises.

        Returns False if there is something left, because the server does not know the run's parent yet.
        """
        if (self.folder / "tracking.jsonl").stat().st_size == self.state["sent"]:
            return True
        with _sending:
            self.client = self.client or make_client(self.uri)
            if self.state["run_id"] is None:
                _, about = next(read_journal(self.folder))
                parent = about["parent"] and Sender(self.folder / about["parent"], self.uri).state["run_id"]
                if about["parent"] and not parent:
                    return False
                self._save(run_id=create_run(self.client, self.uri, about, parent))
            for batch in batches(read_journal(self.folder, self.state["sent"])):
                self._deliver([event for _, event in batch])
                self._save(sent=batch[-1][0])
        return True

    def _deliver(self, events: list[Event]) -> None:
        """Send events; what the server refuses for good is left out, so that what is behind it need not wait."""
        try:
            deliver(self.client, self.state["run_id"], self.folder, events)
        except Exception as error:
            if not refused(error):
                raise
            if len(events) > 1:
                for event in events:
                    self._deliver([event])
            elif not self.warned:
                log.warning(
                    "tracking: %s refuses a part of %s, which stays in the journal (%s)",
                    self.uri,
                    self.folder,
                    brief(error),
                )
                self.warned = True

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

    def tags(self, values: Mapping[str, str]) -> None:
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
    parent: Tracker | str | None = None,
) -> Tracker:
    """A run whose journal lies in `folder`; if there is one already, the same MLflow run goes on, with new `tags`.

    It stands below `parent`, if there is one: a run of the same job, or the name of a run that many jobs share.

    Returns at once: the run is created on the server in the background.
    """
    folder.mkdir(parents=True, exist_ok=True)
    mend_journal(folder)
    if next(read_journal(folder), None):
        append(folder, {"resumed": True, "tags": dict(tags)})
    else:
        above = os.path.relpath(parent.folder.resolve(), folder.resolve()) if isinstance(parent, Tracker) else None
        shared = parent if isinstance(parent, str) else ""
        about = {"id": uuid.uuid4().hex, "experiment": experiment, "name": name, "parent": above, "shared": shared}
        append(folder, {**about, "tags": dict(tags), "params": dict(params)})
    tracker = Tracker(folder, absolute_uri(tracking_uri))
    tracker.thread.start()
    return tracker


def sync(folder: Path, tracking_uri: str) -> int:
    """Send what the runs of a job that has ended could not send: its own, then those of its stages.

    Returns how many events were sent. Raises `UserError` if there is no journal, or the server can't be reached.
    """
    folders = [path.parent for path in sorted(folder.rglob("tracking.jsonl"), key=lambda p: len(p.parts))]
    if not folders:
        raise UserError(f"{folder}: no journal of a run here; name the folder of a job")
    total = 0
    for part in folders:
        sender = Sender(part, absolute_uri(tracking_uri))
        left = sender.left()
        try:
            sent = sender.send()
        except Exception as error:
            raise UserError(f"{tracking_uri}: can't be reached ({brief(error)}); {part} keeps {left} entries") from None
        if not sent:
            raise UserError(f"{part}: its run belongs below another one; sync the folder of the whole job")
        total += left
    return total


def absolute_uri(uri: str) -> str:
    """A relative SQLite path made absolute, so that threads and children agree."""
    return f"{SQLITE}{Path(uri.removeprefix(SQLITE)).absolute()}" if uri.startswith(SQLITE) else uri


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
                yield start, json.loads(line)
            except ValueError:  # a machine that lost power may leave zeros
                yield start, {}


def mend_journal(folder: Path) -> None:
    """Remove the half line that a killed process may have left, so that the next event gets a line of its own."""
    file = folder / "tracking.jsonl"
    if file.exists():
        os.truncate(file, max((position for position, _ in read_journal(folder)), default=0))


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


def make_client(uri: str):
    """An MLflow client that gives up soon on a server that does not answer."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # it would tear the progress bar
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # nothing leaves a hospital unasked
    # Imported here: it takes seconds, and only the thread waits.
    from mlflow import MlflowClient

    # What fails is raised as well, and reported once.
    for name in ("alembic", "mlflow.store.db.utils", "urllib3.connectionpool"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if not uri.startswith(SQLITE):
        return MlflowClient(uri)
    # Two jobs that make the tables of a new file at the same time leave it broken for good.
    file = Path(uri.removeprefix(SQLITE))
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file.with_name(f"{file.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        client = MlflowClient(uri)
        client.search_experiments(max_results=1)
    return client


def create_run(client, uri: str, about: Event, parent: str | None) -> str:
    """The id of the run that a journal begins with, in its experiment and below its parent; made if it is not there."""
    experiment_id = find_experiment(client, uri, about["experiment"])
    # The answer to an earlier attempt may have been lost.
    if found := client.search_runs([experiment_id], f"tags.journal = '{about['id']}'", max_results=1):
        return found[0].info.run_id
    tags = {"journal": about["id"], "mlflow.runName": about["name"]}
    if about.get("shared"):
        parent = shared_run(client, experiment_id, about["shared"])
    if parent:
        tags["mlflow.parentRunId"] = parent
    return client.create_run(experiment_id, start_time=about["time"], tags=tags).info.run_id


def shared_run(client, experiment_id: str, name: str) -> str:
    """The id of the run that many jobs stand below, made by the first that looks for it."""

    def oldest() -> str | None:
        found = client.search_runs([experiment_id], f"tags.sweep = '{name}'")
        return min(((run.info.start_time, run.info.run_id) for run in found), default=(0, None))[1]

    if not (run_id := oldest()):
        made = client.create_run(experiment_id, tags={"sweep": name, "mlflow.runName": name}).info.run_id
        client.set_terminated(made)
        # Another job may have made one at the same time: all take the oldest.
        run_id = oldest()
        if made != run_id:
            client.delete_run(made)
    return run_id


def find_experiment(client, uri: str, name: str) -> str:
    """The id of an experiment, made if it is not there; artifacts of a local database lie next to it."""
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        place = (Path(uri.removeprefix(SQLITE)).parent / "mlartifacts").as_uri() if uri.startswith(SQLITE) else None
        try:
            return client.create_experiment(name, artifact_location=place)
        except Exception:
            # Another job may have made it since.
            experiment = client.get_experiment_by_name(name)
            if experiment is None:
                raise
    return experiment.experiment_id


def deliver(client, run_id: str, folder: Path, events: list[Event]) -> None:
    """Send one batch. Longer parameters than MLflow takes are cut: the whole configuration is an artifact."""
    from mlflow.entities import Metric, Param, RunTag
    from mlflow.utils.validation import MAX_PARAM_VAL_LENGTH, MAX_PARAMS_TAGS_PER_BATCH

    # System metrics have no step: theirs is the time in seconds.
    metrics = [
        Metric(key, value, event["time"], event["time"] // 1000 if event["step"] is None else event["step"])
        for event in events
        for key, value in event.get("metrics", {}).items()
    ]
    if metrics:
        client.log_batch(run_id, metrics=metrics)
        return
    (event,) = events
    if "resumed" in event:
        client.update_run(run_id, status="RUNNING")
    if tags := event.get("tags"):
        client.log_batch(run_id, tags=[RunTag(key, str(value)) for key, value in tags.items()])
    params = [Param(key, str(value)[:MAX_PARAM_VAL_LENGTH]) for key, value in event.get("params", {}).items()]
    for start in range(0, len(params), MAX_PARAMS_TAGS_PER_BATCH):
        client.log_batch(run_id, params=params[start : start + MAX_PARAMS_TAGS_PER_BATCH])
    if "artifact" in event:
        path = folder / event["artifact"]
        if path.exists():
            client.log_artifact(run_id, str(path), event["folder"] or None)
        else:
            log.warning("tracking: %s is gone and was not sent", path)
    if "status" in event:
        client.set_terminated(run_id, event["status"], end_time=event["time"])


def refused(error: Exception) -> bool:
    """Whether the server was reached and will never take this."""
    response = getattr(error, "response", None)
    if response is not None:
        return response.status_code in REFUSALS
    return hasattr(error, "get_http_status_code") and error.get_http_status_code() in REFUSALS


def brief(error: Exception) -> str:
    """An error in a line."""
    return " ".join(str(error).split())[:200]


def system_metrics() -> dict[str, float]:
    """What the machine is doing: CPU in percent, memory in MiB."""
    values = {
        "system/cpu_percent": psutil.cpu_percent(),
        "system/memory_mib": psutil.Process().memory_info().rss / 2**20,
    }
    if torch.cuda.is_available():
        values["system/gpu_memory_mib"] = torch.cuda.memory_reserved() / 2**20
    return values
