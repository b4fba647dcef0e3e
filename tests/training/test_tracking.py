import http.client
import json
import math
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import types
from contextlib import ExitStack, closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import ROOT, kill, mlflow_server

from data_tools.errors import UserError
from spark_dist.training.finished_runs import load_runs
from spark_dist.training.journal import read_journal
from spark_dist.training.mlflow_client import absolute_uri, make_client
from spark_dist.training.runs_page import VIEW_TAG
from spark_dist.training.sender import BATCH, Sender, batches
from spark_dist.training.system_metrics import SystemMetrics
from spark_dist.training.tracking import Tracker, failure_of, null_tracker, open_run, page_of, sync


@pytest.fixture(scope="session")
def database(tmp_path_factory):
    """An empty MLflow database, which takes seconds to make."""
    file = tmp_path_factory.mktemp("database") / "mlflow.db"
    make_client(f"sqlite:///{file}")
    return file


@pytest.fixture
def store(database, tmp_path):
    shutil.copy(database, tmp_path)
    return f"sqlite:///{tmp_path}/mlflow.db"


@pytest.fixture(scope="session")
def finished(database, tmp_path_factory):
    """A database, and beside it a job with a stage which it has, and somebody else's run."""
    folder = tmp_path_factory.mktemp("finished")
    store = f"sqlite:///{shutil.copy(database, folder)}"
    parent = open_run(store, "e", "job", folder / "job", {}, {})
    child = open_run(store, "e", "student", folder / "job" / "student", {}, {"lr": 1}, parent)
    for step in range(3):
        child.metrics({"loss": step}, step)
    child.finish("FINISHED")
    parent.finish("FINISHED")
    client = make_client(store)
    client.create_run(client.get_experiment_by_name("e").experiment_id, tags={"mlflow.runName": "foreign"})
    return folder


@pytest.fixture
def sent(finished, tmp_path):
    """A copy of that job."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    for file in (tmp_path / "job").rglob("tracking.json"):
        file.write_text(file.read_text().replace(str(finished), str(tmp_path)))
    return tmp_path / "job"


def check_sent(uri, folder):
    """Whether a server has all of that job once, and nothing in another's run."""
    client = make_client(uri)
    found = {run.info.run_name: run for run in runs(uri)}
    assert len(found) == len(runs(uri))
    if "foreign" in found:
        assert not found["foreign"].data.metrics
        assert set(found["foreign"].data.tags) <= {"mlflow.runName", "mlflow.user"}
    for name, part in (("job", folder), ("student", folder / "student")):
        assert found[name].info.status == "FINISHED"
        assert found[name].info.run_id == state(part)["run_id"]
    assert found["student"].data.tags["mlflow.parentRunId"] == found["job"].info.run_id
    history = client.get_metric_history(found["student"].info.run_id, "loss")
    assert sorted((metric.step, metric.value) for metric in history) == [(0, 0), (1, 1), (2, 2)]


