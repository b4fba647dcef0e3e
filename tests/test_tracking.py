import json
import socket
import subprocess
import sys
import time

import pytest

from spark_dist.tracking import absolute_uri, make_client, open_run, read_journal, sync


@pytest.fixture
def store(tmp_path):
    return f"sqlite:///{tmp_path}/mlflow.db"


@pytest.fixture
def nowhere():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


def history(store, tracker, key):
    found = make_client(store).get_metric_history(tracker.run_id, key)
    return sorted((metric.step, metric.value) for metric in found)


def test_a_run_and_its_child_reach_mlflow(store, tmp_path):
    parent = open_run(store, "phantom-organ", "job", tmp_path / "job", {"seed": "1"}, {"lr": 0.1, "long": "x" * 9000})
    child = open_run(store, "phantom-organ", "student", tmp_path / "job" / "student", {}, {}, parent)
    for step in range(250):
        child.metrics({"loss": step / 2, "dice": 0.5}, step)
    (tmp_path / "figure.png").write_bytes(b"png")
    child.artifact(tmp_path / "figure.png")
    child.finish("FINISHED")
    parent.finish("FAILED")
    client = make_client(store)
    run = client.get_run(child.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["mlflow.parentRunId"] == parent.run_id
    assert history(store, child, "loss") == [(step, step / 2) for step in range(250)]
    assert [file.path for file in client.list_artifacts(child.run_id)] == ["figure.png"]
    assert client.get_run(parent.run_id).info.status == "FAILED"
    assert client.get_run(parent.run_id).data.params["lr"] == "0.1"
    assert "system/memory_mib" in client.get_run(parent.run_id).data.metrics


def test_a_resumed_run_goes_on_without_a_step_twice(store, tmp_path):
    first = open_run(store, "e", "r", tmp_path / "r", {}, {})
    for step in range(5):
        first.metrics({"loss": step}, step)
    first.finish("KILLED")
    second = open_run(store, "e", "r", tmp_path / "r", {}, {})
    for step in range(3, 8):
        second.metrics({"loss": step}, step)
    second.finish("FINISHED")
    assert second.run_id == first.run_id
    assert history(store, second, "loss") == [(step, step) for step in range(8)]
    assert make_client(store).get_run(second.run_id).info.status == "FINISHED"


def test_a_dead_server_costs_nothing_and_loses_nothing(nowhere, store, tmp_path, caplog):
    start = time.monotonic()
    parent = open_run(nowhere, "e", "job", tmp_path / "job", {}, {})
    child = open_run(nowhere, "e", "student", tmp_path / "job" / "student", {}, {}, parent)
    for step in range(100):
        child.metrics({"loss": step}, step)
    assert time.monotonic() - start < 1
    child.finish("FINISHED")
    parent.finish("FINISHED")
    assert time.monotonic() - start < 45
    assert "training goes on" in caplog.text
    assert "kept in" in caplog.text
    assert child.run_id is None

    assert sync(tmp_path / "job", store) >= 104
    assert sync(tmp_path / "job", store) == 0
    state = json.loads((tmp_path / "job" / "student" / "tracking.json").read_text())
    found = make_client(store).get_metric_history(state["run_id"], "loss")
    assert sorted((m.step, m.value) for m in found) == [(step, step) for step in range(100)]


def test_half_a_line_is_no_event(tmp_path):
    (tmp_path / "tracking.jsonl").write_text('{"metrics": {"a": 1}, "step": 1}\n{"metr')
    assert len(read_journal(tmp_path)) == 1


def test_a_relative_database_is_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert absolute_uri("sqlite:///mlflow.db") == f"sqlite:///{tmp_path}/mlflow.db"
    assert absolute_uri("http://host:5000") == "http://host:5000"


def test_jobs_that_start_together_make_one_database(store, tmp_path):
    code = "import sys; from spark_dist.tracking import make_client; make_client(sys.argv[1])"
    started = [subprocess.Popen([sys.executable, "-c", code, store]) for _ in range(3)]
    assert [process.wait(120) for process in started] == [0, 0, 0]
    assert make_client(store).search_experiments()
