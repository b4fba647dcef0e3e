"""MLflow's side of tracking: a server or a local database, and what is sent to it."""

import fcntl
import logging
import os
import sqlite3
import tempfile
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

from data_tools.errors import UserError
from data_tools.files import remove_abandoned, write_atomically

from .journal import Event, description
from .logged_model import log_model

log = logging.getLogger(__name__)

REFUSALS = (400, 404, 405, 413, 415, 422, 501)
"""HTTP codes of a server that will not take a request however often it is sent. One that does not know who asks (401,
403) takes nothing at all until that is mended."""

SQLITE = "sqlite:///"

SHARED = "shared"
"""The journal's tag of a run that many jobs stand below, which has no journal."""

PASSING = tuple(f"SQLITE_{what}" for what in ("BUSY", "LOCKED", "READONLY", "CANTOPEN", "PERM", "FULL", "IOERR"))
"""SQLite's errors that say nothing of a database's content."""


def absolute_uri(uri: str) -> str:
    """A relative SQLite path made absolute, so that threads and children agree."""
    return f"{SQLITE}{Path(uri.removeprefix(SQLITE)).absolute()}" if uri.startswith(SQLITE) else uri


def prepare_mlflow() -> None:
    """Settings that MLflow reads when it is imported, unless the user has others, and what it logs."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # it would tear the progress bar
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # nothing leaves a hospital unasked
    os.environ.setdefault("MLFLOW_SQLALCHEMYSTORE_POOLCLASS", "NullPool")  # no connection to a file that is gone
    # What fails is raised as well, and reported once.
    for name in ("alembic", "mlflow.store.db.utils", "mlflow.system_metrics", "urllib3.connectionpool"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    for name in ("mlflow.pyfunc", "mlflow.store.model_registry"):
        logging.getLogger(name).setLevel(logging.WARNING)


def make_client(uri: str):
    """An MLflow client that gives up soon on a server that does not answer.

    Raises `UserError` if a local database is damaged, or of another version of MLflow.
    """
    prepare_mlflow()
    # Imported here: it takes seconds, and only the thread waits.
    from mlflow import MlflowClient

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

    remove_abandoned(file)
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
    """An error that says how to mend a database that MLflow can't open; None if that is not the database's fault."""
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


def create_run(client, uri: str, about: Event, parent: str | None):
    """The run that a journal describes, in its experiment and below its parent; made if it is not there."""
    experiment_id = find_experiment(client, uri, about["experiment"])
    # The answer to an earlier attempt may have been lost.
    if found := client.search_runs([experiment_id], f"tags.journal = '{about['id']}'", max_results=1):
        return found[0]
    tags = {"journal": about["id"], "mlflow.runName": about["name"]}
    if about.get("shared"):
        parent = shared_run(client, experiment_id, about["shared"])
    if parent:
        tags["mlflow.parentRunId"] = parent
    return client.create_run(experiment_id, start_time=about["time"], tags=tags)


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
        if "failure" in client.get_run(run_id).data.tags:
            client.delete_tag(run_id, "failure")
    if tags := event.get("tags"):
        client.log_batch(run_id, tags=[RunTag(key, str(value)) for key, value in tags.items()])
    params = [Param(key, str(value)[:MAX_PARAM_VAL_LENGTH]) for key, value in event.get("params", {}).items()]
    for start in range(0, len(params), MAX_PARAMS_TAGS_PER_BATCH):
        client.log_batch(run_id, params=params[start : start + MAX_PARAMS_TAGS_PER_BATCH])
    for name in [event["artifact"]] if "artifact" in event else event.get("files", ()):
        if is_there(path := folder / str(name)):
            client.log_artifact(run_id, str(path), event.get("folder", "images") or None)
    if "dataset" in event:
        client.log_inputs(run_id, [dataset_input(event["dataset"])])
    if "model" in event and all([is_there(folder / event[key]) for key in ("model", "example")]):
        log_model(client, run_id, folder / event["model"], folder / event["example"], event["register"])
    if "status" in event:
        client.set_terminated(run_id, event["status"], end_time=event["time"])


def is_there(path: Path) -> bool:
    """Whether a file that a journal names can be sent; said if not."""
    if not path.is_file():
        log.warning("tracking: %s is gone and was not sent", path)
    return path.is_file()


def dataset_input(facts: Mapping[str, str]):
    """A dataset as an input of an MLflow run. Logged twice, it is one."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    keys = ("name", "digest", "source_type", "source", "profile")
    dataset = Dataset(**{key: str(facts.get(key, "")) for key in keys})
    return DatasetInput(dataset, [InputTag("mlflow.data.context", str(facts.get("context", "")))])


def refused(error: Exception) -> bool:
    """Whether the server was reached and will never take this."""
    return answer_of(error) in REFUSALS


def answer_of(error: Exception) -> int | None:
    """The HTTP code of a server's answer; None if there was none."""
    response = getattr(error, "response", None)
    if response is not None:
        return response.status_code
    # MLflow has 500 for what never reached a server too.
    code = error.get_http_status_code() if hasattr(error, "get_http_status_code") else 500
    return None if code == 500 else code


def trouble(error: Exception) -> str:
    """Why nothing can be sent, in words that follow the server's name."""
    answer = answer_of(error)
    return f"answers {answer} ({brief(error)})" if answer else f"can't be reached ({brief(error)})"


def brief(error: Exception) -> str:
    """An error in a line."""
    return " ".join(str(error).split())[:200]