@pytest.fixture
def port():
    """A closed port of this machine."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def state(folder):
    return json.loads((folder / "tracking.json").read_text())


def history(uri, folder, key):
    found = make_client(uri).get_metric_history(state(folder)["run_id"], key)
    return sorted((metric.step, metric.value) for metric in found)


def runs(uri, experiment="e"):
    client = make_client(uri)
    return client.search_runs([client.get_experiment_by_name(experiment).experiment_id])


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_a_run_and_its_child_reach_mlflow(store, tmp_path):
    tags, params = {"seed": "1"}, {"lr": 0.1, "long": "x" * 9000} | {f"weight{k}": k for k in range(150)}
    parent = open_run(store, "phantom-organ", "job", tmp_path / "job", tags, params)
    child = open_run(store, "phantom-organ", "student", tmp_path / "job" / "student", {}, {}, parent)
    for step in range(250):
        child.metrics({"loss": step / 2, "dice": 0.5}, step)
    (tmp_path / "figure.png").write_bytes(b"png")
    child.artifact(tmp_path / "figure.png", "figures")
    child.tags({"method": "spark"})
    child.finish("FINISHED")
    parent.finish("FAILED")
    client = make_client(store)
    run = client.get_run(child.run_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "student"
    assert run.data.tags["mlflow.parentRunId"] == parent.run_id
    assert run.data.tags["method"] == "spark"
    assert history(store, child.folder, "loss") == [(step, step / 2) for step in range(250)]
    assert [file.path for file in client.list_artifacts(child.run_id, "figures")] == ["figures/figure.png"]
    assert (tmp_path / "mlartifacts" / child.run_id / "artifacts" / "figures" / "figure.png").exists()
    run = client.get_run(parent.run_id)
    assert run.info.status == "FAILED"
    assert run.data.tags["seed"] == "1"
    assert run.data.params["lr"] == "0.1"
    assert len(run.data.params) == 152
    assert "x" * 1000 in run.data.params["long"]
    assert "system/memory_mib" in run.data.metrics


def test_a_resumed_run_goes_on_without_a_step_twice(store, tmp_path):
    first = open_run(store, "e", "r", tmp_path / "r", {"world_size": "1"}, {})
    for step in range(5):
        first.metrics({"loss": step}, step)
    first.finish("KILLED")
    with open(tmp_path / "r" / "tracking.jsonl", "a") as journal:
        journal.write('{"time": 1, "metr')  # as a killed process leaves it
    second = open_run(store, "e", "r", tmp_path / "r", {"world_size": "2"}, {})
    wait_until(lambda: runs(store)[0].info.status == "RUNNING")
    for step in range(3, 8):
        second.metrics({"loss": step}, step)
    second.finish("FINISHED")
    assert second.run_id == first.run_id
    assert history(store, tmp_path / "r", "loss") == [(step, step) for step in range(8)]
    assert len([key for _, e in read_journal(tmp_path / "r") for key in e.get("metrics", ()) if key == "loss"]) == 8
    (run,) = runs(store)
    assert run.info.status == "FINISHED"
    assert run.data.tags["world_size"] == "2"


def test_a_dead_server_costs_nothing_and_loses_nothing(port, store, tmp_path, caplog):
    nowhere = f"http://127.0.0.1:{port}"
    start = time.monotonic()
    parent = open_run(nowhere, "e", "job", tmp_path / "job", {}, {})
    child = open_run(nowhere, "e", "student", tmp_path / "job" / "student", {}, {}, parent)
    for step in range(100):
        child.metrics({"loss": step}, step)
    (tmp_path / "job" / "student" / "best").write_text("weights")
    child.artifact(tmp_path / "job" / "student" / "best")
    assert time.monotonic() - start < 1
    for tracker in (child, parent):
        start = time.monotonic()
        tracker.finish("FINISHED")
        assert time.monotonic() - start < 15
    warned = [record.getMessage() for record in caplog.records]
    assert ["training goes on" in warned[0], *("kept in" in text for text in warned[1:])] == [True] * 3
    assert child.run_id is None
    with pytest.raises(UserError, match="can't be reached"):
        sync(tmp_path / "job", nowhere)

    (tmp_path / "job").rename(tmp_path / "elsewhere")
    assert sync(tmp_path / "elsewhere", store) >= 105
    assert sync(tmp_path / "elsewhere", store) == 0
    folder = tmp_path / "elsewhere" / "student"
    assert history(store, folder, "loss") == [(step, step) for step in range(100)]
    client = make_client(store)
    assert [file.path for file in client.list_artifacts(state(folder)["run_id"])] == ["best"]
    run = client.get_run(state(folder)["run_id"])
    assert run.data.tags["mlflow.parentRunId"] == state(tmp_path / "elsewhere")["run_id"]
    assert run.info.status == "FINISHED"


def test_what_is_sent_twice_counts_once(store, tmp_path):
    """A process may die, or an answer get lost, between the server's work and the note of it."""
    tracker = open_run(store, "e", "r", tmp_path / "r", {}, {"lr": 1})
    for step in range(5):
        tracker.metrics({"loss": step}, step)
    tracker.finish("FINISHED")
    (tmp_path / "r" / "tracking.json").unlink()
    assert sync(tmp_path / "r", store) > 0
    assert [run.info.run_id for run in runs(store)] == [tracker.run_id]
    assert history(store, tmp_path / "r", "loss") == [(step, step) for step in range(5)]


def test_a_run_that_goes_on_with_another_server_is_there_as_a_whole(store, tmp_path):
    first = open_run(store, "e", "r", tmp_path / "r", {}, {})
    first.metrics({"loss": 1}, 1)
    first.finish("KILLED")
    other = store.replace("mlflow.db", "other.db")
    shutil.copy(tmp_path / "mlflow.db", tmp_path / "other.db")
    second = open_run(other, "e", "r", tmp_path / "r", {}, {})
    second.metrics({"loss": 2}, 2)
    second.finish("FINISHED")
    assert history(other, tmp_path / "r", "loss") == [(1, 1), (2, 2)]


