"""MLflow runs that can't hold up or end a job.

What a run logs is first appended to a journal in its folder, and a thread sends the journal to the tracking server. A
server that is slow, down or away costs a warning; what could not be sent stays in the journal for `sync`.

    FOLDER/tracking.jsonl    one event a line: the run's description, then metrics, artifacts, and how it ended
    FOLDER/tracking.json     the server, the MLflow run's id there, and how many bytes of the journal it has

Whatever is sent twice, after a crash or a lost answer, counts once: the run is found by its journal's tag, and a
metric is the same one by its key, step and time, which are the journal's. So a server that does not know the run any
more, because its database was removed, is sent all of it again.
"""

import fcntl
import json
import logging
import math
import os
import sqlite3
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from types import NoneType
from typing import Any

import psutil
import torch

from data_tools.errors import UserError
from data_tools.files import write_atomically, write_text

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

SHARED = "shared"
"""The journal's tag of a run that many jobs stand below, which has no journal."""

PASSING = tuple(f"SQLITE_{what}" for what in ("BUSY", "LOCKED", "READONLY", "CANTOPEN", "PERM", "FULL", "IOERR"))
"""SQLite's errors that say nothing of a database's content."""

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
    "status": str,
}
NEEDS = {"id": {"time", "experiment", "name", "parent"}, "metrics": {"time", "step"}, "artifact": {"folder"}}
"""What an event's entries are, and which go together."""

_sending = threading.Lock()
"""Runs of one process send one after another, so that the first imports MLflow and makes the tables and experiment."""


class Tracker:
    """One MLflow run; its journal lies in `folder`."""

    def __init__(self, folder: Path, tracking_uri: str, below: bool):
        """`below`: whether it is a stage of a job that has a run itself."""
        self.folder, self.below = folder, below
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
                    why = f"{self.sender.uri} can't be reached, training goes on ({brief(error)})"
                    log.warning("tracking: %s", f"{error}; training goes on" if isinstance(error, UserError) else why)
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
        self.sent = 0
        """How many events this one has sent."""
        self.warned: set[str] = set()
        self.state = read_state(folder, uri)

    def left(self) -> int:
        """How many events are not sent."""
        return sum(1 for _ in read_journal(self.folder, self.state["sent"]))

    def send(self) -> bool:
        """Send what is new in the journal. Raises whatever the client raises.

        Returns False if there is something left, because the server does not know the run's parent yet.
        """
        if self.client and (self.folder / "tracking.jsonl").stat().st_size == self.state["sent"]:
            return True
        with _sending:
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
        if known_run(client, self.folder, self.state["run_id"]):
            return True
        parent = None
        if about["parent"]:
            above = self.folder / about["parent"]
            parent = read_state(above, self.uri)["run_id"]
            if not known_run(client, above, parent):
                return False
        self._save(run_id=create_run(client, self.uri, about, parent), sent=0)
        return True

    def _deliver(self, events: list[Event]) -> None:
        """Send events; what the server refuses for good is left out, so that what is behind it need not wait."""
        if not all(events):
            self._warn(f"{self.folder / 'tracking.jsonl'} has damaged lines, which are left out")
        try:
            deliver(self.client, self.state["run_id"], self.folder, events)
        except Exception as error:
            if not refused(error):
                raise
            if len(events) > 1:
                for event in events:
                    self._deliver([event])
            else:
                what = f"{self.uri} refuses a part of {self.folder}, which stays in the journal"
                self._warn(what, f" ({brief(error)})")

    def _warn(self, what: str, why: str = "") -> None:
        """A warning, once."""
        if what not in self.warned:
            log.warning("tracking: %s%s", what, why)
            self.warned.add(what)

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


def sync(folder: Path, tracking_uri: str) -> int:
    """Send what the runs of a job that has ended could not send: its own, then those of its stages.

    Returns how many events were sent. Raises `UserError` if there is no journal, the server can't be reached, or a
    journal can't be sent, which the others need not wait for.
    """
    folders = [path.parent for path in sorted(folder.rglob("tracking.jsonl"), key=lambda p: len(p.parts))]
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
            raise UserError(f"{tracking_uri}: can't be reached ({brief(error)}); {left}") from None
        total += sender.sent
    if errors:
        raise UserError(errors[0])
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