def test_pictures_of_a_series_and_the_dataset_are_there_once(store, port, tmp_path):
    picture = np.zeros((30, 600, 3), np.uint8)
    picture[:, :300, 0] = 255
    facts = {"name": "kits", "digest": "abc", "source_type": "local", "source": "{}", "context": "training"}
    nowhere = f"http://127.0.0.1:{port}"
    for _ in range(2):  # as before and after a kill
        tracker = open_run(nowhere, "e", "r", tmp_path / "r", {}, {})
        tracker.dataset(facts)
        for step in (5, 10):
            tracker.image("val/predictions", picture, step)
        tracker.ended.set()
    assert len(list((tmp_path / "r" / "images").iterdir())) == 4
    (tmp_path / "r").rename(tmp_path / "moved")
    for _ in range(2):
        sync(tmp_path / "moved", store)
        (run,) = runs(store)
        (tmp_path / "moved" / "tracking.json").unlink()
    client = make_client(store)
    paths = sorted(file.path for file in client.list_artifacts(run.info.run_id, "images"))
    assert [path.split("+")[:3] for path in paths[::2]] == [["images/val~predictions", "step", n] for n in ("10", "5")]
    assert all(path.endswith("+compressed.webp") for path in paths[::2])
    assert [path.replace("+compressed.webp", ".png") for path in paths[::2]] == paths[1::2]
    sent = cv2.imread(client.download_artifacts(run.info.run_id, paths[1]))
    assert (sent[..., ::-1] == picture).all()
    small = cv2.imread(client.download_artifacts(run.info.run_id, paths[0]))
    assert small.shape == (12, 256, 3)
    assert run.data.tags["mlflow.loggedImages"] == "True"
    (found,) = run.inputs.dataset_inputs
    assert (found.dataset.name, found.dataset.digest) == ("kits", "abc")
    assert [(tag.key, tag.value) for tag in found.tags] == [("mlflow.data.context", "training")]


def test_what_the_server_refuses_does_not_hold_up_the_rest(store, tmp_path, caplog):
    tracker = open_run(store, "e", "r", tmp_path / "r", {}, {})
    for step in range(3):
        tracker.metrics({"loss": step, "no such*name?": 1} if step == 1 else {"loss": step}, step)
    tracker.artifact(tmp_path / "nothing.png")
    tracker.finish("FINISHED")
    assert history(store, tmp_path / "r", "loss") == [(0, 0), (2, 2)]
    assert runs(store)[0].info.status == "FINISHED"
    assert "refuses" in caplog.text
    assert "nothing.png is gone" in caplog.text
    assert "training goes on" not in caplog.text


class Refusing(BaseHTTPRequestHandler):
    """An MLflow server as far as one run needs it, which answers some paths with a code of its own."""

    def do_GET(self):
        self.do_POST()

    def do_POST(self):
        length = int(self.headers.get("Content-Length") or 0)
        request = json.loads(self.rfile.read(length) or "{}")
        path = self.path.partition("?")[0].partition("/mlflow/")[2]
        code = self.server.refused.get(path, 200)
        if code == 200:
            self.server.taken.append((path, request))
        if path == "runs/create":
            self.server.tags = request["tags"]
        run = {"info": {"run_id": "1" * 32, "experiment_id": "1", "lifecycle_stage": "active"}}
        run["data"] = {"tags": self.server.tags}
        answers = {"experiments/get-by-name": {"experiment": {"experiment_id": "1", "lifecycle_stage": "active"}}}
        answers |= {"runs/create": {"run": run}, "runs/get": {"run": run}}
        self.send_response(code)
        self.end_headers()
        self.wfile.write(json.dumps(answers.get(path, {})).encode() if code == 200 else b"not found")

    def log_message(self, *about):
        pass


@pytest.fixture
def refusing():
    """A server that takes everything until told otherwise: `refused` has a code by path, `taken` what it took."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        server.refused, server.taken, server.tags = {}, [], []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.parametrize("code", [400, 404, 501])
def test_a_server_that_refuses_an_entry_is_not_one_that_is_down(refusing, tmp_path, caplog, code):
    """As one of an earlier version, which does not know of datasets."""
    refusing.refused["runs/log-inputs"] = code
    uri = f"http://127.0.0.1:{refusing.server_port}"
    tracker = open_run(uri, "e", "r", tmp_path / "r", {}, {})
    tracker.dataset({"name": "kits", "digest": "abc", "source_type": "local", "source": "{}", "context": "training"})
    tracker.metrics({"loss": 1}, 1)
    tracker.finish("FINISHED")
    assert not tracker.sender.left()
    sent = [metric["key"] for path, request in refusing.taken for metric in request.get("metrics", ())]
    assert "loss" in sent
    assert ("runs/update", "FINISHED") in [(path, request.get("status")) for path, request in refusing.taken]
    (warned,) = [record.getMessage() for record in caplog.records if record.name.startswith("spark_dist")]
    assert warned.startswith(f"tracking: {uri} refuses dataset ")


@pytest.mark.parametrize(("path", "code"), [("runs/log-batch", 403), ("runs/log-batch", 503), ("runs/get", 404)])
def test_a_server_that_takes_nothing_now_gets_all_of_it_later(refusing, tmp_path, caplog, monkeypatch, path, code):
    """Whoever it does not know is refused everything; and of a run that it has lost, no entry is passed over."""
    monkeypatch.setattr("spark_dist.training.tracking.PATIENCE", 1)
    refusing.refused = {path: code, "runs/log-inputs": 404}
    uri = f"http://127.0.0.1:{refusing.server_port}"
    tracker = open_run(uri, "e", "r", tmp_path / "r", {}, {})
    tracker.dataset({"name": "kits"})
    tracker.metrics({"loss": 1}, 1)
    tracker.finish("FINISHED")
    assert tracker.sender.left()
    why = f"answers {code} (" if code < 500 else "can't be reached ("
    assert why in caplog.text
    tracker.thread.join()
    refusing.refused.clear()
    assert sync(tmp_path / "r", uri) >= 3
    assert "loss" in [metric["key"] for _, request in refusing.taken for metric in request.get("metrics", ())]
    # Passed over by a server that knew the run, but not by one that did not.
    assert ("runs/log-inputs" in [path for path, _ in refusing.taken]) == (path == "runs/get")


def test_only_what_is_new_in_the_journal_is_read(tmp_path):
    (tmp_path / "tracking.jsonl").write_text('{"step": 1}\n{"step": 2}\n\0\0\n{"step": 3}\n{"st')
    events = list(read_journal(tmp_path))
    assert [event for _, event in events] == [{"step": 1}, {"step": 2}, {}, {"step": 3}]
    assert [event for _, event in read_journal(tmp_path, events[1][0])] == [{}, {"step": 3}]
    assert not list(read_journal(tmp_path, events[-1][0]))


def test_requests_hold_no_more_metrics_than_mlflow_takes():
    metrics = {"metrics": dict.fromkeys(map(str, range(40)), 0.0)}
    events = [*enumerate([metrics] * 30), (30, {"status": "FINISHED"}), (31, metrics)]
    found = list(batches(iter(events)))
    assert [event for batch in found for event in batch] == events
    assert all(sum(len(e.get("metrics", ())) for _, e in batch) <= BATCH for batch in found)
    assert [(30, {"status": "FINISHED"})] in found
    assert len(found) == 3 + 1 + 1


def test_other_processes_have_all_methods_of_a_tracker():
    nothing = null_tracker()
    assert {name for name in vars(Tracker) if not name.startswith("_")} <= set(dir(nothing))
    nothing.metrics({"loss": 1}, 1)
    nothing.artifact("nowhere")
    nothing.image("key", None, 1)
    nothing.dataset({})
    nothing.model("nowhere", "nowhere", "name")
    nothing.tags({})
    nothing.finish("FAILED", "a reason")
    assert nothing.run_id is None
    assert not nothing.page


def test_a_folder_without_a_journal(tmp_path, store):
    with pytest.raises(UserError, match="no journal"):
        sync(tmp_path, store)


def test_a_relative_database_is_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert absolute_uri("sqlite:///mlflow.db") == f"sqlite:///{tmp_path}/mlflow.db"
    assert absolute_uri("http://host:5000") == "http://host:5000"


def test_jobs_that_start_together_make_one_database(tmp_path):
    store = f"sqlite:///{tmp_path}/mlflow.db"
    code = "import sys; from spark_dist.training.mlflow_client import make_client; make_client(sys.argv[1])"
    started = [subprocess.Popen([sys.executable, "-c", code, store]) for _ in range(3)]
    assert [process.wait(120) for process in started] == [0, 0, 0]
    assert make_client(store).search_experiments()


KILLED = """
import os, sys
from sqlalchemy import event
from sqlalchemy.engine import Engine
from spark_dist.training.mlflow_client import make_client
import alembic.command, mlflow.store.tracking.sqlalchemy_store