def read_state(folder: Path, uri: str) -> dict[str, Any]:
    """How far a journal has been sent, as a sender noted it; from its start, if this can't be known."""
    file = folder / "tracking.json"
    start = {"uri": uri, "run_id": None, "sent": 0}
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
    """An MLflow client that gives up soon on a server that does not answer.

    Raises `UserError` if a local database is damaged, or of another version of MLflow.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # it would tear the progress bar
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # nothing leaves a hospital unasked
    os.environ.setdefault("MLFLOW_SQLALCHEMYSTORE_POOLCLASS", "NullPool")  # no connection to a file that is gone
    # Imported here: it takes seconds, and only the thread waits.
    from mlflow import MlflowClient

    # What fails is raised as well, and reported once.
    for name in ("alembic", "mlflow.store.db.utils", "urllib3.connectionpool"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if not uri.startswith(SQLITE):
        return MlflowClient(uri)
    file = Path(uri.removeprefix(SQLITE))
    file.parent.mkdir(parents=True, exist_ok=True)
    # Two jobs that make the same database or its tables at the same time would leave it broken.
    with open(file.with_name(f"{file.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not file.exists() or not file.stat().st_size:
            create_database(file)
        try:
            check_database(file)
            client = MlflowClient(uri)
            client.search_experiments(max_results=1)
        except Exception as error:
            raise unusable(file, error) or error from None
    return client


def create_database(file: Path) -> None:
    """An MLflow database, which takes seconds to make, whole or not at all."""
    from mlflow import MlflowClient

    for unfinished in file.parent.glob(f".{file.name}.*.tmp"):
        unfinished.unlink()
    for left in ("-journal", "-wal", "-shm"):
        # Of a database that was here before; SQLite would take them for the new one's.
        file.with_name(file.name + left).unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "mlflow.db"
        MlflowClient(f"{SQLITE}{made}").search_experiments(max_results=1)
        write_atomically(file, lambda aside: aside.write_bytes(made.read_bytes()))


def check_database(file: Path) -> None:
    """Raises `sqlite3.Error` if a file is no database, or not one of MLflow, which would put its tables there."""
    with closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=rw", uri=True)) as database:
        database.execute("SELECT version_num FROM alembic_version")
        database.execute("SELECT experiment_id FROM experiments LIMIT 1")


def unusable(file: Path, error: Exception) -> UserError | None:
    """What to do about a database that MLflow can't open, if it is the database's own fault."""
    cause: BaseException | None = error
    while cause and not isinstance(cause, sqlite3.Error):
        cause = cause.__cause__ or cause.__context__
    otherwise = (
        "move it away: the next job makes another, and spark-dist track-sync FOLDER sends what a job's journal holds"
    )
    if "out-of-date database schema" in str(error):
        update = f"mlflow db upgrade {SQLITE}{file}"
        return UserError(
            f"{file}: a database of another version of MLflow; back it up and run {update}, or {otherwise}"
        )
    if cause is None or getattr(cause, "sqlite_errorname", "").startswith(PASSING):
        return None
    return UserError(f"{file}: not a whole MLflow database ({brief(cause)}); {otherwise}")


def known_run(client, folder: Path, run_id: str | None):
    """The MLflow run of this id, if the server has it and it is that of the folder's journal.

    Raises `UserError` if somebody has deleted the run in MLflow.
    """
    from mlflow.exceptions import MlflowException

    about = description(folder)
    if not about or not run_id:
        return None
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise
    if run.data.tags.get("journal") != about["id"]:
        return None
    if run.info.lifecycle_stage == "deleted":
        raise UserError(
            f"{folder}: its run was deleted in MLflow; bring it back with mlflow runs restore --run-id {run_id}, or "
            f"remove {folder / 'tracking.json'} to send it as a new one"
        )
    return run


def create_run(client, uri: str, about: Event, parent: str | None) -> str:
    """The id of the run that a journal describes, in its experiment and below its parent; made if it is not there."""
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
        # The name, which may hold any quotes, is no part of the filter.
        found = client.search_runs([experiment_id], f"tags.journal = '{SHARED}'")
        named = [run.info for run in found if run.data.tags.get("sweep") == name]
        return min(((info.start_time, info.run_id) for info in named), default=(0, None))[1]

    if not (run_id := oldest()):
        tags = {"journal": SHARED, "sweep": name, "mlflow.runName": name}
        made = client.create_run(experiment_id, tags=tags).info.run_id
        client.set_terminated(made)
        # Another job may have made one at the same time: all take the oldest.
        run_id = oldest()
        if made != run_id:
            client.delete_run(made)
    return run_id


def find_experiment(client, uri: str, name: str) -> str:
    """The id of an experiment, made if it is not there; artifacts of a local database lie next to it."""
    experiment = client.get_experiment_by_name(name)
    if experiment and experiment.lifecycle_stage == "deleted":
        restore = f"mlflow experiments restore --experiment-id {experiment.experiment_id}"
        raise UserError(
            f"{uri}: the experiment '{name}' was deleted in MLflow; {restore}, or give another --experiment"
        )
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
        if path.is_file():
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