def kill(*about):
    os.kill(os.getpid(), 9)

def at_statement(number):
    statements = []

    @event.listens_for(Engine, "before_cursor_execute")
    def count(*about):
        statements.append(about)
        if len(statements) == number:
            kill()

for place in sys.argv[2:]:
    if not (child := os.fork()):
        if place == "fsync":
            os.fsync = kill
        else:
            at_statement(int(place))
        make_client(sys.argv[1])
        os._exit(0)
    print(place, os.waitpid(child, 0)[1])
"""


def test_killed_while_the_database_is_made_it_is_made_by_the_next_job(tmp_path):
    """Among the moments are two that would leave half a database for good."""
    store = f"sqlite:///{tmp_path}/mlflow.db"
    line = [sys.executable, "-c", KILLED, store, "30", "900", "fsync"]
    killed = subprocess.run(line, capture_output=True, text=True, check=True)
    assert killed.stdout == "30 9\n900 9\nfsync 9\n"
    assert not (tmp_path / "mlflow.db").exists()
    tracker = open_run(store, "e", "r", tmp_path / "r", {}, {})
    tracker.metrics({"loss": 1}, 1)
    tracker.finish("FINISHED")
    assert history(store, tmp_path / "r", "loss") == [(1, 1)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mlflow.db", "mlflow.db.lock", "r"]


def test_a_disk_that_is_full_when_the_database_is_made_gets_it_later(small_disk, tmp_path, caplog):
    disk = small_disk("200k")
    store = f"sqlite:///{disk}/mlflow.db"
    (disk / "mlflow.db-journal").write_bytes(b"of a database that was here before")
    tracker = open_run(store, "e", "r", tmp_path / "r", {}, {})
    tracker.metrics({"loss": 1}, 1)
    tracker.finish("FINISHED")
    tracker.thread.join()  # it may be at its last attempt
    first, last = (record.getMessage() for record in caplog.records)
    assert first.startswith(f"tracking: {disk}/mlflow.db: can't be written (")
    assert first.endswith("; training goes on")
    assert last.endswith(f"and spark-dist track-sync {tmp_path}/r --tracking-uri {store} sends them")
    assert [path.name for path in disk.iterdir()] == ["mlflow.db.lock"]
    subprocess.run(["mount", "-o", "remount,size=8m", disk], check=True)
    assert sync(tmp_path / "r", store) > 2
    assert history(store, tmp_path / "r", "loss") == [(1, 1)]


def alter(file, *statements):
    with closing(sqlite3.connect(file)) as database:
        for statement in statements:
            database.execute(statement)
        database.commit()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.write_bytes(b"not a database" * 1000), "not a whole MLflow database"),
        (lambda file: os.truncate(file, 5000), "not a whole MLflow database"),
        (lambda file: (file.unlink(), alter(file, "CREATE TABLE patients (name)")), "not a whole MLflow database"),
        (lambda file: alter(file, "DROP TABLE experiments"), "not a whole MLflow database"),
        (lambda file: alter(file, "UPDATE alembic_version SET version_num = '181f10493468'"), "mlflow db upgrade"),
        (lambda file: alter(file, "UPDATE alembic_version SET version_num = 'later'"), "another version of MLflow"),
    ],
    ids=["no database", "cut", "foreign", "half", "older", "newer"],
)
def test_a_database_that_can_not_be_opened_is_named_and_the_journal_waits(damage, message, sent, database, tmp_path):
    file, store = tmp_path / "mlflow.db", f"sqlite:///{tmp_path}/mlflow.db"
    damage(file)
    before = file.read_bytes()
    for opened in (lambda: sync(sent, store), lambda: load_runs(store)):
        with pytest.raises(UserError, match=f"mlflow.db: .*{message}.*move it away") as error:
            opened()
        assert "\n" not in str(error.value)
    assert file.read_bytes() == before
    file.rename(tmp_path / "away")
    shutil.copy(database, file)
    assert sync(sent, store) > 5
    check_sent(store, sent)


def test_a_database_that_was_removed_is_sent_everything_again(sent, database, tmp_path):
    store = f"sqlite:///{tmp_path}/mlflow.db"
    assert sync(sent, store) == 0
    entries = sum(1 for part in (sent, sent / "student") for _ in read_journal(part))
    (tmp_path / "mlflow.db").unlink()
    shutil.copy(database, tmp_path)
    with pytest.raises(UserError, match="sync the folder of the whole job"):
        sync(sent / "student", store)
    assert sync(sent, store) == entries
    check_sent(store, sent)
    assert sync(sent, store) == 0


def test_a_database_that_is_replaced_under_a_running_job_gets_all_of_it(store, database, tmp_path):
    tracker = open_run(store, "e", "r", tmp_path / "r", {}, {})
    tracker.metrics({"loss": 1}, 1)
    wait_until(lambda: tracker.run_id and not tracker.sender.left())
    shutil.copy(database, tmp_path / "other.db")
    (tmp_path / "other.db").replace(tmp_path / "mlflow.db")
    tracker.metrics({"loss": 2}, 2)
    tracker.finish("FINISHED")
    assert history(store, tmp_path / "r", "loss") == [(1, 1), (2, 2)]
    assert [run.info.status for run in runs(store)] == ["FINISHED"]


@pytest.mark.parametrize(
    "note",
    [
        *("", "{", "\0\0", "[]", "3", "{}"),
        *({"run_id": value} for value in (None, 5, "", "nobody's", "../..", "'", "foreign")),
        *({"sent": value} for value in (-1, None, "all", 10, 10**9)),
    ],
    ids=str,
)
def test_a_note_of_what_was_sent_that_was_edited_costs_nothing(note, sent, tmp_path):
    store = f"sqlite:///{tmp_path}/mlflow.db"
    for part in (sent, sent / "student"):
        text = note
        if isinstance(note, dict):
            (foreign,) = (run.info.run_id for run in runs(store) if run.info.run_name == "foreign")
            text = json.dumps(state(part) | note).replace('"foreign"', f'"{foreign}"')
        (part / "tracking.json").write_text(text)
    assert sync(sent, store) > 2
    check_sent(store, sent)


def test_damaged_lines_of_a_journal_are_left_out_and_said(sent, database, tmp_path, caplog):
    journal = sent / "student" / "tracking.jsonl"
    first, *others = journal.read_bytes().splitlines(keepends=True)
    damaged = ["3", "null", "[1]", "{", '"time"', "\0\0", '{"time": "x"}', '{"id": 3}', '{"id": "0"}', '{"tags": 5}']
    damaged += ['{"time": 1, "step": 1, "metrics": 5}', '{"time": 1, "step": 1, "metrics": {"loss": "x"}}']
    damaged += ['{"time": 1, "metrics": {"loss": 1}}', '{"artifact": "x"}', '{"status": "DONE"}']
    bad = [line.encode() + b"\n" for line in damaged] + [b"\xff\xfe\n"]
    journal.write_bytes(first + b"".join(bad) + b"".join(others))
    store = f"sqlite:///{shutil.copy(database, tmp_path / 'mlflow.db')}"
    assert sync(sent, store) > len(bad)
    check_sent(store, sent)
    assert caplog.text.count("damaged lines, which are left out") == 1

    journal.write_bytes(b"".join(bad + others))
    shutil.copy(database, tmp_path / "mlflow.db")
    with pytest.raises(UserError, match=r"student/tracking.jsonl: the line that describes the run is damaged"):
        sync(sent, store)
    assert [run.info.run_name for run in runs(store)] == ["job"]
    parent = open_run(store, "e", "job", sent, {}, {})
    child = open_run(store, "e", "student", sent / "student", {}, {}, parent)
    child.finish("FINISHED")
    parent.finish("FINISHED")
    check_sent(store, sent)


def test_a_sweep_may_have_any_name_and_a_foreign_run_with_its_name_is_none(store, tmp_path):
    name = """it's "quoted" %"""
    client = make_client(store)
    client.create_run(client.create_experiment("e"), tags={"sweep": name, "mlflow.runName": "foreign"})
    for k in range(2):
        tracker = open_run(store, "e", f"job {k}", tmp_path / str(k), {}, {}, name)
        tracker.finish("FINISHED")
    found = {run.info.run_name: run for run in runs(store)}
    assert found.keys() == {name, "job 0", "job 1", "foreign"}
    for k in range(2):
        assert found[f"job {k}"].data.tags["mlflow.parentRunId"] == found[name].info.run_id


def test_what_somebody_deleted_in_mlflow_is_said_and_waits(sent, tmp_path):
    store = f"sqlite:///{tmp_path}/mlflow.db"
    client = make_client(store)
    run = state(sent)["run_id"]
    client.delete_run(run)
    with pytest.raises(UserError, match=f"mlflow runs restore --run-id {run}"):
        sync(sent, store)
    client.restore_run(run)
    assert sync(sent, store) == 0
    client.delete_experiment(client.get_experiment_by_name("e").experiment_id)
    (sent / "tracking.json").unlink()
    with pytest.raises(UserError, match=r"experiment 'e' was deleted.*mlflow experiments restore"):
        sync(sent, store)


def test_why_a_run_failed_is_its_tag_until_it_goes_on(store, tmp_path):
    first = open_run(store, "e", "r", tmp_path / "r", {}, {})
    first.finish("FAILED", "out of memory; try less")
    (run,) = runs(store)
    assert (run.info.status, run.data.tags["failure"]) == ("FAILED", "out of memory; try less")
    second = open_run(store, "e", "r", tmp_path / "r", {}, {})
    second.finish("FINISHED")
    (run,) = runs(store)
    assert run.info.status == "FINISHED"
    assert "failure" not in run.data.tags


def test_the_reason_is_one_line():
    assert failure_of(UserError("store.zarr: no such store")) == "store.zarr: no such store"
    assert failure_of(RuntimeError("first\nlast")) == "last"
    assert failure_of(ValueError("bad")) == "ValueError: bad"
    # As a loader's worker hands it on.
    text = "Caught UserError in DataLoader worker process 0.\nTraceback:\ndata_tools.errors.UserError: bad chunk"
    assert failure_of(UserError(text)) == "bad chunk"


def test_the_page_is_that_of_the_runs(sent, tmp_path, monkeypatch):
    store = f"sqlite:///{tmp_path}/mlflow.db"
    (run,) = (run for run in runs(store) if run.info.run_name == "job")
    assert run.info.experiment_id != "0"
    address = f"/#/experiments/{run.info.experiment_id}/runs?workflowType=machine_learning&viewStateShareKey=results"
    client = make_client(store)
    saved = json.loads(client.get_experiment(run.info.experiment_id).tags[VIEW_TAG])
    assert "metrics.`test_dice`" in json.loads(saved["state"])["selectedColumns"]
    client.set_experiment_tag(run.info.experiment_id, VIEW_TAG, "changed by somebody")
    Sender(sent, store).send()
    assert client.get_experiment(run.info.experiment_id).tags[VIEW_TAG] == "changed by somebody"
    monkeypatch.chdir(tmp_path)
    page = page_of(tmp_path, "sqlite:///mlflow.db")
    program = Path(sys.executable).with_name("mlflow")
    command = f"MLFLOW_DISABLE_TELEMETRY=true {program} ui --host 127.0.0.1 --backend-store-uri {store}"
    assert page.split("\n")[0].endswith(command)
    assert page.endswith(f" http://127.0.0.1:5000{address}")
    monkeypatch.chdir(program.parents[1])
    assert f" {program.parent.name}/mlflow ui" in page_of(tmp_path, store)
    assert program.exists()

    (sent / "tracking.json").write_text(json.dumps(state(sent) | {"uri": "https://me:secret@host/mlflow/"}))
    assert page_of(sent, "https://me:secret@host/mlflow/") == f"The runs in a browser: https://host/mlflow{address}"
    (sent / "tracking.json").unlink()
    (sent / "student" / "tracking.json").unlink()
    assert page_of(sent, store) == ""


MEMORY = """
import os, sys
from spark_dist.training import system_metrics
system_metrics.gpu_monitor = lambda: None
machine = system_metrics.SystemMetrics()
held = machine.read()["system/memory_mib"]
print(held, len(machine.processes()))
"""


def test_system_metrics_are_those_of_all_processes_of_the_job():
    """A launcher with two processes, one of which holds 200 MiB, and has a child."""
    code = f"""
import os, subprocess, sys
start = lambda code, **how: subprocess.Popen([sys.executable, "-c", code], text=True, **how)
hold = "import subprocess, sys; held = b'x' * (200 << 20); c = subprocess.Popen(['cat']); print(flush=True); c.wait()"
other = start(hold, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
other.stdout.readline()
for size in ("1", "2"):
    os.environ["LOCAL_WORLD_SIZE"] = size
    start({MEMORY!r}).wait()
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    (alone, one), (together, three) = (map(float, line.split()) for line in result.stdout.splitlines())
    assert (one, three) == (1, 3)
    assert 200 < together - alone < 300


def test_gpus_are_read_by_the_collector_of_mlflow(monkeypatch):
    """No GPU here: a stand-in for the library that MLflow's collector asks."""
    library = types.ModuleType("pynvml")
    library.NVMLError = OSError
    library.nvmlInit = lambda: None
    library.nvmlDeviceGetCount = lambda: 2
    library.nvmlDeviceGetHandleByIndex = lambda index: index
    library.nvmlDeviceGetMemoryInfo = lambda handle: types.SimpleNamespace(used=(handle + 1) * 10**9, total=8 * 10**9)
    library.nvmlDeviceGetUtilizationRates = lambda handle: types.SimpleNamespace(gpu=50 + handle)
    library.nvmlDeviceGetPowerUsage = library.nvmlDeviceGetEnforcedPowerLimit = lambda handle: 300_000
    from mlflow.system_metrics.metrics import gpu_monitor

    monkeypatch.setitem(sys.modules, "pynvml", library)
    monkeypatch.setattr(gpu_monitor, "pynvml", library, raising=False)
    machine = SystemMetrics()
    for _ in range(2):
        read = machine.read()
        assert [read[f"system/gpu_{k}_utilization_percentage"] for k in range(2)] == [50, 51]
        assert [read[f"system/gpu_{k}_memory_usage_megabytes"] for k in range(2)] == [1000, 2000]
        assert {"system/cpu_percent", "system/memory_mib"} < set(read)


def test_the_server_script_says_what_it_would_start(tmp_path):
    def printed(**settings):
        line = ["bash", ROOT / "launch" / "mlflow_server.sh", "--dry-run", tmp_path / "server"]
        return subprocess.run(line, env=os.environ | settings, capture_output=True, text=True, check=True).stdout

    line = printed()
    assert line.startswith("mlflow server --host 127.0.0.1 --port 5000 ")
    assert f"--backend-store-uri sqlite:///{tmp_path}/server/mlflow.db" in line
    assert f"--artifacts-destination {tmp_path}/server/artifacts" in line
    assert "--allowed-hosts" not in line
    database = "postgresql+psycopg2://me@db/mlflow"
    line = printed(DATABASE=database, ARTIFACTS="s3://bucket/mlflow", NAME="mlflow.example.org")
    assert f"--backend-store-uri {database} --artifacts-destination s3://bucket/mlflow" in line
    assert "--allowed-hosts mlflow.example.org" in line
    assert "--cors-allowed-origins https://mlflow.example.org" in line
    assert not list(tmp_path.iterdir())


@pytest.fixture
def server(tmp_path, port):
    """A function that starts an MLflow server (always the same one) and returns its process when it answers."""
    with ExitStack() as stack:
        yield lambda: stack.enter_context(mlflow_server(tmp_path / "server", port, NAME="mlflow.example.org"))


@pytest.mark.slow
def test_a_server_that_dies_and_comes_back_has_everything_once(server, port, tmp_path, caplog, capfd):
    uri = f"http://127.0.0.1:{port}"
    process = server()
    parent = open_run(uri, "e", "job", tmp_path / "job", {}, {})
    child = open_run(uri, "e", "student", tmp_path / "job" / "student", {"role": "student"}, {"lr": 1}, parent)
    for step in range(20):
        child.metrics({"loss": step}, step)
    wait_until(lambda: child.run_id and not child.sender.left())
    kill(process)
    for step in range(20, 40):
        child.metrics({"loss": step, "hd95": math.nan}, step)
    weights = tmp_path / "job" / "student" / "best.safetensors"
    weights.write_bytes(b"weights")
    child.artifact(weights)
    wait_until(lambda: "training goes on" in caplog.text)
    server()
    wait_until(lambda: not child.sender.left())
    child.metrics({"loss": 40}, 40)
    child.finish("FINISHED")
    parent.finish("FINISHED")
    assert "kept in" not in caplog.text
    assert history(uri, child.folder, "loss") == [(step, step) for step in range(41)]
    run = make_client(uri).get_run(child.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["mlflow.parentRunId"] == parent.run_id
    assert math.isnan(run.data.metrics["hd95"])
    assert [file.path for file in make_client(uri).list_artifacts(child.run_id)] == ["best.safetensors"]
    assert len(runs(uri)) == 2
    assert capfd.readouterr().out == ""
    # Behind a proxy, which hands on the name that it was called by; no other is answered.
    for host, code in (("mlflow.example.org", 200), (f"127.0.0.1:{port}", 200), ("elsewhere.example.org", 403)):
        line = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        line.request("GET", "/api/2.0/mlflow/experiments/search?max_results=1", headers={"Host": host})
        assert line.getresponse().status == code
        line.close()
